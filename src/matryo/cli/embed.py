"""`matryo embed`."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.terminal import InterruptedByUserError, Json, note, say, say_json
from matryo.core.errors import InputError

if TYPE_CHECKING:
    from matryo.bulk import Progress, Ray


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(embed)


def embed(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or 'toy'.")],
    inputs: Annotated[list[Path], typer.Argument(help="Parquet files of texts, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder to make, or to go on in.")],
    width: Annotated[int | None, typer.Option(help="Dimensions to keep; full width if unset.")] = None,
    code: Annotated[str, typer.Option(help="float32, float16, int8 or binary.")] = "float32",
    text: Annotated[list[str] | None, typer.Option(help="Column of texts; repeatable, joined by a space.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Column to copy; repeatable; _id or id if unset.")] = None,
    part_rows: Annotated[int, typer.Option(help="Least rows of a part, in whole row groups.")] = 65_536,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 64,
    bad: Annotated[str, typer.Option(help="A text that the model cannot encode: refuse or skip.")] = "refuse",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    ray: Annotated[str | None, typer.Option(help="On a Ray cluster: local, auto, HOST:PORT, ray://HOST:PORT.")] = None,
    workers: Annotated[int | None, typer.Option(help="With --ray: most workers at a time.")] = None,
    cpus: Annotated[float | None, typer.Option(help="With --ray: processors of a worker (1).")] = None,
    gpus: Annotated[float | None, typer.Option(help="With --ray: GPUs of a worker (0).")] = None,
    as_json: Json = False,
) -> None:
    """Encode Parquet files of any size into a folder of vectors, each row once. The same command goes on after a kill.

    Columns read: title and text (or document), or --text. A row with nothing in them is left out and counted. Each part
    (row groups of one file) becomes one file with the columns row, those kept, and vector; manifest.json has counts and
    checksums.
    Example: matryo embed runs/first corpus/*.parquet --out vectors --width 128 --code int8
    """
    from matryo.bulk import Bulk
    from matryo.bulk import embed as run

    options = Bulk(
        width=width,
        code=code,
        columns=tuple(text) if text else None,
        keep=tuple(keep) if keep else None,
        part_rows=part_rows,
        batch_size=batch_size,
        bad=bad,
        device=device,
    )
    cluster = _cluster(ray, workers=workers, cpus=cpus, gpus=gpus)
    told: list[Progress] = []
    try:
        with redirect_stdout(sys.stderr):  # where Ray says what it lost, which is not the answer
            found = run(model, inputs, out, options, ray=cluster, report=lambda step: _tell(told, step))
    except KeyboardInterrupt:
        done = f"{told[-1].parts} of {told[-1].of} parts are in {out}" if told else "no part is finished"
        raise InterruptedByUserError(f"interrupted; {done}; go on with the same command") from None
    if as_json:
        totals = ("width", "code", "read", "rows", "left_out", "bytes", "checksum")
        say_json({"out": str(out), "parts": len(found["parts"]), **{name: found[name] for name in totals}})
        return
    if found["left_out"]:
        note(f"left out, as there is nothing to encode: {found['left_out']:,} rows ('rows_left_out' in {out}/records)")
    say(f"{out}: {found['rows']:,} vectors of width {found['width']} as {found['code']} in {len(found['parts'])} parts")
    say(f"{found['bytes']:,} bytes, checksum {found['checksum']}")


def _cluster(address: str | None, **more: Any) -> "Ray | None":
    given = {name: value for name, value in more.items() if value is not None}
    if address is None:
        if given:
            raise InputError(f"--{next(iter(given))} is for a cluster; give --ray too, such as --ray local")
        return None
    from matryo.bulk import Ray

    return Ray(address=address, **given)


def _tell(told: "list[Progress]", step: "Progress") -> None:
    """A line a part, or one for each hundredth of a long run."""
    before = told[-1].parts if told else 0
    told[:] = [step]
    if step.of > 100 and 100 * before // step.of == 100 * step.parts // step.of:
        return
    speed = f", {step.rows / step.seconds:,.0f} rows/s" if step.seconds > 1 else ""
    note(f"part {step.parts}/{step.of}: {step.rows:,} of {step.rows_of:,} rows{speed}")
