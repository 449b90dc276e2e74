"""What `Index.check` says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckReport:
    """What `Index.check` found. `problems` are damage; `notes` are derived files that will be made again."""

    files: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems
