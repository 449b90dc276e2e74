"""`matryo index build|add|delete|stats|check|compact` and `matryo search`."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.plan import calibrate
from matryo.cli.terminal import InterruptedByUserError, Json, bar, note, say, say_json
from matryo.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from matryo.encoders import Model
    from matryo.index import Hits, Index

BATCH = 2048
"""Documents encoded and committed at a time: what an interruption can cost."""

Folder = Annotated[Path, typer.Argument(help="Index folder.")]
Documents = Annotated[Path, typer.Argument(help="Table of documents, or a folder with corpus.jsonl[.gz].")]
Vectors = Annotated[Path | None, typer.Option(help="Ready vectors, one row per document (.npy, ...).")]
Metadata = Annotated[list[str] | None, typer.Option(help="Column kept for filters; repeatable.")]


def add(app: typer.Typer) -> None:
    """Put the verbs on the app."""
    group = typer.Typer(help="Build and keep an index folder.", no_args_is_help=True)
    for verb in (build, add_documents, delete, stats, check, compact, calibrate):
        group.command("add" if verb is add_documents else verb.__name__)(verb)
    app.add_typer(group, name="index")
    app.command()(search)


def build(
    documents: Documents,
    out: Annotated[Path, typer.Option(help="Index folder to make.")],
    model: Annotated[str | None, typer.Option(help="Model that encodes documents and, later, queries.")] = None,
    plan: Annotated[str | None, typer.Option(help="Such as '128:binary keep 400 > 512:float32'.")] = None,
    vectors: Vectors = None,
    metadata: Metadata = None,
    store: Annotated[str, typer.Option(help="How full vectors lie on the disk: float16 or float32.")] = "float16",
    as_json: Json = False,
) -> None:
    """Index documents in a new folder. Each batch is committed: what was reported survives a crash.

    Columns read: _id or id, title and text (or document). A document with neither is left out and counted, as there is
    nothing to encode; with --vectors it is kept.
    Example: matryo index build corpus.jsonl.gz --model runs/first --out docs.matryo --metadata section
    """
    from matryo import Index, load
    from matryo.core.records import read_vectors

    if (model is None) == (vectors is None):
        raise InputError("give --model to encode the documents, or --vectors that are ready, one of the two")
    loaded = load(model) if model else None
    width = loaded.width if loaded else read_vectors(vectors or Path()).shape[1]
    rows = _read(documents, metadata or [])
    _refuse_repeats(rows, documents)
    ready = _ready(vectors, rows, documents)
    with Index.create(out, width=width, plan=plan, model=identity(loaded) if loaded else None, store=store) as index:
        left = _fill(index, rows, loaded, ready, out)
        _report(index, as_json, left)


def add_documents(
    index: Folder, documents: Documents, vectors: Vectors = None, metadata: Metadata = None, as_json: Json = False
) -> None:
    """Add documents to an index, replacing those whose id is there already.

    A document without title and text is left out; if its id was there, it is no longer.
    Example: matryo index add docs.matryo more.jsonl.gz
    """
    from matryo import Index

    rows = _read(documents, metadata or [])
    _refuse_repeats(rows, documents)
    ready = _ready(vectors, rows, documents)
    with Index.open(index) as opened:
        loaded = None if vectors else model_of(opened, index)
        left = _fill(opened, rows, loaded, ready, index)
        _report(opened, as_json, left)


def delete(index: Folder, ids: Annotated[list[str], typer.Argument(help="Ids.")], as_json: Json = False) -> None:
    """Delete documents by id.

    Example: matryo index delete docs.matryo some-id
    """
    from matryo import Index

    with Index.open(index) as opened:
        gone = opened.delete(ids)
    say_json({"deleted": gone}) if as_json else say(f"deleted {gone} of {len(ids)}")


def stats(index: Folder, as_json: Json = False) -> None:
    """What an index holds and how many bytes it takes.

    Example: matryo index stats docs.matryo
    """
    from matryo import Index

    with Index.open(index, read_only=True) as opened:
        _report(opened, as_json)


def check(index: Folder, as_json: Json = False) -> None:
    """Read every byte and compare it with what was recorded. Exit status 2 if anything is damaged.

    Example: matryo index check docs.matryo
    """
    from matryo import Index
    from matryo.core.errors import DamagedError

    with Index.open(index, read_only=True) as opened:
        found = opened.check()
    if found.problems:
        raise DamagedError(f"{index}: {'; '.join(found.problems)}")
    say_json({"damaged": []}) if as_json else say(f"{index}: no damage found")


def compact(
    index: Folder,
    store: Annotated[str | None, typer.Option(help="Keep full vectors as float16 or float32 from now on.")] = None,
    as_json: Json = False,
) -> None:
    """Drop the rows of deleted and replaced documents and derive codes anew. Searches go on meanwhile.

    Example: matryo index compact docs.matryo
    """
    from matryo import Index

    with Index.open(index) as opened:
        dropped = opened.compact(store)
    say_json({"dropped": dropped}) if as_json else say(f"dropped {dropped} dead rows")


def search(
    index: Folder,
    queries: Annotated[list[str], typer.Argument(help="One or more questions.")],
    k: Annotated[int, typer.Option("-k", help="Answers per question.")] = 10,
    plan: Annotated[str | None, typer.Option(help="Another plan than the index's own.")] = None,
    where: Annotated[str | None, typer.Option(help='Filter as JSON, such as \'{"section": "games"}\'.')] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each stage did.")] = False,
    model: Annotated[str | None, typer.Option(help="Where the index's model lies now, if it moved.")] = None,
    as_json: Json = False,
) -> None:
    """Search an index by text, coarse to fine.

    Example: matryo search docs.matryo "puzzle game for the terminal" --where '{"section": "games"}'
    """
    from matryo import Index

    condition = _json_object(where) if where else None
    with Index.open(index, read_only=True) as opened:
        asked = model_of(opened, index, model).encode(queries)
        start = time.perf_counter()
        hits = opened.search(asked, k=k, plan=plan, where=condition, explain=explain)
        took = 1000 * (time.perf_counter() - start)
    if as_json:
        explained = {"explanation": _explained(hits), "promise": hits.promise}
        say_json({"queries": _rows(queries, hits), "milliseconds": took, **explained})
        return
    for n, query in enumerate(queries):
        say(f"{query}")
        for key, score, text in zip(hits.ids[n], hits.scores[n], hits.documents[n], strict=True):
            say(f"  {score:.4f}  {key}  {' '.join((text or '').split())[:100]}")
    for line in _explained(hits) or ():
        note(str(line))
    if hits.promise:
        note(hits.promise)
    note(f"{took:.1f} ms for {len(queries)} queries, encoding aside")


def identity(model: "Model") -> dict[str, Any]:
    """What an index records of the model that made its vectors: where it lay, and a digest of its weights."""
    from matryo.encoders.folder import fingerprint

    return {"name": str(Path(model.name).resolve()) if Path(model.name).is_dir() else model.name} | fingerprint(
        model.name
    )


def model_of(index: "Index", folder: Path, name: str | None = None) -> "Model":
    """The model that made an index's vectors, or an error if it is not there or not the same any more."""
    from matryo import load

    recorded = index.stats()["model"]
    if not recorded:
        raise InputError(f"{folder} was built from ready vectors and names no model; search it with mt.Index in Python")
    model: Model = load(name or recorded["name"])
    found = identity(model)
    if found.get("blake2b") != recorded.get("blake2b"):
        raise InputError(
            f"{folder} was built by another model than {model.name} is now; give --model or build it again"
        )
    return model


