"""Amounts as people write them: 2GB, 5ms, 100M, 120s."""

import re
from typing import Any

from matryo.core.errors import InputError

UNITS: dict[str, dict[str, float]] = {
    "memory": {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    "latency": {"": 1, "US": 1e-3, "MS": 1, "S": 1e3},
    "items": {"": 1, "K": 1e3, "M": 1e6, "B": 1e9},
    "budget": {"": 1, "MS": 1e-3, "S": 1, "MIN": 60, "H": 3600},
}
"""What each unit is in bytes, milliseconds, items and seconds."""
EXAMPLES = {"memory": "2GB", "latency": "5ms", "items": "100M", "budget": "120s"}


def amount(name: str, value: Any) -> float:
    """A number above 0 from a number, in the unit above, or from text with a unit."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", str(value))
    unit = found[2].upper() if found else "?"
    if isinstance(value, bool) or found is None or unit not in UNITS[name] or not 0 < float(found[1]) < float("inf"):
        raise InputError(
            f"{name} must be a number above 0, with one of the units {', '.join(u for u in UNITS[name] if u)} if any, "
            f"such as {EXAMPLES[name]}; got {value!r}"
        )
    return float(found[1]) * UNITS[name][unit]


def size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g} bytes"


def span(seconds: float) -> str:
    """Seconds for people."""
    for unit, factor in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.2g} {unit}" if seconds < 100 * factor else f"{seconds / factor:.0f} {unit}"
    return f"{seconds:.2g} s"
