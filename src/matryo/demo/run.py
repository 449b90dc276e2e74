"""Train, measure against baselines, index, search at several widths, write one page."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matryo.adapters import PCA
from matryo.core.errors import InputError
from matryo.core.files import storage_errors, write_text
from matryo.core.plan import Plan
from matryo.core.records import read_pairs, read_retrieval, rows
from matryo.encoders import Model, load
from matryo.encoders.folder import CARD, fingerprint
from matryo.evaluation import Report, evaluate
from matryo.evaluation.report import Section
from matryo.index import Index

if TYPE_CHECKING:
    from matryo.training import Step

DATA = Path(__file__).parent / "data"
WIDTHS = (16, 32, 64, 128, 256, 512)
VOCABULARY = 15000
QUESTIONS = (
    "puzzle game for the terminal",
    "convert pictures between image formats",
    "library to parse JSON in C++",
    "monitor network traffic",
    "edit music scores",
)
TWIN, TWIN_PCA = "un-nested twin, cut", "un-nested twin, PCA"
Say = Callable[[str], None]


def demo(out: Path, say: Say, report: "Callable[[str, Step], None] | None" = None, seed: int = 0) -> Path:
    """Run the whole path into the folder `out`; what is there already of it is used again.

    Args:
        out: gets `nested/` and `twin/` (models), `debian.matryo/` (index), `report.html`, `report.json`.
        say: called with each line of the story.
        report: called with the name of the model in training and its step.

    Returns:
        The page that was written.
    """
    started = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder")
    with storage_errors(f"creating {out}"):
        out.mkdir(parents=True, exist_ok=True)
    nested = _trained(out / "nested", WIDTHS, seed, say, report)
    twin = _trained(out / "twin", WIDTHS[-1:], seed, say, report)
    say("measuring every width and code on the test split, against baselines ...")
    found = _measured(nested, twin, seed)
    say(found.table())
    paired = paired_section(found)
    say(_plain(paired))
    index = _indexed(out / "debian.matryo", nested, say)
    with index:
        answers = _side_by_side(index, nested)
        say(_plain(answers))
    page = found.save(out / "report.html", extra=[paired, answers])
    write_text(out / "report.json", found.to_json(per_query=True) + "\n")
    say(f"wrote {page} after {time.perf_counter() - started:.0f} s")
    return page


def _trained(
    folder: Path, widths: Sequence[int], seed: int, say: Say, report: "Callable[[str, Step], None] | None"
) -> Model:
    from matryo.training import StaticConfig, TrainConfig, train
    from matryo.training.trainer import checkpoints

    if (folder / CARD).is_file():
        say(f"{folder} is there already")
        return load(folder)
    what = "a nested" if len(widths) > 1 else "the un-nested twin of the"
    say(f"training {what} static model of {widths[-1]} dimensions from scratch ...")
    start = time.perf_counter()
    config = TrainConfig(
        pairs=DATA / "train.jsonl.gz",
        out=folder,
        widths=tuple(widths),
        static=StaticConfig(width=widths[-1], vocabulary=VOCABULARY),
        dev=DATA / "retrieval",
        seed=seed,
    )
    named = None if report is None else (lambda step: report(folder.name, step))
    model = train(config, resume=bool(checkpoints(folder / "checkpoints")), report=named)
    say(f"  trained in {time.perf_counter() - start:.0f} s, saved in {folder}")
    return model


def _measured(nested: Model, twin: Model, seed: int) -> Report:
    task = read_retrieval(DATA / "retrieval", "test")
    sample = read_pairs(DATA / "train.jsonl.gz").positives
    # One PCA of the twin at full width; its components come in order, so every width is a prefix of it.
    pca = PCA().fit(twin.encode(sample))
    queries, documents = twin.encode(task.queries), twin.encode(task.texts)
    return evaluate(
        nested,
        task,
        widths=(8, *WIDTHS, 200),
        codes=("float32", "int8", "binary"),
        twins={TWIN: (queries, documents), TWIN_PCA: (pca.transform(queries), pca.transform(documents))},
        fit_vectors=nested.encode(sample),
        against=TWIN_PCA,
        name="nested",
        seed=seed,
        command="make demo",
    )


def paired_section(report: Report) -> Section:
    """The nested model minus each baseline, width by width, with paired bootstrap intervals over the queries."""
    metric = str(report.metric)
    mine = {row.width: row for row in report.select(metric, "nested", "float32")}
    lines = []
    for name in report.models:
        if name == "nested":
            continue
        for other in report.select(metric, name, "float32"):
            if other.width in mine and other.width < max(mine):
                difference, low, high = report.paired(mine[other.width], other)
                lines.append((name, str(other.width), f"{difference:+.4f}", f"{low:+.4f} to {high:+.4f}"))
    return Section(
        f"Nested minus baseline, {metric}",
        ("baseline", "width", "difference", "95 % interval"),
        lines,
        "Differences query by query, bootstrap over queries. An interval that leaves out 0 is a difference.",
    )


def _indexed(folder: Path, model: Model, say: Say) -> Index:
    identity: dict[str, Any] = {"name": str(Path(model.name).resolve()), **fingerprint(model.name)}
    if folder.exists():
        return Index.open(folder, model=identity)
    corpus = [row for _, row in rows(DATA / "retrieval/corpus.jsonl.gz")]
    full = model.width
    index = Index.create(folder, width=full, plan=f"{full // 4}:binary keep 400 > {full}:float32", model=identity)
    texts = [row["text"] for row in corpus]
    index.upsert(
        [row["_id"] for row in corpus], model.encode(texts), texts, [{"section": row["section"]} for row in corpus]
    )
    say(f"indexed {len(index)} descriptions in {folder}")
    return index


def _side_by_side(index: Index, model: Model) -> Section:
    """The best answer to each question at several widths, with the median time of a search."""
    full = model.width
    plans = [Plan.parse(f"{width}:float32") for width in (16, 64, full)]
    plans.append(Plan.parse(index.stats()["plan"]))
    vectors = model.encode(QUESTIONS)
    lines = []
    for question, vector in zip(QUESTIONS, vectors, strict=True):
        for plan in plans:
            times = []
            for _ in range(9):
                start = time.perf_counter()
                hits = index.search(vector, k=3, plan=plan)
                times.append(time.perf_counter() - start)
            lines.append((question, str(plan), ", ".join(hits.ids[0]), f"{1000 * float(np.median(times)):.2f} ms"))
    return Section(
        "The same questions at several widths",
        ("question", "plan", "best three packages", "time"),
        lines,
        f"{len(index)} descriptions in the index; the time is the median of 9 searches, encoding the question aside.",
    )


def _plain(section: Section) -> str:
    table = [tuple(section.headers), *section.rows]
    sizes = [max(len(row[c]) for row in table) for c in range(len(section.headers))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in table]
    return "\n".join([section.title, *lines, section.note])
