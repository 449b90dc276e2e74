"""`matryo index build|add|delete|stats|check|compact` and `matryo search`."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.documents import Documents, ready_vectors
from matryo.cli.plan import calibrate, plan_text
from matryo.cli.terminal import InterruptedByUserError, Json, bar, note, say, say_json
from matryo.core.errors import InputError, NoIndexError

if TYPE_CHECKING:
    from matryo.encoders import Model
    from matryo.index import Batch, Hits, Index

CATALOGUE = "catalogue.sqlite"
"""The file whose presence makes a folder an index."""

Place = Annotated[str, typer.Argument(help="Index folder, or URL of an engine.")]
Source = Annotated[Path, typer.Argument(help="Table of documents, a folder with corpus.jsonl[.gz], or vectors alone.")]
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
    documents: Source,
    out: Annotated[str, typer.Option(help="Index folder to make, or URL of an engine.")],
    model: Annotated[str | None, typer.Option(help="Model that encodes documents and, later, queries.")] = None,
    plan: Annotated[str | None, typer.Option(help="Such as '128:binary keep 400 > 512:float32', or plan.yaml.")] = None,
    vectors: Vectors = None,
    metadata: Metadata = None,
    store: Annotated[
        str | None, typer.Option(help="How full vectors are kept: float16, the default of most, or float32.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last batch of a build cut off.")] = False,
    as_json: Json = False,
) -> None:
    """Index documents in a new folder or engine. Each batch is committed: what was reported survives a crash.

    Columns read: _id or id, title and text (or document). A document with neither is left out and counted, as there is
    nothing to encode; with ready vectors it is kept. Those are a column 'vector' of the same Parquet file, or beside it
    (--vectors); a .npy or .safetensors alone is indexed by row number. Neither need fit in memory.
    Example: matryo index build corpus.jsonl.gz --model runs/first --out docs.matryo --metadata section
    """
    from matryo import Index, load

    plan, loaded = plan_text(plan), load(model) if model else None
    given = Documents(documents, vectors if model else ready_vectors(documents, vectors), metadata or [], loaded)
    there = _there(out, resume)
    _check(given)
    width = given.width
    made_by = identity(loaded) if loaded else None
    if not there:
        opened = Index.create(out, width=width, plan=plan, model=made_by, store=store)
    else:
        opened = Index.open(out, model=made_by)
    with opened as index:
        _same_wish(index, width, plan, store, out)
        _fill(index, given, out, given.fingerprint(made_by))
        index.prepare()
        _report(index, as_json, given)


def add_documents(
    index: Place, documents: Source, vectors: Vectors = None, metadata: Metadata = None, as_json: Json = False
) -> None:
    """Add documents to an index, replacing those whose id is there already.

    A document without title and text is left out; if its id was there, it is no longer.
    Example: matryo index add docs.matryo more.jsonl.gz
    """
    from matryo import Index

    ready = ready_vectors(documents, vectors)
    with Index.open(index) as opened:
        given = Documents(documents, ready, metadata or [], None if ready else model_of(opened, index))
        _check(given)
        width = opened.stats()["width"]
        if given.vectors is not None and given.vectors.width != width:
            shape = (given.vectors.rows, given.vectors.width)
            raise InputError(f"{given.vectors.path}: expected (N, {width}) numbers, got shape {shape}")
        _fill(opened, given, index)
        _report(opened, as_json, given)


def delete(index: Place, ids: Annotated[list[str], typer.Argument(help="Ids.")], as_json: Json = False) -> None:
    """Delete documents by id.

    Example: matryo index delete docs.matryo some-id
    """
    from matryo import Index

    with Index.open(index) as opened:
        gone = opened.delete(ids)
    say_json({"deleted": gone}) if as_json else say(f"deleted {gone} of {len(ids)}")


def stats(index: Place, as_json: Json = False) -> None:
    """What an index holds and how many bytes it takes.

    Example: matryo index stats docs.matryo
    """
    from matryo import Index

    with Index.open(index, read_only=True) as opened:
        _report(opened, as_json)


def check(index: Place, as_json: Json = False) -> None:
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
    index: Place,
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
    index: Place,
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
    for stage in hits.explanation or ():
        note(f"{stage.stage}: {stage.considered} considered, {stage.kept} kept, {stage.milliseconds:.2f} ms")
    if hits.promise:
        note(hits.promise)
    note(f"{took:.1f} ms for {len(queries)} queries, encoding aside")


def identity(model: "Model") -> dict[str, Any]:
    """What an index records of the model that made its vectors: where it lay, and a digest of its weights."""
    from matryo.encoders.folder import fingerprint

    return {"name": str(Path(model.name).resolve()) if Path(model.name).is_dir() else model.name} | fingerprint(
        model.name
    )


def model_of(index: "Index", place: str, name: str | None = None) -> "Model":
    """The model that made an index's vectors, or an error if it is not there or not the same any more."""
    from matryo import load

    recorded = index.stats()["model"]
    if not recorded:
        raise InputError(f"{place} was built from ready vectors and names no model; search it with mt.Index in Python")
    model: Model = load(name or recorded["name"])
    found = identity(model)
    if found.get("blake2b") != recorded.get("blake2b"):
        raise InputError(f"{place} was built by another model than {model.name} is now; give --model or build it again")
    return model


