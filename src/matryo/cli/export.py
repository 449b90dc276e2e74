"""`matryo export`."""

from pathlib import Path
from typing import Annotated

import typer

from matryo.cli.terminal import Json, say, say_json
from matryo.core.errors import InputError


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(export)


def export(
    model: Annotated[str, typer.Argument(help="Transformer: a model folder or hub name.")],
    onnx: Annotated[Path | None, typer.Option(help="Folder to make, for onnxruntime.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise weights per channel; needs --texts.")] = False,
    texts: Annotated[Path | None, typer.Option(help="Texts to judge int8 by, one a line, 100 or more.")] = None,
    floor: Annotated[float, typer.Option(help="Least share of 10 neighbours int8 must keep.")] = 0.9,
    as_json: Json = False,
) -> None:
    """Write a transformer so that it runs without torch, its vectors checked against the model's.

    Example: matryo export runs/minilm --onnx runs/minilm-onnx
    """
    from matryo.encoders.export import export_onnx

    if onnx is None:
        raise InputError("say what to write: --onnx FOLDER")
    if texts is not None and not texts.is_file():
        raise InputError(f"{texts}: no such file")
    judges = [line for line in texts.read_text().splitlines() if line.strip()] if texts else []
    found = export_onnx(model, onnx, int8=int8, texts=judges, floor=floor)
    if as_json:
        say_json(found)
        return
    size, most = f"{found['bytes'] / 1e6:.1f} MB", f"{found['difference']:.1e}"
    say(f"{onnx}: {size}, {found['precision']}; vectors at full precision differ by {most} at most")
    if int8:
        say(f"int8 keeps {found['overlap']:.3f} of the 10 nearest neighbours at width {found['width']}")
