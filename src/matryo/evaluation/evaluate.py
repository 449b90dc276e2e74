"""`evaluate`: one encoding in, every width, code and baseline out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matryo.classify import LinearHeads
from matryo.core.codecs import codec
from matryo.core.errors import InputError
from matryo.core.gram import check_widths
from matryo.core.labelled import LabelledTask, is_labelled, read_labelled_task
from matryo.core.metrics import Metric, check_metrics
from matryo.core.records import Retrieval, ScoredPairs, read_retrieval, read_sts
from matryo.evaluation.bootstrap import Resampling
from matryo.evaluation.labelled import evaluate_labelled
from matryo.evaluation.report import Report
from matryo.evaluation.rows import SPEARMAN, comparisons, rows_of, statistics
from matryo.evaluation.scoring import Cell, score
from matryo.evaluation.systems import (
    BASELINES,
    Source,
    System,
    Task,
    baseline,
    companions,
    default_widths,
    embed,
    name_of,
    trained_widths,
)

METRIC = "nDCG@10"
FURTHER = ("recall@10", "recall@100", "MRR@10", "mAP@100")


def evaluate(
    model_or_vectors: Source,
    task: Task | LabelledTask | str | Path,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    codes: Sequence[str] = ("float32",),
    baselines: Sequence[str] = BASELINES,
    *,
    metric: str | Metric | None = None,
    further: Sequence[str | Metric] = FURTHER,
    split: str = "test",
    twins: Mapping[str, Source] | None = None,
    separate: Mapping[int, Source] | None = None,
    fit_vectors: NDArray[np.floating] | None = None,
    heads: LinearHeads | None = None,
    against: str | None = None,
    name: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    command: str | None = None,
) -> Report:
    """Measure a model at every width and code from one encoding, beside baselines, with paired intervals.

    Args:
        model_or_vectors: an object with `encode(texts)` -> (N, D), or a pair (queries_QD, documents_ND) of arrays.
        task: a Retrieval or ScoredPairs set, or a path: a folder in the BEIR layout, or a file of scored pairs;
            or a LabelledTask or a folder with train and test files of it, as `evaluation.labelled` says.
        widths: inside 1..D, in any order; by default the trained ones, powers of two from 8 on, and D.
        depths: numbers of encoder layers to measure too, of those that the model was trained at; all of them by
            default, none if empty.
        codes: how documents are stored; float32 is always measured.
        baselines: of "pca" and "random".
        metric: what rows are compared by, nDCG@10 (top-1 for a labelled task) unless said; `further` metrics are
            recorded beside it (retrieval only).
        split: of the judgements, where `task` is a folder.
        twins: name -> another model (say, trained without nesting), cut at the same widths.
        separate: width -> a model trained at that width alone; `train_alone` makes them.
        fit_vectors: (M, D) training vectors to fit PCA on; by default the document vectors of the task.
        heads: trained heads of the model, measured beside the probe (labelled tasks only).
        against: name of the system the model is compared with; by default the first twin, else the first baseline.
        name: what the report calls the model; by default its own name.
        seed: of resamples and of the random projection.
        resamples, confidence: of the percentile bootstrap over queries (or pairs).
        command: what made this report, to be printed in it.

    Raises:
        InputError: whatever does not fit, in one line; nothing is encoded before the arguments are checked.
        MissingExtraError: a baseline without scikit-learn.
    """
    task = read_task(task, split)
    if isinstance(task, LabelledTask):
        if depths or fit_vectors is not None:
            raise InputError("a labelled task takes neither depths nor fit_vectors; baselines are fitted on its train")
        return evaluate_labelled(
            model_or_vectors, task, widths, codes, baselines, metric=str(metric or "top-1"),
            heads=heads, twins=twins, separate=separate, against=against, name=name, seed=seed, resamples=resamples,
            confidence=confidence, command=command,
        )  # fmt: skip
    if heads is not None:
        raise InputError(f"heads are measured on labelled tasks; {task.name} is none")
    _check_arguments(codes, baselines, model_or_vectors, depths)
    codes = list(dict.fromkeys(["float32", *codes]))
    metrics = list(dict.fromkeys(check_metrics([metric or METRIC, *further])))
    items = task.judged.count if isinstance(task, Retrieval) else len(task.scores)
    resampling = Resampling(items, resamples, confidence, seed)

    first, second = embed(model_or_vectors, task)
    full = first.shape[1]
    trained = trained_widths(model_or_vectors, full)
    chosen = check_widths(default_widths(trained, full) if widths is None else sorted({*widths, full}), full)
    model = System(name or name_of(model_or_vectors), first, second, tuple(chosen), trained)
    others, notes = [], _notes(model, codes) + _blanks(task)
    for depth in _below(model_or_vectors, depths):
        vectors = embed(model_or_vectors, task, depth)
        others.append(System(f"{model.name}, {depth} layers", *vectors, model.widths, trained, depth))
    others += companions(twins, separate, task, chosen)
    column = "document" if isinstance(task, Retrieval) else "second-sentence"
    for kind in dict.fromkeys(baselines):
        made, note = baseline(kind, model, column, fit_vectors, seed)
        others.append(made)
        notes.append(note)
    against = _against(against, model, others)

    cells = list(score(model, task, codes, metrics))
    for system in others:
        cells += score(system, task, ["float32"], metrics)
    _refuse_twice(cells)
    gold = None if isinstance(task, Retrieval) else task.scores
    found = statistics(cells, gold, resampling)
    names = [str(m) for m in metrics] if isinstance(task, Retrieval) else [SPEARMAN]
    rows = rows_of(cells, found, names, comparisons(cells, against))
    again = command or (
        f"matryo.evaluate(model, task, widths={chosen}, codes={codes}, baselines={list(baselines)}, "
        f"metric={str(metrics[0])!r}, seed={seed}, resamples={resamples}, confidence={confidence})"
    )
    return Report(model.name, task, rows, cells, found, notes, again)


def _below(source: Source, depths: Sequence[int] | None) -> list[int]:
    """The depths to measure beside the whole encoder, deepest first."""
    offered = tuple(getattr(source, "depths", None) or ())
    return sorted({*(offered if depths is None else depths)} - {*offered[-1:]}, reverse=True)


def _check_arguments(
    codes: Sequence[str], baselines: Sequence[str], source: Source, depths: Sequence[int] | None
) -> None:
    for code in codes:
        codec(code, 8)
    for kind in baselines:
        if kind not in BASELINES:
            raise InputError(f"unknown baseline {kind!r}; use {' or '.join(BASELINES)}")
    offered = list(getattr(source, "depths", None) or ())
    for depth in depths or ():
        if depth not in offered:
            has = f"offers {offered}" if offered else "has none: it runs all its layers"
            raise InputError(f"depth {depth} is not among the model's depths; the model {has}")


def read_task(task: Task | LabelledTask | str | Path, split: str = "test") -> Task | LabelledTask:
    """A task from its path: a folder in the BEIR layout, or a file of scored pairs; a task as it is."""
    if isinstance(task, Retrieval | ScoredPairs | LabelledTask):
        return task
    if not isinstance(task, str | Path):
        raise InputError(f"a task is a Retrieval or ScoredPairs set or a path, got {type(task).__name__}")
    path = Path(task)
    if not path.exists():
        raise InputError(f"no such task: {path}; give a folder in the BEIR layout or a file of scored pairs")
    if path.is_dir() and is_labelled(path):
        return read_labelled_task(path)
    return read_retrieval(path, split) if path.is_dir() else read_sts(path)


def _against(against: str | None, model: System, others: Sequence[System]) -> str | None:
    names = [system.name for system in others]
    if model.name in names:
        raise InputError(f"two systems are called {model.name!r}; give the model another name")
    if against is not None and against not in names:
        raise InputError(f"against={against!r} is not measured here; use one of {', '.join(names) or 'none'}")
    # The same model at a lower depth is no baseline; it stands where nothing else is measured.
    others = [*(s for s in others if s.depth is None), *others]
    return against or next((system.name for system in others), None)


def _refuse_twice(cells: Sequence[Cell]) -> None:
    labels = [cell.label for cell in cells]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label} is measured twice; give twins and separate models names of their own")


def _blanks(task: Task) -> list[str]:
    """What a set with documents that have no text has to say about them."""
    if not isinstance(task, Retrieval) or len(task.written) == len(task.documents):
        return []
    blank = sorted(set(range(len(task.documents))) - set(task.written.tolist()))
    pairs = int(np.isin(task.judged.documents, blank).sum())
    named = ", ".join(task.document_ids[n] for n in blank[:3]) + (", ..." if len(blank) > 3 else "")
    return [
        f"Documents without title and text: {len(blank):,} of {len(task.documents):,} ({named}). They are never "
        f"encoded and never found; judged pairs that name them ({pairs:,}) stay in every denominator."
    ]


def _notes(model: System, codes: Sequence[str]) -> list[str]:
    """What the reader has to know about how the rows were made."""
    notes = ["Every prefix is renormalised before it is compared; ties go to the document that comes first."]
    coded = [code for code in codes if code not in ("float32", "binary")]
    if coded:
        notes.append(
            f"{', '.join(coded)}: the query stays float32 and meets the decoded document; "
            "ranges are fitted on the document prefixes of each width, after the cut."
        )
    if "binary" in codes:
        left = [w for w in model.widths if w % 8]
        skipped = f" Widths that are no multiple of 8 have no binary row: {', '.join(map(str, left))}." if left else ""
        notes.append(f"binary: signs meet signs (Hamming), as in the first stage of a funnel.{skipped}")
    return notes
