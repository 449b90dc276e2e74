"""The data sets of a run: files read into columns of texts and what stands beside them, and batches made of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from sentence_transformers.base.sampler import DefaultBatchSampler, GroupByLabelBatchSampler, NoDuplicatesBatchSampler
from torch import Tensor

from matryo.core.errors import InputError
from matryo.core.files import digest
from matryo.core.records import read_labelled, read_pairs, read_sts, read_texts, read_vectors
from matryo.core.records import rows as lines
from matryo.encoders import load
from matryo.encoders.folder import fingerprint
from matryo.training.config import DataConfig
from matryo.training.objectives import Recipe, recipe
from matryo.training.rotation import neighbourhoods
from matryo.training.static import TokenBags

BESIDE = ("label", "row")
"""Columns of a data set that are not texts."""


@dataclass(frozen=True)
class Rows:
    """One data set, read and checked."""

    name: str
    config: DataConfig
    columns: dict[str, list[str]]
    labels: NDArray[Any] | None = None
    """(N,) numbers of groups or classes, or scores."""
    classes: list[str] = field(default_factory=list)
    """What the numbers of classes stand for."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def recipe(self) -> Recipe:
        """Its loss."""
        return recipe(self.config.loss)

    @property
    def texts(self) -> list[str]:
        """The texts that tell what language this is: anchors and positives, both sentences, or the labelled texts."""
        return [text for column in list(self.columns.values())[:2] for text in column]

    @property
    def documents(self) -> list[str]:
        """The texts that would be indexed: positives, second sentences, or the labelled texts."""
        return list(self.columns.values())[:2][-1]

    def record(self) -> dict[str, Any]:
        """What identifies it: a resumed run must find it unchanged."""
        teacher = self.config.teacher
        taught = {} if teacher is None else {"teacher": fingerprint(teacher)}
        return {"rows": len(self), "blake2b": digest(self.config.path), **taught}


def read_sets(configs: Sequence[DataConfig]) -> list[Rows]:
    """Every data set, each under a name of its own."""
    found: list[Rows] = []
    for config in configs:
        taken = {rows.name for rows in found}
        if config.name in taken:
            raise InputError(f"two data sets are named {config.name!r}; give each a name of its own")
        stem = config.name or re.sub(r"\W+", "_", config.path.name.split(".")[0]) or "data"
        name = next(name for name in (stem, *(f"{stem}_{n}" for n in range(2, 99))) if name not in taken)
        found.append(_read(name, config))
    return found


def _read(name: str, config: DataConfig) -> Rows:
    path, kind = config.path, recipe(config.loss).rows
    if kind == "labelled":
        labelled = read_labelled(path)
        classes = sorted(set(labelled.labels), key=_class_order)
        number = {label: n for n, label in enumerate(classes)}
        labels = np.array([number[label] for label in labelled.labels])
        rows = Rows(name, config, {"text": labelled.texts}, labels, classes)
    elif kind == "scored":
        scored = read_sts(path)
        rows = Rows(name, config, {"first": scored.first, "second": scored.second}, scored.scores)
    elif kind == "texts" and "text" in next((row for _, row in lines(path)), {}):
        rows = Rows(name, config, {"text": read_texts(path)})
    else:
        pairs = read_pairs(path)
        columns = {"anchor": pairs.anchors, "positive": pairs.positives}
        columns |= {f"negative_{n}": texts for n, texts in enumerate(pairs.negatives, start=1)}
        if kind == "triplets" and len(columns) != 3:
            raise InputError(
                f"{path}: loss {config.loss!r} takes exactly one negative a row, got {len(columns) - 2}; "
                "it needs the columns anchor, positive, negative"
            )
        if kind == "lists" and len(columns) < 3:
            raise InputError(
                f"{path}: loss {config.loss!r} compares at least two candidates a row; it needs the columns anchor, "
                "positive, negative[, negative_2, ...]"
            )
        groups = np.unique(pairs.groups, return_inverse=True)[1] if pairs.groups and kind == "pairs" else None
        rows = Rows(name, config, columns, groups)
    if len(rows) < 2:
        what = "contrastive training needs at least 2 pairs" if kind == "pairs" else "training needs at least 2 rows"
        raise InputError(f"{path}: {what}, got {len(rows)}")
    return rows


def _class_order(label: str) -> tuple[int, str]:
    return (int(label), "") if re.fullmatch(r"-?\d+", label) else (1 << 62, label)


def text_datasets(sets: Sequence[Rows]) -> Dataset | DatasetDict:
    """The data sets as the trainer underneath takes them: columns of texts, `label` beside them."""
    return _as_one({rows.name: Dataset.from_dict(rows.columns | _beside(rows)) for rows in sets})


