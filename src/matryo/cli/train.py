"""`matryo train`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.pictures import holds_pictures, train_pictures
from matryo.cli.terminal import InterruptedByUserError, Json, bar, note, say, say_json
from matryo.core.errors import InputError

if TYPE_CHECKING:
    from matryo.encoders import Model
    from matryo.training import Step, TrainConfig


OPTIONS = {
    "loss-arg": "NAME=VALUE, for example temperature=0.05",
    "data": "a file, or a mapping such as '{path: sts.jsonl, loss: cosent, weight: 0.5}'",
    "picture": "a mapping such as '{size: 32, pooling: avg}'",
    "depths": "layers such as 2,4,6, 'all', or a mapping such as '{depths: [3, 6], sample: 2}'",
    "lora": "a rank, or a mapping such as '{r: 16, alpha: 32, target_modules: [query, value]}'",
}


TASKS = {"classify": "cross_entropy", "contrast": "supcon"}


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


def mapping(text: str, option: str) -> Any:
    """An option's value as YAML reads it: a number, a word, or a mapping in braces."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--{option} takes {OPTIONS[option]}, got {text!r}") from error


def loss_arguments(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` of every --loss-arg."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--loss-arg takes {OPTIONS['loss-arg']}, got {text!r}")
        found[name] = mapping(value, "loss-arg")
    return found


def data_sets(given: list[str]) -> tuple[Any, ...]:
    """Every --data: a path, or a mapping."""
    read = [mapping(text, "data") if text.lstrip().startswith("{") else {"path": text} for text in given]
    for text, found in zip(given, read, strict=True):
        if not isinstance(found, dict):
            raise InputError(f"--data takes {OPTIONS['data']}, got {text!r}")
    return tuple(read)


def train(
    pairs: Annotated[Path | None, typer.Argument(help="Rows: .parquet, .jsonl[.gz], .csv or .tsv.")] = None,
    out: Annotated[Path | None, typer.Option(help="Model folder to write.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options; options given here win.")] = None,
    base: Annotated[str | None, typer.Option(help="Model folder or hub name to start from.")] = None,
    widths: Annotated[str | None, typer.Option(help="Widths to train, such as 64,128,256.")] = None,
    weights: Annotated[str | None, typer.Option(help="One weight per width.")] = None,
    dim: Annotated[int | None, typer.Option(help="Full width of a new static encoder.")] = None,
    task: Annotated[
        str | None, typer.Option(help="classify or contrast: labelled texts, or pictures (a folder of class folders).")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(help="Of pictures: '{size: 32, pooling: avg, model_type: resnet, bad: refuse}'.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="Name of the loss (info_nce), or package.module:function.")] = None,
    loss_arg: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the loss; repeat for more.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model that the loss learns from, or its vectors.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="In place of the rows, several: a file or '{path: ..., loss: ..., weight: ...}' each."),
    ] = None,
    mixing: Annotated[str | None, typer.Option(help="Batches of several data sets: proportional, round_robin.")] = None,
    no_duplicates: Annotated[bool | None, typer.Option(help="No text twice in a batch.")] = None,
    neighbours: Annotated[bool | None, typer.Option(help="Batches of rows near each other, by the teacher.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Retrieval folder, STS file or pairs file to measure on.")] = None,
    dev_split: Annotated[str | None, typer.Option(help="Judgements of a retrieval folder.")] = None,
    best: Annotated[
        str | None, typer.Option(help="Keep the checkpoint best at this width, by 'mean', or 'last'.")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many measurements without a better one.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the rows; 0 only turns the base.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step, of all processes together.")] = None,
    mini_batch_size: Annotated[int | None, typer.Option(help="Rows embedded at a time (GradCache).")] = None,
    sample_widths: Annotated[int | None, typer.Option(help="Widths trained per step, drawn anew.")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Layers to train too: 2,4,6 or 'all', or '{depths: [3, 6], sample: 2}'.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Start from these layers of the base, such as 1,3,6.")] = None,
    lora: Annotated[str | None, typer.Option(help="Rank of adapters, or '{r: 16, alpha: 32}'.")] = None,
    rotate: Annotated[str | None, typer.Option(help="Turn the base's vectors first: learned, pca or none.")] = None,
    blend: Annotated[float | None, typer.Option(help="Share of the trained weights; the rest is the base's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Peak rate of what a loss learns itself.")] = None,
    temperature: Annotated[str | None, typer.Option(help="One, or one per width.")] = None,
    symmetric: Annotated[bool | None, typer.Option(help="Contrast both ways.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of products in training: float32 or bfloat16.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of all steps in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    metric: Annotated[str | None, typer.Option(help="Retrieval metric on the dev set.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Checkpoint and measure every so many steps.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    user_code: Annotated[
        bool, typer.Option("--user-code", help="Allow losses named package.module:function, and import them.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a nested model on pairs, triplets, labelled texts or scored pairs.

    Example: matryo train pairs.jsonl.gz --out runs/first --widths 32,64,128,256 --dev dev-set/
    """
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("config", "resume", "as_json", "user_code", "task", "picture"):
        given.pop(name, None)
    if task is not None and task not in TASKS:
        raise InputError(f"--task must be {' or '.join(TASKS)}, got {task!r}")
    if task is not None and pairs is not None and holds_pictures(pairs):
        given |= {"config": config} if config else {}
        train_pictures(given, TASKS[task], mapping(picture, "picture") if picture else {}, resume, as_json)
        return
    if picture is not None:
        raise InputError("--picture is for pictures: give --task, and a folder of class folders or a column 'image'")
    if task is not None:
        given.setdefault("loss", TASKS[task])
    with _allowing(user_code):
        settings = _settings(given, config)
        model = _run(settings, resume)
    if model is None:
        return
    assert model.nesting is not None
    if as_json:
        say_json({"model": str(settings.out), "widths": model.nesting.widths, "scores": model.card.scores})
    else:
        say(f"{settings.out}: a nested model of widths {', '.join(map(str, model.nesting.widths))}")


def _allowing(user_code: bool) -> AbstractContextManager[None]:
    if not user_code:
        return nullcontext()
    from matryo.training import user_code as allowing

    return allowing()


def _settings(given: dict[str, Any], config: Path | None) -> "TrainConfig":
    """The options as a checked configuration."""
    from matryo.training import TrainConfig

    taus = numbers(given.pop("temperature", None), float, "temperature")
    made = {
        "widths": numbers(given.pop("widths", None)),
        "weights": numbers(given.pop("weights", None), float, "weights"),
        "temperature": taus[0] if taus and len(taus) == 1 else taus,
        "static": {"width": given.pop("dim")} if "dim" in given else None,
        "loss_args": loss_arguments(given.pop("loss_arg", [])) or None,
        "data": data_sets(given.pop("data", [])) or None,
        "depths": _depths(given.pop("depths", None)),
        "layers": numbers(given.pop("layers", None), what="layers"),
        "lora": mapping(given.pop("lora"), "lora") if "lora" in given else None,
    }
    if str(given.get("best", "")).isdecimal():
        made["best"] = int(given.pop("best"))
    chosen = given | {name: value for name, value in made.items() if value is not None}
    return TrainConfig.from_yaml(config, **chosen) if config else TrainConfig(**chosen)


def _depths(text: str | None) -> Any:
    """A list of layers, 'all', or a mapping."""
    if text is None or text == "all":
        return text
    return mapping(text, "depths") if text.lstrip().startswith("{") else numbers(text, what="depths")


def _run(settings: "TrainConfig", resume: bool) -> "Model | None":
    """Train, with progress on standard error; None on every process but the first."""
    from matryo.training import processes
    from matryo.training import train as run

    with bar(None, "training") as progress:

        def report(step: "Step") -> None:
            if step.losses:
                of = f"{step.data} " if step.data else ""
                note(f"step {step.step}/{step.steps} {of}loss " + _by_width(step.losses))
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
    first = processes.is_main()
    processes.leave()
    return model if first else None


def _by_width(values: dict[int, float]) -> str:
    return " ".join(f"{width}:{value:.4f}" for width, value in values.items())
