"""`matryo demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matryo.cli.terminal import bar, say

if TYPE_CHECKING:
    from matryo.training import Step


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for models, index and page.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train, measure, index and search the bundled Debian package descriptions. About a minute and a half on two cores.

    Example: matryo demo --out runs/demo
    """
    from matryo.demo import demo as run

    with bar(None, "training") as progress:

        def report(name: str, step: "Step") -> None:
            if step.scores:
                at = " ".join(f"{k.removeprefix('width_')}:{v:.3f}" for k, v in step.scores.items() if k != "mean")
                say(f"  {name} step {step.step}/{step.steps} dev nDCG@10 {at}")
            progress.to(step.step, step.steps, f"training {name}")

        run(out, say, report, seed)
