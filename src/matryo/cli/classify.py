"""`matryo classify fit`, `measure` and `predict`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryo.cli.terminal import Json, say, say_json
from matryo.cli.train import numbers
from matryo.core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from matryo.classify import Tradeoff

app = typer.Typer(help="Label texts, each read only as wide as it needs.", no_args_is_help=True)


def add(door: typer.Typer) -> None:
    """Put the verbs on the app."""
    door.add_typer(app, name="classify")


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or 'toy'.")],
    train: Annotated[Path, typer.Argument(help="Table with columns text and label that heads are fitted on.")],
    calibration: Annotated[Path, typer.Argument(help="Other rows that thresholds are learned on; never a test set.")],
    out: Annotated[Path, typer.Option(help="Folder to write the classifier to; the model's own will do.")],
    widths: Annotated[str | None, typer.Option(help="Widths, such as 8,32,128; doubling from 8 if unset.")] = None,
    target: Annotated[float | None, typer.Option(help="Accuracy to keep; the full head's if unset.")] = None,
    promised: Annotated[float | None, typer.Option(help="Keep it on new items with this confidence.")] = None,
    strength: Annotated[
        str,
        typer.Option(help="Inverse weight of the penalty on the heads' squared length; 'auto': best of each width."),
    ] = "10",
    as_json: Json = False,
) -> None:
    """Fit a head per width, and thresholds at which a text needs no wider one.

    Example: matryo classify fit runs/first train.jsonl.gz val.jsonl.gz --out runs/first --target 0.9
    """
    from matryo import load
    from matryo.classify import AdaptiveClassifier
    from matryo.core.records import read_labelled

    chosen, held_back = numbers(widths), _strength(strength)
    encoder, rows, held = load(model), read_labelled(train), read_labelled(calibration)
    seen = (encoder.encode(held.texts), held.labels)
    made = AdaptiveClassifier.fit(
        encoder.encode(rows.texts), rows.labels, seen,
        widths=chosen, target=target, promised=promised, strength=held_back,
    )  # fmt: skip
    made.save(out)
    found = made.measure(*seen)
    if as_json:
        say_json(_plain(found))
    else:
        say(
            f"wrote {out}: on the calibration rows accuracy {found.accuracy:.4f} at {found.expected_width:.1f} "
            f"dimensions read a text (last prefix {found.last_width:.1f}) of {made.heads.full}"
        )


def _strength(text: str) -> float | None:
    """A number above 0, or None for 'auto'."""
    from matryo.classify.heads import check_strength

    try:
        given = None if text == "auto" else float(text)
    except ValueError as error:
        raise InputError(f"--strength takes a number above 0 or 'auto', got {text!r}") from error
    check_strength(given)
    return given


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or 'toy'.")],
    classifier: Annotated[Path, typer.Argument(help="Folder that fit wrote to.")],
    test: Annotated[Path, typer.Argument(help="Table with columns text and label that fit has not seen.")],
    report: Annotated[Path | None, typer.Option(help="Write a page with the trade-off curve here (.html).")] = None,
    as_json: Json = False,
) -> None:
    """Measure a classifier on new rows: accuracy, dimensions read, and the curve of every rung it learned.

    Example: matryo classify measure runs/first runs/first test.jsonl.gz --report cascade.html
    """
    from matryo import load
    from matryo.classify import AdaptiveClassifier
    from matryo.core.records import read_labelled

    if report is not None and report.suffix != ".html":
        raise InputError(f"--report must end in .html, got {report.name!r}")
    if report is not None:
        try:
            from matryo.classify.page import save_page
        except ImportError as error:
            raise MissingExtraError("matplotlib", "eval", "the page of a cascade") from error
    made, rows, encoder = AdaptiveClassifier.load(classifier), read_labelled(test), load(model)
    encode = encoder.encode if made.heads.normalize else encoder.features
    seen = (encode(rows.texts), rows.labels)
    found, curve, alone = made.measure(*seen), made.curve(*seen), made.alone(*seen)
    if report is not None:
        save_page(report, made, found, curve, alone, len(rows.texts))
    if as_json:
        say_json({**_plain(found), "full": _plain(alone[-1]), "curve": [_plain(one) for one in curve]})
    else:
        say(
            f"accuracy {found.accuracy:.4f} at {found.expected_width:.1f} dimensions read a text (last prefix "
            f"{found.last_width:.1f}); the full head {alone[-1].accuracy:.4f} at {made.heads.full}"
        )


def _plain(found: "Tradeoff") -> dict[str, Any]:
    """For JSON, which has no infinity: a skipped head's threshold is null."""
    return {**asdict(found), "thresholds": [t if t != float("inf") else None for t in found.thresholds]}


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or 'toy'.")],
    classifier: Annotated[Path, typer.Argument(help="Folder that fit wrote to.")],
    texts: Annotated[Path, typer.Argument(help="Table with column text.")],
) -> None:
    """Print one JSON line per text: its label, the last width used and the dimensions read.

    Example: matryo classify predict runs/first runs/first new.jsonl
    """
    import json

    from matryo import load
    from matryo.classify import AdaptiveClassifier
    from matryo.core.records import read_texts

    made = AdaptiveClassifier.load(classifier)
    found = made.predict_texts(load(model), read_texts(texts))
    for label, width, read in zip(found.labels, found.widths.tolist(), found.read.tolist(), strict=True):
        say(json.dumps({"label": label, "width": width, "read": read}, ensure_ascii=False))
