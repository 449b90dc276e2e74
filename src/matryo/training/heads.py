"""What a loss learned beside the model, in the model folder: `head.safetensors`, and the classes in `matryo.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from matryo.core.errors import DamagedError, InputError
from matryo.core.files import write_atomically
from matryo.encoders.folder import read_card
from matryo.losses import NestedHead
from matryo.training.data import Rows
from matryo.training.objective import NestedObjective

HEAD = "head.safetensors"


def heads_of(objective: NestedObjective) -> dict[str, nn.Module]:
    """The heads of a trained objective by data set."""
    return {name: part.head for name, part in objective.parts.items() if isinstance(part.head, nn.Module)}


def save_heads(folder: Path, heads: Mapping[str, nn.Module]) -> None:
    """Write trained heads, each tensor as `<data set>/<name>`; nothing if there is none."""
    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, head in heads.items()
        for key, value in head.state_dict().items()
    }
    if tensors:
        write_atomically(folder / HEAD, lambda path: save_file(tensors, path))


def describe(objective: NestedObjective, sets: list[Rows]) -> dict[str, Any]:
    """What `matryo.json` says about them: classes in the order of the head's outputs, and learned arguments."""
    found: dict[str, Any] = {}
    for rows in sets:
        part: Any = objective.parts[rows.name]
        if rows.classes:
            found.setdefault("classes", {})[rows.name] = rows.classes
        if part.head is not None:
            found.setdefault("heads", {})[rows.name] = {"tied": part.head.tied, "normalize": part.head.normalize}
        if part.learned:
            found.setdefault("learned", {})[rows.name] = part.learned_values()
    return found


def load_head(folder: str | Path, name: str | None = None) -> tuple[NestedHead, list[str]]:
    """The classifier that a model was trained with, and the classes its outputs stand for.

    Args:
        folder: a model folder trained with `cross_entropy`.
        name: of which data set, if there were several.

    Returns:
        A `matryo.losses.NestedHead` on the CPU, and its C classes in order.

    Raises:
        InputError: the folder holds no such head.
        DamagedError: what it holds cannot be read.
    """
    folder = Path(folder)
    card = read_card(folder)
    heads = card.training.get("heads", {})
    if not (folder / HEAD).is_file() or card.nesting is None or not heads:
        raise InputError(f"{folder} holds no head; train with loss cross_entropy")
    if (name is None and len(heads) > 1) or (name is not None and name not in heads):
        raise InputError(f"{folder} holds heads of {', '.join(heads)}; name one of them, got {name!r}")
    chosen = name or next(iter(heads))
    classes: list[str] = card.training["classes"][chosen]
    head = NestedHead(card.nesting, len(classes), **heads[chosen])
    try:
        tensors = load_file(folder / HEAD)
        mine = {k.removeprefix(f"{chosen}/"): v for k, v in tensors.items() if k.startswith(f"{chosen}/")}
        head.load_state_dict(mine)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DamagedError(f"{folder / HEAD} cannot be read ({error}); restore the folder from a copy") from error
    return head, classes
