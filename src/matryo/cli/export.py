"""`matryo export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from matryo.cli.terminal import Json, say, say_json
from matryo.core.errors import InputError


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(export)


def export(
    model: Annotated[str, typer.Argument(help="A model folder or hub name.")],
    onnx: Annotated[Path | None, typer.Option(help="Folder to make, for a server with onnxruntime.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With --onnx: quantise weights; needs --texts.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to make, for a small device.")] = None,
    width: Annotated[int | None, typer.Option(help="With --out: dimensions to keep.")] = None,
    code: Annotated[str, typer.Option(help="With --out: int8, float16 or float32.")] = "int8",
    texts: Annotated[Path | None, typer.Option(help="Texts to judge by, one a line, 100 or more.")] = None,
    floor: Annotated[float, typer.Option(help="Least share of 10 neighbours int8 weights must keep.")] = 0.9,
    as_json: Json = False,
) -> None:
    """Write a model so that it runs without torch, its vectors checked against the model's.

    Example: matryo export runs/minilm --onnx runs/minilm-onnx
    Example: matryo export runs/first --width 64 --code int8 --out runs/first-small
    """
    if texts is not None and not texts.is_file():
        raise InputError(f"{texts}: no such file")
    judges = [line for line in texts.read_text().splitlines() if line.strip()] if texts else []
    if out is not None and onnx is None:
        if int8 or width is None:
            raise InputError("--out needs --width, and says its code by --code int8")
        found, lines = _small(model, out, width=width, code=code, texts=judges, floor=floor)
    elif onnx is not None and out is None:
        if width is not None:
            raise InputError("--width goes with --out; a server cuts to any width by itself")
        found, lines = _server(model, onnx, int8=int8, texts=judges, floor=floor)
    else:
        raise InputError("say what to write: --onnx FOLDER for a server, or --out FOLDER for a small device")
    if as_json:
        say_json(found)
        return
    for line in lines:
        say(line)


def _small(model: str, out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    from matryo.encoders.edge import export_edge

    found = export_edge(model, out, **options)
    quality = found["quality"]
    size, speed = f"{found['bytes'] / 1e6:.2f} MB", f"{found['milliseconds']['a_text']:.3f} ms a text"
    lines = [f"{out}: {size}, {speed}, cosine with the model's own prefix at least {quality['cosine_least']:.4f}"]
    if "neighbours_of_full_width" in quality:
        lines.append(f"keeps {quality['neighbours_of_full_width']:.3f} of the 10 nearest neighbours at full width")
    return found, lines


def _server(model: str, onnx: Path, *, int8: bool, **options: Any) -> tuple[dict[str, Any], list[str]]:
    from matryo.encoders.export import export_onnx

    found = export_onnx(model, onnx, int8=int8, **options)
    size, most = f"{found['bytes'] / 1e6:.1f} MB", f"{found['difference']:.1e}"
    lines = [f"{onnx}: {size}, {found['precision']}; vectors at full precision differ by {most} at most"]
    if int8:
        lines.append(f"int8 keeps {found['overlap']:.3f} of the 10 nearest neighbours at width {found['width']}")
    return found, lines
