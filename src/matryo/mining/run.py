"""One mining run, from pairs and a model to a Parquet file that `matryo train` reads."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import matryo
from matryo.core.errors import InputError
from matryo.core.files import digest
from matryo.core.prefix import check_width
from matryo.core.records import check_texts, read_pairs
from matryo.encoders import Model
from matryo.encoders.folder import fingerprint
from matryo.mining.options import RELATIVE_MARGIN, Mining
from matryo.mining.search import hard_negatives
from matryo.mining.table import column_names, pyarrow_or_raise, write_table
from matryo.mining.texts import Texts, read_corpus

ENCODED = 2048
"""Texts encoded between two reports of progress."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class MinedWidth:
    """What mining found at one width."""

    width: int
    columns: tuple[str, ...]
    """Columns of the file that hold this width's negatives, hardest first."""
    false_negatives: int
    """Candidates within the ranks that the margin set aside, summed over the distinct anchors."""
    short: int
    """Pairs that have too few negatives at this width, and so are not in the file."""


@dataclass(frozen=True)
class Mined:
    """What a run wrote."""

    path: Path
    pairs: int
    """Pairs read."""
    rows: int
    """Pairs written, each with all its negatives."""
    anchors: int
    candidates: int
    """Distinct texts that could be negatives."""
    widths: tuple[MinedWidth, ...]


def mine(
    model: Model,
    pairs: str | Path,
    out: str | Path,
    options: Mining | None = None,
    corpus: str | Path | None = None,
    report: Report | None = None,
) -> Mined:
    """Add hard negatives to pairs, mined at each width by the prefix's own nearest neighbours.

    Anchors and candidates (the distinct positives and the corpus) are encoded once. At each width, exact search by the
    cosine of renormalised prefixes; what belongs to the anchor is set aside, and so is what scores above the limit that
    the margin sets under the anchor's lowest positive at that width. A text that a narrower width chose is not chosen
    again for the same anchor. A pair that has too few negatives at any width is left out, and counted.

    The file has a row per pair: `anchor, positive`, the negatives as `negative, negative_2, ...` with the widths taken
    in turn (two widths: the hardest of the narrow one, the hardest of the wide one, the second of the narrow one, ...),
    and `group` where the pairs have it. Which column is of which width, and everything else that was chosen, is JSON in
    the schema's metadata under `matryo`. Negatives that the pairs already have are not carried over.

    Args:
        model: what finds the negatives; `matryo.load` gives one.
        pairs: file of pairs, as `matryo train` reads it.
        out: Parquet file to write; replaced at the very end, or untouched.
        options: widths, number, margin, ranks.
        corpus: file of more candidate texts, column `text` and optional `title`.
        report: called as the work goes on.

    Raises:
        InputError: files, widths or numbers that do not fit, a text the model cannot encode, or no pair with enough
            negatives. StorageError: the disk refused. `out` is as it was.
    """
    options = options or Mining()
    pairs, out = Path(pairs), Path(out)
    _check_out(out, [pairs, *([Path(corpus)] if corpus else [])])
    pyarrow_or_raise()
    widths = tuple(check_width(width, model.width) for width in options.widths or (model.width,))
    read = read_pairs(pairs)
    texts = Texts.of(read, read_corpus(corpus) if corpus else ())
    _check_enough(texts, options.negatives * len(widths), str(pairs))
    tell = report or (lambda what, done, total: None)
    anchors_AD = _encode(model, texts.anchors, "anchor", widths, options, tell)
    candidates_CD = _encode(model, texts.candidates, "candidate", widths, options, tell)
    picks_LAN, false = _search(texts, anchors_AD, candidates_CD, widths, options, tell)
    lacking_LR = (picks_LAN[:, :, -1] < 0)[:, texts.row_anchor]
    keep = np.flatnonzero(~lacking_LR.any(axis=0))
    if not len(keep):
        raise InputError(
            f"{pairs}: none of {len(read)} pairs has {options.negatives} negatives at every width; ask for fewer, "
            "lower the margin, widen the ranks or add a corpus"
        )
    # Column j is of width j % L: a run that trains on the first columns alone still sees every width.
    names = column_names(options.negatives * len(widths))
    columns = [tuple(names[level :: len(widths)]) for level in range(len(widths))]
    of_width = {name: widths[n % len(widths)] for n, name in enumerate(names)}
    metadata = _metadata(model, pairs, len(read), corpus, options, of_width)
    tell("writing", 0, len(keep))
    interleaved = picks_LAN.transpose(1, 2, 0).reshape(len(texts.anchors), -1)
    write_table(out, texts, read.groups, interleaved, keep, metadata)
    tell("writing", len(keep), len(keep))
    counts = zip(widths, columns, false, lacking_LR.sum(axis=1), strict=True)
    return Mined(
        out,
        len(read),
        len(keep),
        len(texts.anchors),
        len(texts.candidates),
        tuple(MinedWidth(width, names, dropped, int(short)) for width, names, dropped, short in counts),
    )


