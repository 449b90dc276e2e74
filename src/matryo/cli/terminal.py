"""What commands write: answers on standard output, progress on standard error and only on a terminal."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


class InterruptedByUserError(Exception):
    """Ctrl-C, with words about what is kept. typer swallows a KeyboardInterrupt together with its message."""


def say(text: str) -> None:
    """A line of the answer."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_json(content: Any) -> None:
    """The answer as one JSON object."""
    say(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False))


def note(text: str) -> None:
    """Something to know that is not the answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def bar(total: int | None, what: str) -> Iterator[Any]:
    """A progress bar with `advance(n)`, silent where standard error is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield Advance(progress, task)


class Advance:
    """Moves one bar."""

    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task = progress, task

    def by(self, steps: int) -> None:
        """Advance by so many steps."""
        self.progress.advance(self.task, steps)

    def to(self, step: int, total: int, what: str | None = None) -> None:
        """Set the position, the total and, if given, the words beside the bar."""
        named = {} if what is None else {"description": what}
        self.progress.update(self.task, completed=step, total=total, **named)
