"""What is measured: the vectors of a system. Texts are encoded once, at full width; all else is cut from that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo import adapters
from matryo.core.errors import InputError
from matryo.core.records import Retrieval, ScoredPairs, check_texts, check_vectors

Float32s = NDArray[np.float32]
Task = Retrieval | ScoredPairs
Source = Any
"""An encoder (an object with `encode`) or a pair of arrays (queries_QD, documents_ND)."""

BASELINES = ("pca", "random")


@dataclass(frozen=True)
class System:
    """Vectors of one system: `first` holds queries (or first sentences), `second` documents (or second sentences)."""

    name: str
    first: Float32s
    second: Float32s
    widths: tuple[int, ...]
    """The widths at which this system is measured."""
    trained: frozenset[int] | None = None
    """The widths it was trained at; None where training has no meaning (a projection)."""
    depth: int | None = None
    """Layers that were run, where not all were."""

    @property
    def full(self) -> int:
        """Full width D."""
        return int(self.first.shape[1])


def texts_of(task: Task) -> tuple[list[str], list[str]]:
    """The two columns of texts a task compares, checked; of documents, those that are not blank."""
    if isinstance(task, Retrieval):
        if len(task.queries) != task.judged.count or len(task.query_ids) != task.judged.count:
            raise InputError(
                f"{task.name}: {len(task.queries)} queries but judgements for {task.judged.count}; "
                "keep the judged queries only"
            )
        if len(task.document_ids) != len(task.documents) or not task.documents:
            raise InputError(f"{task.name}: {len(task.documents)} documents but {len(task.document_ids)} ids")
        check_texts(task.documents, "documents", blank=True)
        if not len(task.written):
            raise InputError(f"{task.name}: every document is blank, so there is nothing to find")
        return check_texts(task.queries, "queries"), task.texts
    if not len(task.first) == len(task.second) == len(task.scores) or len(task.scores) < 2:
        raise InputError(f"{task.name}: sentences and scores must be as many, and at least 2")
    return check_texts(task.first, "sentence1"), check_texts(task.second, "sentence2")


def embed(source: Source, task: Task, depth: int | None = None) -> tuple[Float32s, Float32s]:
    """Both columns of a task as (Q, D) and (M, D) float32, encoded once or taken as given, and checked.

    M counts the documents that have text. Ready vectors may hold a row for each document; rows of blank ones are left.

    Raises:
        InputError: empty text; rows and texts that differ in number; widths that differ; NaN, Inf or all-zero rows.
    """
    names = ("queries", "documents") if isinstance(task, Retrieval) else ("sentence1", "sentence2")
    first_texts, second_texts = texts_of(task)
    if hasattr(source, "encode") and not isinstance(source, str):
        first = _encode(source, first_texts, "query", depth)
        second = _encode(source, second_texts, "document", depth)
    elif isinstance(source, tuple) and len(source) == 2:
        first, second = (np.asarray(part) for part in source)
        if isinstance(task, Retrieval) and second.shape[:1] == (len(task.documents),) != (len(second_texts),):
            second = second[task.written]
    else:
        raise InputError(
            f"expected a model with encode() or a pair (queries, documents) of arrays, got {type(source).__name__}"
        )
    first, second = check_vectors(first, names[0]), check_vectors(second, names[1])
    for vectors, texts, name in ((first, first_texts, names[0]), (second, second_texts, names[1])):
        if len(vectors) != len(texts):
            raise InputError(f"{name}: {len(texts)} texts but {len(vectors)} vectors")
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"{names[0]} have {first.shape[1]} dimensions and {names[1]} {second.shape[1]}; encode both alike"
        )
    return first, second


def _encode(model: Any, texts: list[str], role: str, depth: int | None) -> NDArray[Any]:
    """Full-width vectors. A model with prompts of its own for queries and documents is asked by role."""
    encode = getattr(model, f"encode_{role}", None) or model.encode
    return np.asarray(encode(texts) if depth is None else encode(texts, depth=depth))


def name_of(source: Source) -> str:
    """What the report calls it."""
    name = getattr(source, "name", None)
    return name if isinstance(name, str) and name else ("vectors" if isinstance(source, tuple) else "model")


def trained_widths(source: Source, full: int) -> frozenset[int]:
    """The widths a source says it was trained at; without a nesting, the full width alone."""
    nesting = getattr(source, "nesting", None)
    if nesting is None:
        return frozenset([full])
    nesting.check(full)
    return frozenset(nesting.widths)


def default_widths(trained: frozenset[int], full: int) -> list[int]:
    """The trained widths, the powers of two from 8 on, and full width."""
    powers = {1 << n for n in range(3, full.bit_length())}
    return sorted(w for w in trained | powers | {full} if w <= full)


def baseline(name: str, model: System, column: str, fit_vectors: Float32s | None, seed: int) -> tuple[System, str]:
    """A projection of the model's own vectors, and a sentence for the report that says how it was made."""
    if name == "random":
        draw = adapters.RandomProjection(seed=seed).fit(model.second)
        made = System("random projection", draw.transform(model.first), draw.transform(model.second), model.widths)
        return (
            made,
            f"Random projection: one Gaussian {model.full} x {model.full} matrix, seed {seed}; cut to each width.",
        )
    if fit_vectors is None:
        sample, said = model.second, f"the {len(model.second):,} {column} vectors of this task"
    else:
        sample, said = check_vectors(fit_vectors, "fit_vectors", model.full), f"{len(fit_vectors):,} training vectors"
    pca = adapters.PCA().fit(sample)
    first, second = pca.transform(model.first), pca.transform(model.second)
    widths = tuple(w for w in model.widths if w <= first.shape[1])
    note = f"PCA: fitted on {said}; components in order of variance, no mean taken off, cut to each width."
    if len(widths) < len(model.widths):
        note += f" It has {first.shape[1]} components, so wider rows are left out."
    return System("PCA", first, second, widths), note


def companions(
    twins: Mapping[str, Source] | None,
    separate: Mapping[int, Source] | None,
    task: Task,
    widths: Sequence[int],
) -> list[System]:
    """Other models measured beside the first: `twins` cut at the same widths, `separate` each at its own full width."""
    found: list[System] = []
    for name, source in (twins or {}).items():
        first, second = embed(source, task)
        full = first.shape[1]
        kept = tuple(w for w in widths if w <= full)
        found.append(System(name, first, second, kept, trained_widths(source, full)))
    for width, source in sorted((separate or {}).items()):
        first, second = embed(source, task)
        if first.shape[1] != width:
            raise InputError(f"the separate model for width {width} gives vectors of {first.shape[1]} dimensions")
        found.append(System("trained at one width", first, second, (width,), frozenset([width])))
    return found