def token_datasets(sets: Sequence[Rows], tokenizer: Any) -> tuple[Dataset | DatasetDict, "BagCollator"]:
    """Columns of numbers that stand for texts (equal texts, equal numbers), and a collator that knows their tokens."""
    distinct = dict.fromkeys(text for rows in sets for column in rows.columns.values() for text in column)
    number = {text: n for n, text in enumerate(distinct)}
    bags = TokenBags(tokenizer, list(distinct))
    made = {}
    for rows in sets:
        columns = {name: np.array([number[text] for text in texts]) for name, texts in rows.columns.items()}
        for name, numbers in columns.items():
            empty = np.flatnonzero(bags.lengths[numbers] == 0)
            if len(empty):
                text = rows.columns[name][int(empty[0])]
                where = f"{rows.config.path}: {name} of row {int(empty[0]) + 1}"
                raise InputError(f"{where} has no tokens ({text[:40]!r}); remove the row")
        made[rows.name] = NumberDataset.of(columns | _beside(rows))
    return _as_one(made), BagCollator(bags)


def _beside(rows: Rows) -> dict[str, Any]:
    """Columns that are not texts: labels, and the number of each row where a teacher is asked about it."""
    label = {} if rows.labels is None else {"label": rows.labels}
    return label | ({"row": np.arange(len(rows))} if rows.config.teacher else {})


def _as_one(datasets: dict[str, Dataset]) -> Dataset | DatasetDict:
    return next(iter(datasets.values())) if len(datasets) == 1 else DatasetDict(datasets)


class NumberDataset(Dataset):  # type: ignore[misc]
    """Columns of numbers whose batches come from arrays: an Arrow table takes longer to look rows up than a static
    encoder to train on them."""

    arrays: Mapping[str, NDArray[Any]] = MappingProxyType({})

    @classmethod
    def of(cls, columns: dict[str, NDArray[Any]]) -> "NumberDataset":
        """The data set of these columns."""
        made: NumberDataset = cls.from_dict(columns)
        made.arrays = columns
        return made

    def __getitems__(self, keys: list[int]) -> list[Any]:
        """The rows of a batch."""
        shown = self.format
        if shown["type"] is not None or shown["columns"] != list(self.arrays) or self._indices is not None:
            # No longer the table that it was made as.
            rows: list[Any] = super().__getitems__(keys)
            return rows
        values = zip(*(array[keys].tolist() for array in self.arrays.values()), strict=True)
        return [dict(zip(self.arrays, row, strict=True)) for row in values]


class RowCollator:
    """Another collator, and the rows' numbers beside what it makes."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.valid_label_columns = collator, collator.valid_label_columns

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator([{k: v for k, v in row.items() if k != "row"} for row in features])
        return batch | ({"row": torch.tensor([row["row"] for row in features])} if "row" in features[0] else {})


class BagCollator:
    """Rows of a batch (numbers of texts) -> token ids and offsets of every column, from bags made once."""

    valid_label_columns = ("label",)

    def __init__(self, bags: TokenBags) -> None:
        self.bags = bags

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Tensor | str] = {}
        for column in features[0]:
            if column == "dataset_name":
                batch[column] = features[0][column]
            elif column in BESIDE:
                batch[column] = torch.tensor([row[column] for row in features])
            else:
                ids, offsets = self.bags.take(np.fromiter((row[column] for row in features), np.int64, len(features)))
                batch[f"{column}_input_ids"] = torch.from_numpy(ids)
                batch[f"{column}_offsets"] = torch.from_numpy(offsets)
        return batch


class _Values:
    """Columns of a data set, row by row from memory."""

    def __init__(self, dataset: Dataset) -> None:
        plain = dataset.with_format(None)
        self.column_names = [name for name in plain.column_names if name not in BESIDE]
        self.columns = {name: plain[name][:] for name in self.column_names}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self.columns.items()}


class WithoutDuplicates(NoDuplicatesBatchSampler):
    """sentence-transformers' sampler that puts no text twice into a batch; groups and scores are not texts.

    Rows of one text that are left over at the end of an epoch make batches of one; these have nothing to be compared
    with and are left out.
    """

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(_Values(dataset), **options)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch for batch in super().__iter__() if len(batch) > 1)

    def __len__(self) -> int:
        count: int = super().__len__()
        return count - (not self.drop_last and len(self.dataset) % self.batch_size == 1)


def batches_by_label(dataset: Dataset, **options: Any) -> DefaultBatchSampler:
    """sentence-transformers' sampler that puts at least two rows of each of its classes into a batch."""
    return GroupByLabelBatchSampler(dataset.with_format(None), **options)


