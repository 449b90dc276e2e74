"""The output folder: what was asked (`job.json`), a record a part, and the manifest that is written when all are there.

vectors/
  job.json                       model, width, code, columns and inputs: a later run must be the same
  part-00000-00000.parquet       one file a part
  records/part-00000-00000.parquet.json
  manifest.json                  every record, rows in all, one checksum in all
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matryo.bulk.encode import RECORDS, Record
from matryo.bulk.options import Bulk
from matryo.bulk.parts import Source
from matryo.core.errors import DamagedError, InputError, NoIndexError
from matryo.core.files import digest, storage_errors, write_text

FORMAT = 1
JOB, MANIFEST = "job.json", "manifest.json"

Manifest = dict[str, Any]


def describe(identity: dict[str, str], sources: Sequence[Source], bulk: Bulk) -> dict[str, Any]:
    """What decides the output: a finished part may be kept only where all of this is the same."""
    return {
        "format": FORMAT,
        "model": identity,
        "width": bulk.width,
        "code": bulk.code,
        "columns": bulk.columns and list(bulk.columns),
        "keep": None if bulk.keep is None else list(bulk.keep),
        "part_rows": bulk.part_rows,
        "batch_size": bulk.batch_size,
        "inputs": [asdict(source) for source in sources],
    }


def refuse_others(out: Path, job: dict[str, Any]) -> None:
    """Raise an InputError if the folder is a file, holds something else, or was begun with another job."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder")
    if (out / JOB).is_file():
        _same(out, _read(out / JOB), job)
    elif out.is_dir() and any(one.name != RECORDS and not one.name.endswith(".tmp") for one in out.iterdir()):
        raise InputError(f"{out} is not empty and not a bulk encoding; choose another folder")


def begin(out: Path, job: dict[str, Any]) -> None:
    """Make the folder and say in it what the job is, unless that is there."""
    with storage_errors(f"creating {out}"):
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    if not (out / JOB).is_file():
        write_text(out / JOB, json.dumps(job, indent=2, ensure_ascii=False) + "\n")


def _same(out: Path, before: dict[str, Any], job: dict[str, Any]) -> None:
    """Raise unless the job that was begun here is this one."""
    changed = [name for name in job if before.get(name) != job[name]]
    if not changed:
        return
    name = changed[0]
    if name == "inputs":
        was, now = ({one["file"]: one for one in found["inputs"]} for found in (before, job))
        gone, new = sorted(was.keys() - now.keys()), sorted(now.keys() - was.keys())
        edited = sorted(file for file in was.keys() & now.keys() if was[file] != now[file])
        said = [f"{what} {files[0]}" for what, files in (("no", gone), ("also", new), ("another", edited)) if files]
        what = f"other inputs ({', '.join(said) or 'in another order'})"
    elif name == "model":
        what = "another model"
    else:
        what = f"{name} {before.get(name)}, not {job[name]}"
    raise InputError(f"{out} was begun with {what}; give what it was begun with, or choose another folder")


def write_manifest(out: Path, job: dict[str, Any], records: Iterable[Record]) -> Manifest:
    """Write what a finished folder holds. No times and no machines: the same job gives the same bytes."""
    parts = sorted(records, key=lambda record: record["name"])
    totals = {name: sum(part[name] for part in parts) for name in ("read", "rows", "left_out", "bytes")}
    whole = {**job, **totals, "checksum": checksum(parts), "parts": parts}
    write_text(out / MANIFEST, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    for folder in (out, out / RECORDS):  # of workers that were killed
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
    return whole


def checksum(parts: Iterable[Record]) -> str:
    """The sum of all parts' BLAKE2b-128 digests modulo 2^128, in hexadecimal: the same in any order."""
    return f"{sum(int(part['blake2b'], 16) for part in parts) % (1 << 128):032x}"


def check(out: str | Path) -> Manifest:
    """Read every part of a finished folder and compare it with the manifest. Needs no model and no pyarrow.

    Returns:
        The manifest: `read` = `rows` + `left_out`, `bytes`, `checksum`, and a record of each of the `parts`.

    Raises:
        NoIndexError: there is no manifest. DamagedError: a part is missing, changed or one too many, or sums disagree.
    """
    out = Path(out)
    if not (out / MANIFEST).is_file():
        raise NoIndexError(f"{out} holds no finished bulk encoding; run 'matryo embed' to its end first")
    found = _read(out / MANIFEST)
    try:
        parts = found["parts"]
        wrong = [part["name"] for part in parts if not (out / part["name"]).is_file()]
        wrong += [
            part["name"]
            for part in parts
            if part["name"] not in wrong
            and ((out / part["name"]).stat().st_size, digest(out / part["name"])) != (part["bytes"], part["blake2b"])
        ]
        wrong += sorted({path.name for path in out.glob("*.parquet")} - {part["name"] for part in parts})
        sums = all(found[name] == sum(part[name] for part in parts) for name in ("read", "rows", "left_out"))
        sums = sums and found["read"] == found["rows"] + found["left_out"] and found["checksum"] == checksum(parts)
        sums = sums and found["read"] == sum(source["rows"] for source in found["inputs"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{out / MANIFEST} cannot be read ({error!r}); run 'matryo embed' again") from error
    if wrong or not sums:
        what = f"{', '.join(wrong[:3])} missing, changed or one too many" if wrong else "the sums of rows disagree"
        raise DamagedError(f"{out}: {what}; the same 'matryo embed' makes again what is not as recorded")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); choose another folder and start anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedError(f"{path} is not of format {FORMAT}, the one this release reads; choose another folder")
    return content
