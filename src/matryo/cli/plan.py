"""`matryo index calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.terminal import Json, say, say_json

if TYPE_CHECKING:
    from matryo.index import Index

VECTOR_FILES = (".npy", ".safetensors")
Recall = Annotated[float, typer.Option(help="Share of the exact k best found in expectation on new queries.")]
Confidence = Annotated[float, typer.Option(help="How sure, over the draw of the queries.")]
K = Annotated[int, typer.Option("-k", help="Answers per query.")]


def calibrate(
    index: Annotated[Path, typer.Argument(help="Index folder.")],
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


def vectors_of(queries: Path, index: "Index", folder: Path, model: str | None) -> Any:
    """Vectors of queries: read, or encoded by the model that made the index."""
    from matryo.cli.index import model_of
    from matryo.core.records import read_texts, read_vectors

    if queries.suffix in VECTOR_FILES:
        return read_vectors(queries)
    return model_of(index, folder, model).encode(read_texts(queries))