class NeighbourBatches(DefaultBatchSampler):
    """Batches of rows that are near each other, drawn anew each epoch from parts of the data set.

    The softmax over a batch then tells near rows from nearer ones; over all kinds of text it tells the kinds apart.
    Parts are strung together and cut, so that every row comes once an epoch and a batch may hold the ends of two.
    """

    def __init__(self, dataset: Dataset, parts: Sequence[NDArray[np.intp]], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.parts = parts

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        parts = [rng.permutation(self.parts[n]) for n in rng.permutation(len(self.parts))]
        rows = np.concatenate(parts)
        whole = len(rows) - len(rows) % self.batch_size
        for batch in rng.permutation(rows[:whole].reshape(-1, self.batch_size)):
            yield batch.tolist()
        if whole < len(rows) and not self.drop_last:
            yield rows[whole:].tolist()


class Teacher:
    """Another model's vectors of a data set's texts, made once."""

    def __init__(self, rows: Rows, bfloat16: bool = False) -> None:
        """Embed every distinct text, in mixed precision if asked, or read the file of vectors that `teacher` names.

        Raises:
            InputError: a file that has not one vector for each row, or no such model.
        """
        name = str(rows.config.teacher)
        if name.endswith((".npy", ".safetensors", ".parquet")):
            vectors = read_vectors(name)
            if len(vectors) != len(rows) or len(rows.columns) != 1:
                raise InputError(
                    f"{name} has {len(vectors)} vectors, but {rows.config.path} has {len(rows)} rows of "
                    f"{len(rows.columns)} texts; a file gives one vector for each row of one text, or name a model"
                )
            self.places = [np.arange(len(rows))]
        else:
            distinct = dict.fromkeys(text for column in rows.columns.values() for text in column)
            number = {text: n for n, text in enumerate(distinct)}
            self.places = [np.array([number[text] for text in column]) for column in rows.columns.values()]
            # As long as the model gives them: a teacher whose scores are dot products keeps them.
            encoder = load(name).encoder
            device = torch.device(getattr(getattr(encoder, "model", None), "device", "cpu")).type
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                vectors = encoder.vectors(list(distinct), 64, False)
        self.vectors = torch.from_numpy(np.array(vectors))

    def neighbourhoods(self, fewest: int) -> list[NDArray[np.intp]]:
        """Row numbers in parts of at least so many rows (all, if there are fewer) that lie near each other."""
        columns = [self.vectors[torch.from_numpy(places)] for places in self.places]
        return neighbourhoods(torch.stack(columns).sum(0).numpy(), fewest)

    def take(self, rows: Tensor) -> list[Tensor]:
        """(B, E) vectors of each column of some rows."""
        return [self.vectors[torch.from_numpy(places[rows.cpu().numpy()])] for places in self.places]


def paired(sets: Sequence[Rows]) -> list[list[str]]:
    """Columns of texts of all data sets: two whose rows belong together, or one if a data set has no more."""
    if any(len(rows.columns) < 2 for rows in sets):
        return [[text for rows in sets for text in rows.texts]]
    return [[text for rows in sets for text in list(rows.columns.values())[n]] for n in (0, 1)]


def spread(sets: Sequence[Rows], most: int) -> list[str]:
    """Documents at even distances through all data sets."""
    documents = [text for rows in sets for text in rows.documents]
    return documents[:: max(1, len(documents) // most)][:most]


def check_batches(sets: Sequence[Rows], batch_size: int) -> None:
    """Raise where a loss that compares rows of one class would find none to compare."""
    for rows in sets:
        if not rows.recipe.by_label:
            continue
        if batch_size < 4 or batch_size % 2:
            raise InputError(
                f"loss {rows.config.loss!r} compares rows of one class and takes two of each at a time; it needs "
                f"an even batch_size of at least 4, got {batch_size}"
            )
        assert rows.labels is not None, "losses by label read labels"
        if (np.bincount(rows.labels) >= 2).sum() < 2:
            raise InputError(
                f"{rows.config.path}: loss {rows.config.loss!r} compares rows of one class with others; it needs at "
                "least two classes of at least two rows"
            )


def leaves_one(rows: int, batch_size: int, wanted: Recipe) -> bool:
    """Whether an epoch would end on one row that its loss has nothing to compare with.

    It is left out then: each epoch has another order, and leaves out another row.
    """
    return wanted.other_rows and not wanted.by_label and rows % batch_size == 1


def batches(sets: Sequence[Rows], batch_size: int, mixing: str, drop_last: bool) -> int:
    """How many batches an epoch has."""
    each = [
        len(rows) // batch_size
        if drop_last or leaves_one(len(rows), batch_size, rows.recipe)
        else -(-len(rows) // batch_size)
        for rows in sets
    ]
    return min(each) * len(each) if mixing == "round_robin" else sum(each)