def _read(path: Path, metadata: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """(id, text, metadata) of every row, all checked before anything is written."""
    from matryo.core import records

    path = records._one_of(path, "corpus") if path.is_dir() else path
    found = []
    for line, row in records.rows(path):
        key = row.get("_id", row.get("id"))
        if key is None or str(key) == "":
            raise InputError(f"{path} line {line}: no '_id' or 'id'; it has {', '.join(map(repr, row))}")
        column = "text" if "text" in row or "document" not in row else "document"
        missing = [name for name in metadata if name not in row]
        if missing:
            raise InputError(f"{path} line {line}: no column {missing[0]!r} for metadata; it has {', '.join(row)}")
        text = records.document_of(path, line, row, column)
        found.append((str(key), text, {name: row[name] for name in metadata}))
    if not found:
        raise InputError(f"{path}: no rows, so there is nothing to index")
    return found


def _refuse_repeats(rows: list[tuple[str, str, dict[str, Any]]], path: Path) -> None:
    seen: set[str] = set()
    for key, _, _ in rows:
        if key in seen:
            raise InputError(f"{path}: id {key!r} appears twice; ids must be distinct")
        seen.add(key)


def _ready(
    vectors: Path | None, rows: list[tuple[str, str, dict[str, Any]]], path: Path
) -> "NDArray[np.float32] | None":
    """Ready vectors, one per document, or none and something to encode: checked before an index is made or touched."""
    from matryo.core.records import read_vectors

    if vectors is None and not any(text for _, text, _ in rows):
        raise InputError(f"{path}: no document has a title or a text, so there is nothing to encode")
    ready = read_vectors(vectors) if vectors else None
    if ready is not None and len(ready) != len(rows):
        raise InputError(f"{vectors} has {len(ready)} rows for {len(rows)} documents; give one vector per document")
    return ready


def _fill(
    index: "Index",
    rows: list[tuple[str, str, dict[str, Any]]],
    model: "Model | None",
    ready: "NDArray[np.float32] | None",
    folder: Path,
) -> list[str]:
    """Write the rows batch by batch; the ids of those that were left out because there is nothing to encode."""
    left = [key for key, text, _ in rows if not text and ready is None]
    kept = [row for row in rows if row[1] or ready is not None]
    try:
        with bar(len(kept), "indexing") as progress:
            for start, part in _batches(kept):
                keys, texts, fields = (list(column) for column in zip(*part, strict=True))
                made = ready[start : start + len(part)] if ready is not None else model.encode(texts)  # type: ignore[union-attr]
                index.upsert(keys, made, texts, [f or None for f in fields])
                progress.by(len(part))
        if left:
            index.delete(left)
    except KeyboardInterrupt:
        raise InterruptedByUserError(
            f"interrupted; {folder} holds {len(index)} documents, in whole batches; the rest can follow by "
            "'matryo index add' with the same file"
        ) from None
    return left


def _batches(rows: list[Any]) -> Iterator[tuple[int, list[Any]]]:
    for start in range(0, len(rows), BATCH):
        yield start, rows[start : start + BATCH]


def _report(index: "Index", as_json: bool, left: list[str] | None = None) -> None:
    """What an index holds and, after writing, which documents were left out."""
    found = index.stats()
    if left:
        named = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        note(f"left out, as they have neither title nor text: {len(left)} documents ({named})")
    if as_json:
        say_json(found if left is None else {**found, "left_out": left})
        return
    for name in ("items", "dead_rows", "width", "plan", "generation"):
        say(f"{name}: {found[name]}")
    if found["model"]:
        say(f"model: {found['model']['name']}")
    say(f"on disk: {sum(found['files'].values()):,} bytes, {found['vector_bytes']:,} of them vectors")


def _rows(queries: list[str], hits: "Hits") -> list[dict[str, Any]]:
    return [
        {
            "query": query,
            "hits": [
                {"id": i, "score": s, "document": d, "metadata": m}
                for i, s, d, m in zip(hits.ids[n], hits.scores[n], hits.documents[n], hits.metadata[n], strict=True)
            ],
        }
        for n, query in enumerate(queries)
    ]


def _explained(hits: "Hits") -> list[Any] | None:
    from dataclasses import asdict

    return None if hits.explanation is None else [asdict(stage) for stage in hits.explanation]


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f'--where is not JSON ({error}); for example \'{{"section": "games"}}\'') from error
    if not isinstance(content, dict):
        raise InputError(f"--where must be a JSON object, got {text}")
    return content
