"""`matryo eval`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from matryo.cli.terminal import Json, note, say
from matryo.cli.train import numbers
from matryo.core.errors import InputError


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or 'toy'.")],
    task: Annotated[Path, typer.Argument(help="Retrieval folder (BEIR layout) or STS file.")],
    split: Annotated[str, typer.Option(help="Judgements of a retrieval folder.")] = "test",
    widths: Annotated[str | None, typer.Option(help="Widths, trained or not, such as 32,64,200.")] = None,
    codes: Annotated[str, typer.Option(help="Codes, such as float32,int8,binary.")] = "float32,int8,binary",
    baselines: Annotated[str, typer.Option(help="Of pca and random; 'none' for neither.")] = "pca,random",
    fit: Annotated[
        Path | None, typer.Option(help="Pairs whose positives PCA is fitted on; the corpus if unset.")
    ] = None,
    twin: Annotated[str | None, typer.Option(help="The same model trained without nesting, to be cut.")] = None,
    separate: Annotated[
        list[str] | None, typer.Option(help="WIDTH=MODEL trained at that width alone; repeatable.")
    ] = None,
    metric: Annotated[str, typer.Option(help="nDCG@k, recall@k, MRR@k or mAP@k.")] = "nDCG@10",
    report: Annotated[Path | None, typer.Option(help="Write the page with charts here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here as well.")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of resamples and random projection.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a model at every width and code, beside baselines, with confidence intervals.

    Example: matryo eval runs/first dev-set/ --widths 16,64,200,512 --report report.html
    """
    from matryo import load
    from matryo.core.files import write_text
    from matryo.core.records import read_pairs
    from matryo.evaluation import evaluate as run

    loaded = load(model)
    result = run(
        loaded,
        task,
        widths=numbers(widths),
        codes=[c.strip() for c in codes.split(",")],
        baselines=[] if baselines == "none" else [b.strip() for b in baselines.split(",")],
        split=split,
        metric=metric,
        twins={"un-nested, cut": load(twin)} if twin else None,
        separate=dict(map(_separate, separate)) if separate else None,
        fit_vectors=loaded.encode(read_pairs(fit).positives) if fit else None,
        resamples=resamples,
        seed=seed,
        command=shlex.join(["matryo", *sys.argv[1:]]),
    )
    if report:
        note(f"wrote {result.save(report)}")
    if out:
        write_text(out, result.to_json() + "\n")
        note(f"wrote {out}")
    say(result.to_json() if as_json else result.table())


def _separate(text: str) -> tuple[int, Any]:
    from matryo import load

    width, found, name = text.partition("=")
    if not found or not width.isdecimal():
        raise InputError(f"--separate takes WIDTH=MODEL, got {text!r}; for example 64=runs/only-64")
    return int(width), load(name)
