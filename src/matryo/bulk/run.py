"""A whole run: check everything, cut, encode the parts here or on a cluster, write the manifest."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from matryo.bulk.cluster import Ray, joined
from matryo.bulk.encode import Record, encode_part, identity_of
from matryo.bulk.job import Manifest, begin, describe, refuse_others, write_manifest
from matryo.bulk.options import Bulk
from matryo.bulk.parts import Part, cut, input_files, pyarrow_or_raise
from matryo.core.errors import InputError
from matryo.core.prefix import check_width
from matryo.encoders import load

if TYPE_CHECKING:
    from matryo.encoders import Model


@dataclass(frozen=True)
class Progress:
    """How far a run is, told after every part."""

    part: Record
    parts: int
    """Parts that are there, this one among them."""
    of: int
    rows: int
    """Rows read for those parts, in this run or before."""
    rows_of: int
    seconds: float
    """Since the first part of this run was begun."""


def embed(
    model: str | Path,
    inputs: Iterable[str | Path],
    out: str | Path,
    options: Bulk | None = None,
    *,
    ray: Ray | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Encode Parquet files of texts into a folder of Parquet files of vectors, each row exactly once.

    The same call goes on where a killed one stopped: a part whose file is there with the right digest is kept. Without
    `ray` the parts are encoded here one after the other; with it by workers of a Ray cluster, each with one model. The
    files are the same byte for byte where the model gives the same vectors on the same kind of machine. Workers read
    and write the paths given here themselves, so all machines need to see the same files.

    Args:
        model: name as `matryo.load` takes it. Workers load it themselves.
        inputs: Parquet files, or folders of them.
        out: folder to make, or of the same job begun before.
        options: width, code, columns and so on.
        ray: which cluster to use.
        report: hears of every finished part.

    Returns:
        The manifest (see `check`). A row whose text is null or blank has nothing to encode: it is left out and counted.

    Raises:
        InputError: something about model, inputs or folder does not fit; nothing is written then. Or a text that the
            model cannot encode, named by file and row; finished parts stay.
        StorageError: the disk refused; finished parts stay. UnavailableError: the cluster is not there, or no longer.
    """
    name = str(model)
    bulk, out = options or Bulk(), Path(out).absolute()
    pyarrow_or_raise()
    paths = input_files(inputs)
    loaded = load(name, "cpu" if ray else bulk.device)
    if getattr(loaded.encoder, "modality", "text") != "text":
        raise InputError(f"{name} encodes pictures; bulk encoding reads texts")
    bulk = replace(bulk, width=loaded.width if bulk.width is None else check_width(bulk.width, loaded.width))
    loaded.encode([], width=bulk.width, code=bulk.code)  # refuses a width or code that it does not have
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    identity = identity_of(loaded, name, bulk)
    sources, parts = cut(paths, bulk)
    job = describe(identity, sources, bulk)
    refuse_others(out, job)
    with ExitStack() as stack:
        start = partial(_here, loaded) if ray is None else stack.enter_context(joined(ray))
        begin(out, job)
        records: dict[str, Record] = {}
        clock, rows, of = time.perf_counter(), 0, sum(source.rows for source in sources)
        for record in start(name, identity, parts, bulk, out):
            records[record["name"]] = record
            rows += record["read"]
            if report:
                report(Progress(record, len(records), len(parts), rows, of, time.perf_counter() - clock))
    assert records.keys() == {part.name for part in parts}, "a part is missing or one too many"
    return write_manifest(out, job, records.values())


def _here(
    model: "Model", name: str, identity: dict[str, str], parts: Sequence[Part], bulk: Bulk, out: Path
) -> Iterator[Record]:
    for part in parts:
        yield encode_part(model, identity, part, bulk, out)
