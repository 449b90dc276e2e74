"""`matryo train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.terminal import InterruptedByUserError, Json, bar, note, say, say_json
from matryo.core.errors import InputError

if TYPE_CHECKING:
    from matryo.training import Step


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(train)


def numbers(text: str | None, kind: type[Any] = int, what: str = "widths") -> tuple[Any, ...] | None:
    """A comma-separated list of numbers."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"--{what} takes numbers separated by commas, got {text!r}; for example 64,128,256") from error


def train(
    pairs: Annotated[Path | None, typer.Argument(help="Pairs: .parquet, .jsonl[.gz], .csv or .tsv.")] = None,
    out: Annotated[Path | None, typer.Option(help="Model folder to write.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options; options given here win.")] = None,
    base: Annotated[str | None, typer.Option(help="Model folder or hub name to start from.")] = None,
    widths: Annotated[str | None, typer.Option(help="Widths to train, such as 64,128,256.")] = None,
    weights: Annotated[str | None, typer.Option(help="One weight per width.")] = None,
    dim: Annotated[int | None, typer.Option(help="Full width of a new static encoder.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Retrieval folder, STS file or pairs file to measure on.")] = None,
    dev_split: Annotated[str | None, typer.Option(help="Judgements of a retrieval folder.")] = None,
    best: Annotated[
        str | None, typer.Option(help="Keep the checkpoint best at this width, by 'mean', or 'last'.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the pairs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    temperature: Annotated[str | None, typer.Option(help="One, or one per width.")] = None,
    symmetric: Annotated[bool | None, typer.Option(help="Contrast both ways.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Checkpoint and measure every so many steps.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a nested model on pairs.

    Example: matryo train pairs.jsonl.gz --out runs/first --widths 32,64,128,256 --dev dev-set/
    """
    from matryo.training import TrainConfig
    from matryo.training import train as run

    taus = numbers(temperature, float, "temperature")
    given: dict[str, Any] = {
        "pairs": pairs, "out": out, "base": base, "dev": dev, "dev_split": dev_split, "epochs": epochs,
        "batch_size": batch_size, "learning_rate": learning_rate, "symmetric": symmetric, "save_steps": save_steps,
        "max_steps": max_steps, "seed": seed, "device": device, "widths": numbers(widths),
        "weights": numbers(weights, float, "weights"), "temperature": taus[0] if taus and len(taus) == 1 else taus,
        "best": int(best) if best and best.isdecimal() else best, "static": None if dim is None else {"width": dim},
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = TrainConfig.from_yaml(config, **chosen) if config else TrainConfig(**chosen)
    with bar(None, "training") as progress:

        def report(step: "Step") -> None:
            if step.losses:
                note(f"step {step.step}/{step.steps} loss " + _by_width(step.losses))
            if step.scores:
                scores = {int(k.removeprefix("width_")): v for k, v in step.scores.items() if k != "mean"}
                note(f"step {step.step}/{step.steps} dev {_by_width(scores)} mean {step.scores['mean']:.4f}")
            progress.to(step.step, step.steps)

        try:
            model = run(settings, resume=resume, report=report)
        except KeyboardInterrupt:
            raise InterruptedByUserError(
                f"interrupted; finished steps are kept in {settings.out}, go on with the same command and --resume"
            ) from None
    assert model.nesting is not None
    if as_json:
        say_json({"model": str(settings.out), "widths": model.nesting.widths, "scores": model.card.scores})
    else:
        say(f"{settings.out}: a nested model of widths {', '.join(map(str, model.nesting.widths))}")


def _by_width(values: dict[int, float]) -> str:
    return " ".join(f"{width}:{value:.4f}" for width, value in values.items())
