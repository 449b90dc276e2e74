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
    depth: Annotated[
        int | None, typer.Option(help="With --out: layers to keep, in a folder of sentence-transformers.")
    ] = None,
    code: Annotated[str | None, typer.Option(help="With --out: int8 (if unset), float16 or float32.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts to judge by, one a line, 100 or more.")] = None,
    floor: Annotated[float, typer.Option(help="Least share of 10 neighbours int8 weights must keep.")] = 0.9,
    as_json: Json = False,
) -> None:
    """Write a smaller or quicker form of a model, its vectors checked against the model's.

    For a server or a device it runs without torch; with fewer layers (--depth) it stays a sentence-transformers folder.

    Example: matryo export runs/minilm --onnx runs/minilm-onnx
    Example: matryo export runs/first --width 64 --code int8 --out runs/first-small
    Example: matryo export runs/2d --depth 3 --width 192 --out runs/2d-3-192
    """
    if texts is not None and not texts.is_file():
        raise InputError(f"{texts}: no such file")
    judges = [line for line in texts.read_text().splitlines() if line.strip()] if texts else []
    if depth is not None:
        if out is None or onnx is not None or int8 or code is not None:
            raise InputError(
                "--depth writes a sentence-transformers folder: give --out FOLDER, and --width for fewer dimensions; "
                "export that folder with --onnx, or with --width and --code, in a second step"
            )
        found, lines = _lower(model, out, depth=depth, width=width, texts=judges)
    elif out is not None and onnx is None:
        if int8 or width is None:
            raise InputError("--out needs --width, and says its code by --code int8")
        found, lines = _small(model, out, width=width, code=code or "int8", texts=judges, floor=floor)
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


def _lower(model: str, out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    from matryo.encoders.smaller import export_smaller

    found = export_smaller(model, out, **options)
    size, kept = f"{found['bytes'] / 1e6:.1f} MB", f"{found['depth']} of {found['layers']} layers"
    return found, [
        f"{out}: {kept}, width {found['width']}, {size}; {found['speedup']:.2f}x as quick as the whole model; vectors "
        f"differ by {found['difference']:.1e} at most from the model's at that depth and width"
    ]


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
        left = f", {found['float32_products']} products left in float32" if found["float32_products"] else ""
        lines.append(f"int8 keeps {found['overlap']:.3f} of the 10 nearest neighbours at width {found['width']}{left}")
    return found, lines
