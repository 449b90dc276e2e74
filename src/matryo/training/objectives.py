"""Losses by name: what rows each one needs, and which arguments it takes, read off its signature."""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, cast, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from matryo import losses
from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.training.user_losses import imported

Kind = Literal["pairs", "triplets", "lists", "labelled", "scored", "texts"]
TEMPERATURES = {"temperature", "teacher_temperature"}
OWN = {"nesting", "per_width", "group", "ignore", "targets", "chunk", "capacity"}
"""Arguments that the trainer gives a loss, or that change nothing but speed."""


@dataclass(frozen=True)
class Recipe:
    """A loss that the trainer knows by name."""

    rows: Kind
    function: Any
    """Its name in `matryo.losses`; or itself."""
    other_rows: bool = True
    """Whether a row's term depends on the other rows of the batch, so that processes have to gather theirs."""
    by_label: bool = False
    """Whether batches need several rows of each class."""
    teacher: bool = False
    """Whether it learns from the vectors of another model."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Arguments that it passes on, and their types."""
    head: dict[str, Any] = field(default_factory=dict)
    """Arguments of the classifier that is trained with it, and their types."""

    @property
    def call(self) -> Any:
        """The function."""
        return getattr(losses, self.function) if isinstance(self.function, str) else self.function

    @property
    def signature(self) -> Mapping[str, Any]:
        """The function's parameters by name."""
        return inspect.signature(self.call).parameters

    def arguments(self) -> dict[str, Any]:
        """Argument -> its type, of everything a user may set."""
        own = {
            name: parameter.annotation
            for name, parameter in self.signature.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in OWN
        }
        learned = {"learn": tuple[str, ...]} if any(_takes_tensor(kind) for kind in own.values()) else {}
        return {name: _without_tensors(kind) for name, kind in own.items()} | self.extra | self.head | learned

    def learnable(self) -> list[str]:
        """Arguments that may be tensors with a gradient: those of one value, or one per width."""
        return [name for name, parameter in self.signature.items() if name not in OWN and _option_tensor(parameter)]

    def nestings(self) -> list[str]:
        """Arguments that are widths of the teacher."""
        return [name for name, p in self.signature.items() if name not in OWN and Nesting in _members(p.annotation)]

    def at(self, name: str, value: Any, places: Sequence[int]) -> Any:
        """The value of an argument for some of the widths, by their places: what holds for all widths as it is."""
        if isinstance(value, Mapping):
            return {code: [each[n] for n in places] if _is_list(each) else each for code, each in value.items()}
        per_width = name in self.learnable() or name in self.nestings()
        return [value[n] for n in places] if per_width and _is_list(value) else value


BOTH_WAYS = {"symmetric": bool}
HEAD = {"tied": bool, "normalize": bool}
RECIPES: dict[str, Recipe] = {
    "info_nce": Recipe("pairs", "nested_info_nce"),
    "quantised_info_nce": Recipe("pairs", "nested_quantised_info_nce", extra=BOTH_WAYS),
    "guided_info_nce": Recipe("pairs", "nested_guided_info_nce", teacher=True, extra=BOTH_WAYS),
    "sigmoid": Recipe("pairs", "nested_sigmoid"),
    "triplet": Recipe("triplets", "nested_triplet", other_rows=False),
    "cosent": Recipe("scored", "nested_cosent"),
    "angle": Recipe("scored", "nested_angle"),
    "online_contrastive": Recipe("scored", "nested_online_contrastive"),
    "cross_entropy": Recipe("labelled", "nested_cross_entropy", other_rows=False, head=HEAD),
    "multi_similarity": Recipe("labelled", "nested_multi_similarity", by_label=True),
    "supcon": Recipe("labelled", "nested_supcon", by_label=True),
    "distill": Recipe("texts", "nested_distill", teacher=True),
    "margin_mse": Recipe("triplets", "nested_margin_mse", other_rows=False, teacher=True),
    "kl": Recipe("lists", "nested_kl", other_rows=False, teacher=True),
}
"""Every loss by the name that `TrainConfig(loss=...)` and `--loss` take."""


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def recipe(name: str) -> Recipe:
    """The loss of this name."""
    if ":" in name:
        kind, function = imported(name)
        return Recipe(cast(Kind, kind), function)
    if name not in RECIPES:
        raise InputError(f"unknown loss {name!r}; use one of {', '.join(RECIPES)}, or package.module:function")
    return RECIPES[name]


def check_arguments(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with every value of its argument's type.

    Raises:
        InputError: an argument the loss does not take, or a value that is not of its type; says what is allowed.
    """
    allowed = recipe(name).arguments()
    checked = {}
    for key, value in given.items():
        if key not in allowed:
            raise InputError(f"loss {name!r} has no argument {key!r}; allowed: {', '.join(allowed) or 'none'}")
        try:
            kind: Any = TypeAdapter(allowed[key], config=ConfigDict(arbitrary_types_allowed=True))
            checked[key] = kind.validate_python([value] if key == "learn" and isinstance(value, str) else value)
        except ValidationError as error:
            said = " or ".join(dict.fromkeys(str(e["msg"]).removeprefix("Input should be ") for e in error.errors()))
            raise InputError(f"loss {name!r}: {key} should be {said}, got {value!r}") from error
    for key in TEMPERATURES & checked.keys():
        each = checked[key] if _is_list(checked[key]) else [checked[key]]
        if not all(0 < value < math.inf for value in each if isinstance(value, (int, float))):
            raise InputError(f"loss {name!r}: {key} must be finite and above 0, got {checked[key]}; 0.05 is usual")
    can = recipe(name).learnable()
    for learned in checked.get("learn", ()):
        if learned not in can:
            raise InputError(f"loss {name!r} cannot learn {learned!r}; it can learn {', '.join(can)}")
    return checked


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _takes_tensor(kind: Any) -> bool:
    return Tensor in _members(kind)


def _option_tensor(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.KEYWORD_ONLY and _takes_tensor(parameter.annotation)


def _without_tensors(kind: Any) -> Any:
    """The type without what a configuration file cannot hold: tensors; a nesting is given as its widths."""
    if kind is inspect.Parameter.empty:
        return Any
    kept = [tuple[int, ...] if member is Nesting else member for member in _members(kind) if member is not Tensor]
    return Union[tuple(kept)]  # noqa: UP007 - the members are only known here
