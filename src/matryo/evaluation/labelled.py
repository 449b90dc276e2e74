"""Labelled tasks at every width from one encoding: linear probes, trained heads, and neighbours in the train split.

What is counted, per test item (letters: Q test items, N train items, C classes, D full width):

- `top-1`, `top-5`: the class is the first, or among the five first, of a linear probe fitted on train alone;
- `head top-1`, `head top-5`: the same of the heads the model was trained with;
- `1-NN`: the nearest train item is of the same class;
- `mAP@10`: average precision of the 10 nearest train items, those of the same class being relevant, over min(10, R)
  where R train items have the class; `P@10` divides the hits by 10, `R@10` by R;
- `coarse top-1`, `coarse 1-NN`: right up to the coarse class.

Ties go to the lower row, and to the lower class.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo import adapters
from matryo.classify import LinearHeads, fit_heads
from matryo.core.errors import InputError
from matryo.core.gram import check_widths, prefix_scores
from matryo.core.labelled import LabelledTask
from matryo.core.prefix import truncate
from matryo.core.records import check_vectors
from matryo.core.topk import top_k
from matryo.evaluation.bootstrap import Resampling
from matryo.evaluation.report import Report
from matryo.evaluation.rows import comparisons, rows_of, statistics
from matryo.evaluation.scoring import Cell, coded
from matryo.evaluation.systems import Source, System, default_widths, name_of, trained_widths

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
LABELLED_BASELINES = ("pca", "svd", "random", "select")
DEPTH = 10
"""Neighbours looked at."""


def evaluate_labelled(
    model_or_vectors: Source,
    task: LabelledTask,
    widths: Sequence[int] | None = None,
    codes: Sequence[str] = ("float32",),
    baselines: Sequence[str] = ("pca", "random"),
    *,
    metric: str = "top-1",
    heads: LinearHeads | None = None,
    probe: bool = True,
    twins: Mapping[str, Source] | None = None,
    separate: Mapping[int, Source] | None = None,
    against: str | None = None,
    name: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    command: str | None = None,
) -> Report:
    """Measure a model on a labelled task; `matryo.evaluate` comes here.

    Args:
        model_or_vectors: an object with `encode(items)`, or a pair (train_ND, test_QD) of arrays.
        baselines: of "pca", "svd" (of the train vectors, no mean taken off), "random" (projection) and "select"
            (a random order of the features); all fitted on the train split alone.
        heads: the model's own trained heads, to be measured beside the probe.
        probe: whether linear probes are fitted; without them the first metric is 1-NN.

    The other arguments are those of `matryo.evaluate`.
    """
    for kind in baselines:
        if kind not in LABELLED_BASELINES:
            raise InputError(f"unknown baseline {kind!r}; use {' or '.join(LABELLED_BASELINES)}")
    resampling = Resampling(len(task.test_labels), resamples, confidence, seed)
    train, test = embed_labelled(model_or_vectors, task, raw=heads is not None and not heads.normalize)
    full, raw = train.shape[1], test
    if hasattr(model_or_vectors, "encode"):
        train, test = truncate(train, full), truncate(test, full)
    trained = trained_widths(model_or_vectors, full)
    chosen = check_widths(default_widths(trained, full) if widths is None else sorted({*widths, full}), full)
    model = System(name or name_of(model_or_vectors), test, train, tuple(chosen), trained)
    others = _others(task, chosen, twins, separate)
    others += [baseline(kind, model, seed) for kind in dict.fromkeys(baselines)]
    names = [model.name, *(system.name for system in others)]
    if model.name in names[1:] or (against is not None and against not in names[1:]):
        raise InputError(f"against={against!r} and the systems' names {names} do not fit; each name must stand once")
    if heads is not None and heads.full > full:
        raise InputError(f"the heads read {heads.full} dimensions but the vectors have {full}")

    scorer = _Scorer(task, probe)
    cells = [cell for code in dict.fromkeys(["float32", *codes]) for cell in scorer.cells(model, code, heads, raw)]
    for system in others:
        cells += scorer.cells(system, "float32")
    found = statistics(cells, None, resampling)
    recorded = list(dict.fromkeys(m for cell in cells for m in cell.values))
    first = metric if probe or metric != "top-1" else "1-NN"
    if first not in recorded:
        raise InputError(f"metric {first!r} is not measured on a labelled task; use one of {', '.join(recorded)}")
    recorded.sort(key=lambda m: m != first)
    against = against or next(iter(names[1:]), None)
    rows = rows_of(cells, found, recorded, comparisons(cells, against))
    return Report(model.name, task, rows, cells, found, _notes(task, model, baselines, seed, probe), command)


def embed_labelled(source: Source, task: LabelledTask, raw: bool = False) -> tuple[Float32s, Float32s]:
    """(train_ND, test_QD) float32: encoded once, or taken as given; checked.

    Args:
        raw: vectors of the length that the encoder gives them, where the source can give those.
    """
    if hasattr(source, "encode"):
        if not len(task.train) or not len(task.test):
            raise InputError(f"{task.name}: has labels but no items to encode; give items or ready vectors")
        columns = [x if isinstance(x, np.ndarray) else list(x) for x in (task.train, task.test)]
        encode = source.features if raw and hasattr(source, "features") else source.encode
        parts = [np.asarray(encode(items)) for items in columns]
    elif isinstance(source, tuple) and len(source) == 2:
        parts = [np.asarray(part) for part in source]
    else:
        raise InputError(f"expected a model with encode() or a pair (train, test), got {type(source).__name__}")
    train, test = check_vectors(parts[0], "train"), check_vectors(parts[1], "test", parts[0].shape[1])
    for vectors, labels, split in ((train, task.train_labels, "train"), (test, task.test_labels, "test")):
        if len(vectors) != len(labels):
            raise InputError(f"{task.name}: {len(vectors)} {split} vectors but {len(labels)} labels; give one for each")
    return train, test


class _Scorer:
    """Raw values per test item of every metric, for one task."""

    def __init__(self, task: LabelledTask, probe: bool) -> None:
        self.task, self.probe = task, probe
        self.train_N, self.test_Q = task.targets
        self.relevant_Q = np.bincount(self.train_N, minlength=len(task.classes))[self.test_Q]
        wide = sorted(set(task.coarse.values()))
        self.coarse_C = np.array([wide.index(task.coarse[c]) for c in task.classes]) if task.coarse else None

    def cells(
        self, system: System, code: str, heads: LinearHeads | None = None, raw_QD: Float32s | None = None
    ) -> Iterator[Cell]:
        """Every width of a system in one code; trained heads read the test vectors of raw length."""
        if code == "float32":
            near = dict(nearest(system.first, system.second, system.widths))
            probes = fit_heads(system.second, self.task.train_labels, system.widths) if self.probe else None
            for level, width in enumerate(system.widths):
                values: dict[str, Float64s] = {}
                if probes is not None:
                    values |= self._classified(probes, level, system.first, "")
                if heads is not None and raw_QD is not None and width in heads.widths:
                    values |= self._classified(heads, heads.widths.index(width), raw_QD, "head ")
                yield Cell(system, width, code, 4 * width, values | self._found(near[width]))
            return
        for width in system.widths:
            if code == "binary" and width % 8:
                continue
            test, train, size = coded(system, width, code)
            yield Cell(system, width, code, size, self._found(dict(nearest(test, train, [width]))[width]))

    def _classified(self, heads: LinearHeads, level: int, test_QD: Float32s, prefix: str) -> dict[str, Float64s]:
        place = {name: n for n, name in enumerate(self.task.classes)}
        unknown = [name for name in heads.classes if name not in place]
        if unknown:
            raise InputError(f"the heads know a class {unknown[0]!r} that the task has not; map its labels first")
        known = np.array([place[name] for name in heads.classes])
        best, _ = top_k(heads.logits(test_QD, level), min(5, len(known)))
        return self._counted(known[best], prefix)

    def _counted(self, guesses_QK: NDArray[np.int64], prefix: str) -> dict[str, Float64s]:
        hits = guesses_QK == self.test_Q[:, None]
        values = {f"{prefix}top-1": hits[:, 0].astype(float), f"{prefix}top-5": hits.any(axis=1).astype(float)}
        if self.coarse_C is not None and not prefix:
            values["coarse top-1"] = (self.coarse_C[guesses_QK[:, 0]] == self.coarse_C[self.test_Q]).astype(float)
        return values

    def _found(self, rows_QK: NDArray[np.int64]) -> dict[str, Float64s]:
        """Metrics of the nearest train rows."""
        classes = self.train_N[rows_QK]
        hits = classes == self.test_Q[:, None]
        precisions = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
        values = {
            "1-NN": hits[:, 0].astype(float),
            f"mAP@{DEPTH}": (precisions * hits).sum(axis=1) / np.minimum(self.relevant_Q, DEPTH),
            f"P@{DEPTH}": hits.sum(axis=1) / DEPTH,
            f"R@{DEPTH}": hits.sum(axis=1) / self.relevant_Q,
        }
        if self.coarse_C is not None:
            values["coarse 1-NN"] = (self.coarse_C[classes[:, 0]] == self.coarse_C[self.test_Q]).astype(float)
        return values


def nearest(
    test_QD: Float32s, train_ND: Float32s, widths: Sequence[int], k: int = DEPTH
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (width, rows_QK): the k train rows of the highest cosine at each width, from one product for all widths."""
    found = {width: np.empty((len(test_QD), min(k, len(train_ND))), dtype=np.int64) for width in widths}
    for rows, width, scores in prefix_scores(test_QD, train_ND, widths):
        found[width][rows] = top_k(scores, k)[0]
    yield from found.items()


