"""What to make of a corpus, checked at construction."""

from dataclasses import dataclass

from matryo.core.errors import InputError

CODES = ("float32", "float16", "int8", "binary")
PART_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """Options of a bulk encoding."""

    width: int | None = None
    """Leading dimensions kept, renormalised; the model's full width by default."""
    code: str = "float32"
    """float32, float16, int8 (by the model's own ranges for the width) or binary (packed bits)."""
    columns: tuple[str, ...] | None = None
    """Columns of a row's text, joined by a space; by default `title` if there is one, and `text` or `document`."""
    keep: tuple[str, ...] | None = None
    """Columns copied beside the vectors; by default `_id` or `id` if there is one."""
    part_rows: int = PART_ROWS
    """Row groups of a file are put together until a part has so many rows."""
    batch_size: int = 64
    """Texts per forward pass."""
    bad: str = "refuse"
    """A text that the model cannot encode: `refuse` ends the run and names it, `skip` leaves it out and counts it."""
    device: str | None = None
    """Where torch runs the model; its choice by default."""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise InputError(f"unknown code {self.code!r}; bulk encoding writes {', '.join(CODES)}")
        if self.bad not in ("refuse", "skip"):
            raise InputError(f"bad must be refuse or skip, got {self.bad!r}")
        for name in ("part_rows", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number above 0, got {value!r}")
        for name in ("columns", "keep"):
            given = getattr(self, name) or ()
            if len(set(given)) < len(given):
                raise InputError(f"{name} names a column twice: {', '.join(given)}")
        taken = sorted({"row", "vector"} & set(self.keep or ()))
        if taken:
            raise InputError(f"keep cannot copy a column {taken[0]!r}, which the output has itself; rename it first")
