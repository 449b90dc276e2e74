"""Labelled tasks: a train split and a test split of items with a class each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError
from matryo.core.records import read_labelled, rows

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class LabelledTask:
    """Items of known classes to learn from, and others to be measured on.

    `train` and `test` hold the items an encoder takes (texts or images), and may be empty where ready vectors are
    measured. `coarse` maps each class to a class of classes.
    """

    name: str
    train_labels: Sequence[str]
    test_labels: Sequence[str]
    train: Sequence[Any] | NDArray[Any] = ()
    test: Sequence[Any] | NDArray[Any] = ()
    coarse: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        train = check_labels(self.train_labels, "train labels")
        test = check_labels(self.test_labels, "test labels")
        object.__setattr__(self, "train_labels", train)
        object.__setattr__(self, "test_labels", test)
        for items, labels, split in ((self.train, train, "train"), (self.test, test, "test")):
            if len(items) not in (0, len(labels)):
                raise InputError(f"{self.name}: {len(items)} {split} items but {len(labels)} labels; give one for each")
        counts = Counter(train)
        if len(counts) < 2:
            raise InputError(f"{self.name}: train holds the one class {train[0]!r}; at least two are needed")
        if max(counts.values()) < 2:
            raise InputError(f"{self.name}: every class has one item in train, so nothing can be learned of any")
        unknown = sorted(set(test) - set(counts))
        if unknown:
            raise InputError(
                f"{self.name}: {len(unknown)} classes of test are missing in train ({', '.join(unknown[:3])}); "
                "add items of them to train or leave them out of test"
            )
        unmapped = sorted(set(counts) - set(self.coarse)) if self.coarse else []
        if unmapped:
            raise InputError(f"{self.name}: coarse has no class for {', '.join(unmapped[:3])}; map every class")

    @property
    def classes(self) -> list[str]:
        """The classes of train, in order of their names."""
        return sorted(set(self.train_labels))

    @property
    def targets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The labels of both splits as places in `classes`."""
        place = {name: n for n, name in enumerate(self.classes)}
        train = np.array([place[label] for label in self.train_labels], dtype=np.int64)
        return train, np.array([place[label] for label in self.test_labels], dtype=np.int64)


def check_labels(labels: Sequence[Any] | NDArray[Any], what: str = "labels") -> list[str]:
    """Labels as text; each is text or a whole number, or an InputError names the first that is neither."""
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if not values:
        raise InputError(f"{what}: there are none; give the class of every item")
    for n, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise InputError(f"{what}[{n}] must be text or a whole number, got {value!r}")
    return [str(value) for value in values]


def read_labelled_task(folder: str | Path) -> LabelledTask:
    """A folder with files `train.*` and `test.*` of columns text, label and, if there, coarse."""
    folder = Path(folder)
    parts = {split: _part(folder, split) for split in ("train", "test")}
    missing = [split for split, path in parts.items() if path is None]
    if missing:
        raise InputError(f"{folder}: no {missing[0]} file; a labelled set is a folder with train.jsonl and test.jsonl")
    read = {split: read_labelled(path) for split, path in parts.items() if path is not None}
    coarse: dict[str, str] = {}
    for path in parts.values():
        for line, row in rows(path) if path else ():
            wide = row.get("coarse")
            if wide is not None and coarse.setdefault(str(row["label"]), str(wide)) != str(wide):
                raise InputError(f"{path} line {line}: class {row['label']!r} has two coarse classes; keep one")
    train, test = read["train"], read["test"]
    return LabelledTask(folder.resolve().name, train.labels, test.labels, train.texts, test.texts, coarse)


def is_labelled(folder: Path) -> bool:
    """Whether a folder looks like a labelled set: a train or a test file and no judgements."""
    return any(_part(folder, split) for split in ("train", "test")) and not (folder / "qrels").exists()


def _part(folder: Path, split: str) -> Path | None:
    return next((path for e in ENDINGS for path in [folder / f"{split}{e}", *sorted(folder.glob(f"*_{split}{e}"))]
                 if path.is_file()), None)  # fmt: skip