def baseline(kind: str, model: System, seed: int) -> System:
    """One of LABELLED_BASELINES, made of the model's vectors and fitted on those of the train split."""
    if kind == "select":
        order = np.random.default_rng(seed).permutation(model.full)
        return System("random features", model.first[:, order], model.second[:, order], model.widths)
    if kind == "random":
        draw = adapters.RandomProjection(seed=seed).fit(model.second)
        return System("random projection", draw.transform(model.first), draw.transform(model.second), model.widths)
    if kind == "pca":
        pca = adapters.PCA(centred=True).fit(model.second)
        first, second = pca.transform(model.first), pca.transform(model.second)
    else:
        unit = truncate(model.second, model.full).astype(np.float64)
        _, axes = np.linalg.eigh(unit.T @ unit)
        turn = axes[:, ::-1].astype(np.float32)
        first, second = model.first @ turn, model.second @ turn
    widths = tuple(w for w in model.widths if w <= first.shape[1])
    return System(kind.upper(), first, second, widths)


def _others(
    task: LabelledTask,
    widths: Sequence[int],
    twins: Mapping[str, Source] | None,
    separate: Mapping[int, Source] | None,
) -> list[System]:
    found: list[System] = []
    for name, source in (twins or {}).items():
        train, test = embed_labelled(source, task)
        kept = tuple(w for w in widths if w <= train.shape[1])
        found.append(System(name, test, train, kept, trained_widths(source, train.shape[1])))
    for width, source in sorted((separate or {}).items()):
        train, test = embed_labelled(source, task)
        if train.shape[1] != width:
            raise InputError(f"the separate model for width {width} gives vectors of {train.shape[1]} dimensions")
        found.append(System("trained at one width", test, train, (width,), frozenset([width])))
    return found