def _check_out(out: Path, inputs: Sequence[Path]) -> None:
    if out.suffix != ".parquet":
        raise InputError(f"{out}: mined pairs are written as Parquet; end the name with .parquet")
    if not out.parent.is_dir():
        raise InputError(f"no such folder: {out.parent}; make it first")
    if out.is_dir():
        raise InputError(f"{out} is a folder; choose a file name")
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"{out} is an input of this run; choose another file to write")


def _check_enough(texts: Texts, asked: int, name: str) -> None:
    there = len(texts.candidates)
    if there <= asked:
        raise InputError(
            f"{name}: {asked} negatives a pair were asked for, but there are {there} distinct candidate texts with the "
            f"pair's own positive; add pairs or a corpus, or ask for at most {there - 1}"
            if there > 1
            else f"{name}: there is no text but the one positive to mine from; add pairs or a corpus"
        )


def _encode(
    model: Model, texts: list[str], what: str, widths: Sequence[int], options: Mining, tell: Report
) -> NDArray[np.float32]:
    """(N, D) vectors as the encoder gives them, once; a text that has no direction at one of the widths is named."""
    check_texts(texts, what)
    vectors_ND = np.empty((len(texts), model.width), np.float32)
    for start in range(0, len(texts), ENCODED):
        tell(f"encoding {what}s", start, len(texts))
        block = texts[start : start + ENCODED]
        vectors = model.encoder.vectors(block, options.batch_size, False)
        for width in sorted({*widths, model.width}, reverse=True):
            sums = np.einsum("nd,nd->n", vectors[:, :width], vectors[:, :width], dtype=np.float64)
            bad = np.flatnonzero(~np.isfinite(sums) | (sums == 0))
            if len(bad):
                gave = "only zeros" if sums[bad[0]] == 0 else "NaN or Inf"
                raise InputError(
                    f"the model gave {gave} at width {width} for {what} {start + int(bad[0]) + 1} of {len(texts)}, "
                    f"{block[bad[0]][:40]!r}; remove it or choose another model"
                )
        vectors_ND[start : start + len(block)] = vectors
    tell(f"encoding {what}s", len(texts), len(texts))
    return vectors_ND


def _search(
    texts: Texts,
    anchors_AD: NDArray[np.float32],
    candidates_CD: NDArray[np.float32],
    widths: Sequence[int],
    options: Mining,
    tell: Report,
) -> tuple[NDArray[np.int32], list[int]]:
    """(L, A, N) picks of every width, narrow to wide, and how many candidates the margin set aside at each."""
    total = len(anchors_AD)
    picks_LAN = np.full((len(widths), total, options.negatives), -1, np.int32)
    false = []
    for level, width in enumerate(widths):
        done = 0

        def advance(more: int, width: int = width) -> None:
            nonlocal done
            done += more
            tell(f"mining width {width}", done, total)

        taken_AT = picks_LAN[:level].transpose(1, 0, 2).reshape(total, -1)
        found = hard_negatives(texts, anchors_AD, candidates_CD, width, options, taken_AT, advance)
        picks_LAN[level] = found.picks
        false.append(int(found.false.sum()))
    return picks_LAN, false


def _metadata(
    model: Model,
    pairs: Path,
    rows: int,
    corpus: str | Path | None,
    options: Mining,
    of_width: dict[str, int],
) -> dict[str, Any]:
    chosen = asdict(options)
    if options.margin is None and options.relative_margin is None:
        chosen["relative_margin"] = RELATIVE_MARGIN
    packages = ("numpy", "faiss-cpu", "tokenizers", "pyarrow")
    return {
        "model": {"name": model.name, **fingerprint(model.name)},
        "pairs": {"rows": rows, "blake2b": digest(pairs)},
        "corpus": {"blake2b": digest(Path(corpus))} if corpus else None,
        **chosen,
        "widths": sorted(set(of_width.values())),
        "columns": of_width,
        "versions": {"matryo": matryo.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
    }
