"""The fairest rivals of a nested model: its own recipe run again for one width alone.

What a model was trained with stands in its card: configuration, seed, and the digest of its pairs. So the rival of each
width, and the un-nested twin (the full width alone), can be made without asking for anything, and differ from the model
in nothing but the nesting.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.files import digest
from matryo.core.prefix import Nesting, check_width
from matryo.encoders import Model, load
from matryo.encoders.folder import CARD

if TYPE_CHECKING:
    from matryo.training import Step, TrainConfig


OTHERWISE = "train for one width with 'matryo train' and name the model that it makes"


class Alone:
    """A model trained for one width alone: it gives vectors of that width and no other."""

    def __init__(self, model: Model, width: int) -> None:
        self.model, self.width, self.name = model, width, model.name
        self.nesting = Nesting([width])

    def encode(self, inputs: Sequence[str]) -> NDArray[Any]:
        """(N, width) unit rows."""
        return self.model.encode(inputs, width=self.width)


def default_folder(model: Model) -> Path:
    """Where rivals are kept unless a folder is given: beside the model's own."""
    folder = Path(model.name)
    return folder.with_name(f"{folder.resolve().name}-alone")


def train_alone(
    model: Model,
    widths: Sequence[int] | None = None,
    out: str | Path | None = None,
    report: "Callable[[int, Step], None] | None" = None,
) -> dict[int, Alone]:
    """Train a model's recipe again for each width alone; give the result to `evaluate(separate=...)`.

    A static encoder made from scratch gets a table of that width. An encoder whose width is given (`base`, or given
    token vectors) keeps it, and only the first `width` dimensions are trained and used.

    Args:
        model: a folder that `train` wrote.
        widths: any of 1..D; the trained ones by default. `[model.width]` gives the un-nested twin.
        out: gets one model folder per width, named by it; `<model folder>-alone` by default. What is there already of
            the same recipe is used again, and an unfinished run goes on.
        report: called with the width in training and its step.

    Returns:
        width -> the model trained for it alone.

    Raises:
        InputError: the model does not say how it was trained; its pairs are gone or have changed; a folder in `out`
            holds something else. Nothing has been trained then.
        MissingExtraError: without the `train` extra.
    """
    recipe = _recipe(model)
    from matryo.training import train
    from matryo.training.trainer import checkpoints

    trained = model.nesting.widths if model.nesting else (model.width,)
    chosen = sorted({check_width(width, model.width) for width in (trained if widths is None else widths)})
    folder = default_folder(model) if out is None else Path(out)
    configs = {width: alone(recipe, width, model.width, folder / str(width)) for width in chosen}
    ready = {width: _finished(config, model) for width, config in configs.items()}
    found = {}
    for width, config in configs.items():
        named = None if report is None else (lambda step, width=width: report(width, step))
        resume = bool(checkpoints(config.out / "checkpoints"))
        found[width] = Alone(ready[width] or train(config, resume=resume, report=named), width)
    return found


def alone(recipe: "TrainConfig", width: int, full: int, out: Path) -> "TrainConfig":
    """The recipe of a nested model of `full` dimensions, for one width alone."""
    from matryo.training import TrainConfig

    changes: dict[str, Any] = {"out": out, "widths": (width,), "weights": None, "sample_widths": None}
    if recipe.best != "last":
        changes["best"] = "mean"
    trained, count = recipe.nesting(full).widths, 1
    if recipe.base is None and recipe.static.vectors is None:
        changes["static"] = recipe.static.model_copy(update={"width": width})
    elif width < full:
        count = 2
        changes |= {"widths": (width, full), "weights": (1.0, 0.0)}
        if recipe.dev and recipe.best != "last":
            changes["best"] = width
    place = next(n for n, w in enumerate(trained) if w >= width)
    if isinstance(recipe.temperature, tuple):
        mine = recipe.temperature[place]
        changes["temperature"] = mine if count == 1 else (mine,) * count
    changes["loss_args"] = _at_width(recipe.loss, recipe.loss_args, place, count)
    changes["data"] = tuple(
        one.model_copy(update={"loss_args": _at_width(one.loss, one.loss_args, place, count)}) for one in recipe.data
    )
    return TrainConfig(**{**dict(recipe), **changes})


def _at_width(loss: str, arguments: dict[str, Any], place: int, count: int) -> dict[str, Any]:
    """Arguments of a loss that has one value per width, for `count` widths that all take the value in one place."""
    from matryo.training.objectives import recipe

    return {name: recipe(loss).at(name, value, [place] * count) for name, value in arguments.items()}


def _recipe(model: Model) -> "TrainConfig":
    """What a model was trained with, its pairs unchanged since."""
    training = model.card.training
    rows = _rows(model)
    if not isinstance(training.get("config"), dict) or not rows:
        raise InputError(f"{model.name} does not say how it was trained; {OTHERWISE}")
    from matryo.training import TrainConfig

    recipe = TrainConfig(**{**training["config"], "out": Path(model.name)})
    for one, record in zip(recipe.sets(), rows.values(), strict=True):
        if not one.path.is_file():
            raise InputError(f"{model.name} was trained on {one.path}, which is not there; put it back, or {OTHERWISE}")
        if digest(one.path) != record.get("blake2b"):
            raise InputError(
                f"{one.path} has changed since {model.name} was trained on it; put it back, or {OTHERWISE}"
            )
    return recipe


def _rows(model: Model) -> dict[str, Any]:
    """What identifies each file of rows that a model was trained on."""
    training = model.card.training
    rows = training.get("data", {"pairs": training.get("pairs")})
    known = isinstance(rows, dict) and all(isinstance(record, dict) for record in rows.values())
    return rows if known else {}


def _finished(config: "TrainConfig", model: Model) -> Model | None:
    """The model in `config.out` if it is there and of this very recipe; None if it has to be trained."""
    if not (config.out / CARD).is_file():
        return None
    found = load(config.out)
    recorded = {**found.card.training.get("config", {}), "out": config.out}
    if _rows(found) != _rows(model) or type(config)(**recorded) != config:
        raise InputError(f"{config.out} holds a model of another recipe than {model.name}'s; choose another folder")
    return found
