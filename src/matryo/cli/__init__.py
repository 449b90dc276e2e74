"""The door: `matryo <verb>`. Each verb is a thin function over the API and imports its room when it runs."""

import os
import sys
import traceback

import typer

from matryo.cli import classify, demo, doctor, embed, export, index, measure, mine, plan, serve, train
from matryo.cli.terminal import InterruptedByUserError
from matryo.core.errors import MatryoError

app = typer.Typer(
    name="matryo",
    help="One embedding model, every size: train, measure, plan, search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train.add(app)
mine.add(app)
measure.add(app)
classify.add(app)
embed.add(app)
plan.add(app)
index.add(app)
export.add(app)
serve.add(app)
demo.add(app)
doctor.add(app)


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 our bug, 2 the user's mistake, 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    # Hub look-ups only happen for hub names; telemetry of the libraries underneath never.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        status = int(app(arguments, standalone_mode=False) or 0)
        return _say("interrupted", status) if status == 130 else status
    except MatryoError as error:
        return _say(str(error), 2)
    except (InterruptedByUserError, KeyboardInterrupt, typer.Abort) as error:
        return _say(str(error) or "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error}\n")
            return 2
        if hasattr(error, "format_message"):  # click's own usage errors
            return _say(error.format_message(), 2)
        traceback.print_exc()
        return _say(f"this is a bug in matryo: {type(error).__name__}: {error}", 1)


def _say(message: str, status: int) -> int:
    sys.stderr.write(f"matryo: {' '.join(message.split())}\n")
    return status
