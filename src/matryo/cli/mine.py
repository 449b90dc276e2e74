"""`matryo mine`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from matryo.cli.terminal import InterruptedByUserError, Json, bar, say, say_json
from matryo.cli.train import numbers
from matryo.core.errors import InputError


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(mine)


def mine(
    pairs: Annotated[Path, typer.Argument(help="Pairs: .parquet, .jsonl[.gz], .csv or .tsv.")],
    model: Annotated[str, typer.Option(help="Model folder, hub name or 'toy' that finds the negatives.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    widths: Annotated[str | None, typer.Option(help="Widths to mine at, such as 64,256; full width if unset.")] = None,
    negatives: Annotated[int, typer.Option(help="Negatives per pair and width.")] = 1,
    margin: Annotated[float | None, typer.Option(help="Drop candidates above the positive's score minus this.")] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="Drop candidates above this share of the positive's score; 0.95 if unset.")
    ] = None,
    ranks: Annotated[
        str, typer.Option("--range", help="First and last rank to take from; 1 is the nearest.", metavar="MIN:MAX")
    ] = "1:",
    sample: Annotated[bool, typer.Option("--sample", help="Draw from the range, not the hardest first.")] = False,
    corpus: Annotated[Path | None, typer.Option(help="More candidates: a table with column text.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 0,
    as_json: Json = False,
) -> None:
    """Add hard negatives to pairs: near texts that do not belong to the anchor, width by width.

    Example: matryo mine pairs.jsonl.gz --model runs/first --out hard.parquet --widths 64,256 --negatives 2
    """
    from matryo import load
    from matryo.mining import Mining
    from matryo.mining import mine as run

    options = Mining(
        widths=numbers(widths),
        negatives=negatives,
        margin=margin,
        relative_margin=relative_margin,
        ranks=_ranks(ranks),
        sample=sample,
        seed=seed,
        batch_size=batch_size,
    )
    try:
        with bar(None, "mining") as progress:
            found = run(
                load(model), pairs, out, options, corpus, lambda what, done, total: progress.to(done, total, what)
            )
    except KeyboardInterrupt:
        raise InterruptedByUserError(f"interrupted; nothing was written to {out}") from None
    if as_json:
        say_json({**asdict(found), "path": str(found.path)})
        return
    say(f"{found.path}: {found.rows} of {found.pairs} pairs, mined from {found.candidates} candidates")
    for at in found.widths:
        say(
            f"width {at.width}: {', '.join(at.columns)}; {at.false_negatives / found.anchors:.1f} candidates an anchor "
            f"dropped as false negatives, {at.short} pairs left out for want of negatives"
        )


def _ranks(text: str) -> tuple[int, int | None]:
    first, colon, last = (part.strip() for part in text.partition(":"))
    if not colon or not all(part.isdecimal() or not part for part in (first, last)):
        raise InputError(f"--range takes MIN:MAX, two ranks counted from 1, got {text!r}; for example 10:100")
    return int(first or 1), int(last) if last else None
