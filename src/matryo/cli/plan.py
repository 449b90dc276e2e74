"""`matryo plan`, and `matryo index calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.terminal import Json, note, say, say_json
from matryo.core.errors import InputError

if TYPE_CHECKING:
    from matryo.index import Index

VECTOR_FILES = (".npy", ".safetensors")
Recall = Annotated[float, typer.Option(help="Share of the exact k best found in expectation on new queries.")]
Confidence = Annotated[float, typer.Option(help="How sure, over the draw of the queries.")]
K = Annotated[int, typer.Option("-k", help="Answers per query.")]


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(plan)


def plan(
    vectors: Annotated[Path, typer.Argument(help="Vectors of the items (.npy, .safetensors, .parquet).")],
    queries: Annotated[
        Path | None, typer.Argument(help="Vectors of a sample of queries; items are held out if unset.")
    ] = None,
    recall: Recall = 0.95,
    confidence: Confidence = 0.95,
    k: K = 10,
    items: Annotated[str | None, typer.Option(help="How many items there will be, such as 100M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory for codes at --items, such as 2GB.")] = None,
    latency: Annotated[str | None, typer.Option(help="Time of one search at --items, such as 5ms.")] = None,
    budget: Annotated[str, typer.Option(help="Time this may take, such as 120s.")] = "120s",
    widths: Annotated[str | None, typer.Option(help="Widths to try, such as 64,128; halves if unset.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write what `index build --plan` takes here (.yaml).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the page with the frontier here (.html).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    as_json: Json = False,
) -> None:
    """Find the cheapest way to search one's own vectors that reaches a recall on new queries.

    Measures codes, widths, shortlists and scans on growing samples, and predicts memory and time at --items.
    Example: matryo plan vectors.npy queries.npy --recall 0.95 --memory 2GB --items 100M --out plan.yaml
    """
    from matryo import plan as run
    from matryo.cli.train import numbers
    from matryo.core.records import read_vectors

    for path, kinds in ((out, (".yaml", ".yml", ".json")), (report, (".html",))):
        if path is not None and (path.suffix not in kinds or not path.absolute().parent.is_dir()):
            raise InputError(f"{path}: must end in {' or '.join(kinds)} and its folder must be there")
    asked = None if queries is None else read_vectors(queries)
    found = run(
        read_vectors(vectors), asked, k, recall, confidence, items, memory, latency, budget,
        widths=numbers(widths), seed=seed, say=note,
    )  # fmt: skip
    for path in (report, out if found.choice else None):
        if path is not None:
            note(f"wrote {found.save(path)}")
    say(found.to_json() if as_json else found.table())
    if found.choice is None:
        raise InputError(found.advice)


def plan_text(text: str | None) -> str | None:
    """A plan as it was given, or the one in a `plan.yaml`."""
    if text is None or not text.endswith((".yaml", ".yml", ".json")):
        return text
    import yaml

    path = Path(text)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable file of `matryo plan` ({' '.join(str(error).split())})") from error
    if path.suffix == ".json" and isinstance(content, dict) and isinstance(content.get("best"), dict):
        content = {"plan": content["best"].get("planned")}
    if not isinstance(content, dict) or not isinstance(content.get("plan"), str):
        raise InputError(f"{path}: holds no 'plan: ...'; make one with matryo plan VECTORS QUERIES --out {path}")
    return str(content["plan"])


def calibrate(
    index: Annotated[str, typer.Argument(help="Index folder, or URL of an engine.")],
    queries: Annotated[
        Path | None,
        typer.Option(help="Table of queries (column text), or vectors (.npy, .safetensors); items are asked if unset."),
    ] = None,
    recall: Recall = 0.95,
    confidence: Confidence = 0.95,
    k: K = 10,
    plan: Annotated[
        str | None, typer.Option(help="Plan whose shortlists are chosen; the index's own if unset.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the index's model lies now, if it moved.")] = None,
    as_json: Json = False,
) -> None:
    """Choose the shortest shortlists that a sample of queries shows to be long enough; search uses them from then on.

    Example: matryo index calibrate docs.matryo --queries queries.jsonl.gz --recall 0.95
    """
    from matryo import Index

    with Index.open(index) as opened:
        asked = None if queries is None else vectors_of(queries, opened, index, model)
        promise = opened.calibrate(asked, recall=recall, confidence=confidence, k=k, plan=plan)
    if as_json:
        say_json(promise.as_json())
        return
    say(f"plan: {promise.plan}")
    say(f"promise: {promise}")


def vectors_of(queries: Path, index: "Index", place: str, model: str | None) -> Any:
    """Vectors of queries: read, or encoded by the model that made the index."""
    from matryo.cli.index import model_of
    from matryo.core.records import read_texts, read_vectors

    if queries.suffix in VECTOR_FILES:
        return read_vectors(queries)
    return model_of(index, place, model).encode(read_texts(queries))