def _notes(task: LabelledTask, model: System, baselines: Sequence[str], seed: int, probe: bool) -> list[str]:
    notes = [
        "Every prefix is renormalised before it is compared; ties go to the train item or class that comes first.",
        "mAP@10: precision at each of the 10 nearest train items that has the class, summed, over min(10, train items "
        "of the class).",
    ]
    if probe:
        notes.append(
            "top-1, top-5: multinomial logistic regression on each renormalised prefix, fitted on train alone."
        )
    if baselines:
        notes.append(f"Baselines ({', '.join(baselines)}) are fitted on the train vectors alone; seed {seed}.")
    return notes


@dataclass(frozen=True)
class Spread:
    """One quantity over several runs (seeds): mean, standard deviation over runs (n - 1), and each value."""

    model: str
    width: int
    code: str
    metric: str
    mean: float
    deviation: float
    values: tuple[float, ...]


def combine(reports: Sequence[Report]) -> list[Spread]:
    """Rows of several runs of the same measurement, say one per seed, as mean and spread (NaN for one run)."""
    if not reports:
        raise InputError("there are no reports to combine")
    values: dict[tuple[str, int, str, str], list[float]] = {}
    for report in reports:
        for row in report.rows:
            values.setdefault((row.model, row.width, row.code, row.metric), []).append(row.value)
    ragged: Any = next((key for key, got in values.items() if len(got) != len(reports)), None)
    if ragged is not None:
        raise InputError(f"{ragged[0]} {ragged[1]}:{ragged[2]} {ragged[3]} is not in every report; combine equal runs")
    return [
        Spread(*key, float(np.mean(got)), float(np.std(got, ddof=1)) if len(got) > 1 else float("nan"), tuple(got))
        for key, got in values.items()
    ]
