"""`matryo eval`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.pictures import task_of
from matryo.cli.terminal import InterruptedByUserError, Json, bar, note, say
from matryo.cli.train import numbers
from matryo.core.errors import InputError

if TYPE_CHECKING:
    from matryo.encoders import Model
    from matryo.training import Step

TRAIN = "train"
"""Said instead of a model: make it here. A folder of that name is given as ./train."""


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or 'toy'.")],
    task: Annotated[
        Path,
        typer.Argument(help="Retrieval folder (BEIR layout), STS file, or folder of labelled texts or pictures."),
    ],
    split: Annotated[str, typer.Option(help="Judgements of a retrieval folder, or pictures to measure on.")] = "test",
    widths: Annotated[str | None, typer.Option(help="Widths, trained or not, such as 32,64,200.")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Layers to run, of the trained depths: all of these if unset; or 'none'.")
    ] = None,
    codes: Annotated[str, typer.Option(help="Codes, such as float32,int8,binary.")] = "float32,int8,binary",
    baselines: Annotated[
        str, typer.Option(help="Of pca and random (labelled sets: svd and select too), or 'none'.")
    ] = "pca,random",
    fit: Annotated[
        Path | None, typer.Option(help="Pairs whose positives PCA is fitted on; the corpus if unset.")
    ] = None,
    twin: Annotated[
        str | None, typer.Option(help="The same model trained without nesting, to be cut; 'train' trains it.")
    ] = None,
    separate: Annotated[
        list[str] | None,
        typer.Option(
            help="WIDTH=MODEL trained at that width alone, WIDTH=train to train it by the model's own recipe, or "
            "'train' for every trained width; repeatable."
        ),
    ] = None,
    separate_out: Annotated[
        Path | None,
        typer.Option(help="Folder for models trained here, used again next time; MODEL-alone if unset."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="nDCG@k (10 if unset), recall@k, MRR@k or mAP@k; of labels top-1 (if unset), 1-NN, ..."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Name the fewest layers and bytes that keep this share of the quality: 0.95.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the page with charts here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here as well.")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of resamples and random projection.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a model at every width and code, beside baselines, with confidence intervals.

    With 'train', --twin and --separate run the model's recorded training again, for one width alone.
    Example: matryo eval runs/first dev-set/ --widths 16,64,200,512 --report report.html
    """
    from matryo import load
    from matryo.core.files import write_text
    from matryo.core.records import read_pairs
    from matryo.evaluation import evaluate as run
    from matryo.evaluation import read_task
    from matryo.evaluation.report import check_kind

    for path in (report, out):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: its folder is not there; make it first")
    if report is not None:
        check_kind(report)
    loaded = load(model)
    image = getattr(loaded.encoder, "modality", "text") == "image"
    measured = task_of(task, split, loaded.encoder.network.config.size) if image else read_task(task, split)
    twins, alone = _others(loaded, twin, separate or [], separate_out)
    result = run(
        loaded,
        measured,
        widths=numbers(widths),
        depths=() if depths == "none" else numbers(depths, what="depths"),
        codes=[c.strip() for c in codes.split(",")],
        baselines=[] if baselines == "none" else [b.strip() for b in baselines.split(",")],
        metric=metric,
        twins=twins,
        separate=alone,
        fit_vectors=loaded.encode(read_pairs(fit).positives) if fit else None,
        heads=_heads(model, measured),
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
    if keep is not None:
        found = result.smallest(keep)
        names = [f"{row.label} ({row.bytes:,} bytes, {row.share:.1%})" for row in found]
        note(f"keeps {keep:.0%} (lower bound): " + ("; ".join(names) or "nothing smaller than the whole model"))


def _heads(model: str, task: Any) -> Any:
    """The classifier that the model was trained with, if its folder holds one of the classes of a labelled task."""
    from matryo.classify import LinearHeads
    from matryo.core.labelled import LabelledTask

    if not isinstance(task, LabelledTask) or not (Path(model) / "head.safetensors").is_file():
        return None
    from matryo.training import load_head

    head, classes = load_head(model)
    return LinearHeads.of(head, classes) if set(classes) <= set(task.classes) else None


def _others(
    model: "Model", twin: str | None, separate: list[str], out: Path | None
) -> tuple[dict[str, Any], dict[int, Any]]:
    """The twin and the models of one width, loaded or trained here."""
    from matryo import load

    trained = model.nesting.widths if model.nesting else (model.width,)
    named = dict.fromkeys(trained if TRAIN in separate else (), TRAIN)
    named |= dict(_separate(text) for text in separate if text != TRAIN)
    wanted = {width for width, name in named.items() if name == TRAIN} | ({model.width} if twin == TRAIN else set())
    made = _trained(model, sorted(wanted), out) if wanted else {}
    alone = {width: made[width] if name == TRAIN else load(name) for width, name in named.items()}
    return {"un-nested, cut": made[model.width] if twin == TRAIN else load(twin)} if twin else {}, alone


def _separate(text: str) -> tuple[int, str]:
    width, found, name = text.partition("=")
    if not found or not name or not width.isdecimal():
        raise InputError(f"--separate takes WIDTH=MODEL or train, got {text!r}; for example 64=runs/only-64")
    return int(width), name


def _trained(model: "Model", widths: list[int], out: Path | None) -> dict[int, Any]:
    from matryo.evaluation import train_alone
    from matryo.evaluation.alone import default_folder

    folder = out or default_folder(model)
    with bar(None, "training") as progress:

        def report(width: int, step: "Step") -> None:
            if step.scores:
                note(f"width {width} alone: step {step.step}/{step.steps} dev {step.scores[f'width_{width}']:.4f}")
            progress.to(step.step, step.steps, f"training width {width} alone")

        try:
            return dict(train_alone(model, widths, folder, report))
        except KeyboardInterrupt:
            raise InterruptedByUserError(
                f"interrupted; finished steps are kept in {folder}, go on with the same command"
            ) from None
