"""Losses of one's own by name: `package.module:function`, imported only where the caller has allowed it.

A configuration may come from elsewhere: a YAML file, the card of a model. Importing what it names would run code of its
choice, so nothing inside a configuration can allow it.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from matryo.core.errors import InputError
from matryo.losses import nested

_ALLOWED: ContextVar[bool] = ContextVar("user_code", default=False)

KINDS = {(2, ""): "pairs", (3, ""): "triplets", (1, "labels"): "labelled", (2, "scores"): "scored"}
"""Columns that a loss takes by place, and what comes after them -> the rows it is trained on."""


@contextmanager
def user_code() -> Iterator[None]:
    """Inside this block a loss may be named `package.module:function`, and naming it imports it.

    The function is un-nested: (B, d) unit prefixes of each column, then `labels` or `scores` (B,), to a scalar or
    several; or it takes `nesting` and `per_width` by name, like those of `matryo.losses`. Two columns are trained on
    pairs (the second holds the positives and any hard negatives, (N, d)), three on triplets, one with `labels` on
    labelled rows, two with `scores` on scored pairs. Its keyword-only arguments are what `loss_args` sets. `group`, if
    it takes it, holds the groups of pairs that are not each other's negatives.

    On several processes it sees the rows of all, so its value must not depend on which process it is on.
    """
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def imported(name: str) -> tuple[str, Any]:
    """The kind of rows that the loss of this name takes, and the loss in its nested form.

    Raises:
        InputError: it was not allowed, cannot be imported, or takes what no data set has.
    """
    if not _ALLOWED.get():
        raise InputError(
            f"loss {name!r} is code, and code is imported only if you allow it: give --user-code, or in Python name it "
            "inside `with matryo.training.user_code():`"
        )
    module, _, function = name.partition(":")
    try:
        loss: Any = getattr(importlib.import_module(module), function)
        signature = inspect.signature(loss, eval_str=True)
    except (ImportError, AttributeError, TypeError, ValueError, NameError) as error:
        raise InputError(
            f"loss {name!r} cannot be imported ({error}); write package.module:function, with its folder in PYTHONPATH"
        ) from error
    places = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    beside = next((word for word in ("labels", "scores") if places and places[-1].startswith(word)), "")
    kind = KINDS.get((len(places) - bool(beside), beside))
    if kind is None:
        raise InputError(
            f"loss {name!r} takes ({', '.join(places)}); allowed: two columns, three, one and labels, or two and "
            "scores; options go after a *"
        )

    @functools.wraps(loss)
    def call(*columns: Any, nesting: Any, per_width: bool, group: Any = None, **options: Any) -> Any:
        if "group" in signature.parameters:
            options["group"] = group
        if "nesting" in signature.parameters:
            return loss(*columns, nesting=nesting, per_width=per_width, **options)
        return nested(loss, nesting)(*columns, per_width=per_width, **options)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return kind, call