def _there(out: str, resume: bool) -> bool:
    """Whether there is an index to go on with; an error, before anything is read, where a new one cannot be made."""
    from matryo import Index
    from matryo.index.index import scheme_of
    from matryo.index.opening import refuse_taken

    if scheme_of(out) is None:
        there = resume and (Path(out) / CATALOGUE).exists()
        if not there:
            refuse_taken(Path(out))
        return there
    try:
        Index.open(out, read_only=True).close()
    except NoIndexError:
        return False
    if not resume:
        raise InputError(f"{out} already holds an index; open it with Index.open, or choose another name")
    return True


def _check(given: Documents) -> None:
    """Read everything once, so that nothing wrong is found after something was written."""
    with bar(None, "checking") as progress:
        given.check(progress.by)


def _same_wish(index: "Index", width: int, plan: str | None, store: str | None, place: str) -> None:
    """Raise where a build that is to go on was begun with other options."""
    from matryo import Plan

    told = index.stats()
    wanted = {"width": width} | ({"store": store} if store else {}) | ({"plan": str(Plan.parse(plan))} if plan else {})
    for name, value in wanted.items():
        if told[name] != value:
            raise InputError(f"{place} was begun with {name} {told[name]}, not {value}; go on with the same options")


def _fill(index: "Index", given: Documents, place: str, source: str | None = None) -> None:
    """Write the documents batch by batch, after those of the same source that are in."""
    start = index.read_from(source) if source else 0

    def written(progress: Any) -> "Iterator[Batch]":
        for batch, left in given.batches(progress.by, start):
            yield batch
            if left and source is None:
                index.delete(left)  # what was there under their ids has lost its text

    try:
        with bar(given.rows, "indexing") as progress:
            progress.by(start)
            index.extend(written(progress), source)
    except KeyboardInterrupt:
        how = "the same command with --resume" if source else "'matryo index add' with the same file"
        raise InterruptedByUserError(
            f"interrupted; {place} holds {len(index)} documents, in whole batches; the rest can follow by {how}"
        ) from None


def _report(index: "Index", as_json: bool, given: Documents | None = None) -> None:
    """What an index holds and, after writing, which documents were left out."""
    found = index.stats()
    if given is not None and given.left_out:
        named = ", ".join(given.left[:3]) + (", ..." if given.left_out > 3 else "")
        note(f"left out, as they have neither title nor text: {given.left_out} documents ({named})")
    if as_json:
        say_json(found if given is None else {**found, "left_out": given.left})
        return
    for name in ("items", "dead_rows", "width", "plan", "store", "generation"):
        if name in found:
            say(f"{name}: {found[name]}")
    if found["model"]:
        say(f"model: {found['model']['name']}")
    if "files" in found:
        say(f"on disk: {sum(found['files'].values()):,} bytes, {found['vector_bytes']:,} of them vectors")
    if "folder_bytes" in found:
        say(f"in the engine: {found['folder_bytes']:,} bytes, {found['segments']} segments")
    if "index_bytes" in found:
        say(f"in the engine: {found['table_bytes']:,} bytes of rows, {sum(found['index_bytes'].values()):,} of indexes")


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
