"""The scripts behind docs/results.md run, each as its page gives it, on data of a size that only shows that they do."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
pytestmark = pytest.mark.slow


def ran(script: str, *words: object) -> None:
    """Run a script to its end."""
    said = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *map(str, words)], capture_output=True, text=True, timeout=600
    )
    assert said.returncode == 0, said.stderr[-3000:]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_gz(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def texts(debian_rows, tmp_path):
    """Pairs of two sources, scored pairs and a retrieval folder."""
    rows = debian_rows[:60]
    pairs = [{**row, "source": "ab"[n % 2], "group": f"group {n}"} for n, row in enumerate(rows)]
    scored = [{"sentence1": r["anchor"], "sentence2": r["positive"], "score": n % 6} for n, r in enumerate(rows[:20])]
    found = tmp_path / "found"
    write_gz(
        found / "corpus.jsonl.gz", [{"_id": f"d{n}", "title": "", "text": r["positive"]} for n, r in enumerate(rows)]
    )
    write_gz(found / "queries.jsonl.gz", [{"_id": f"q{n}", "text": row["anchor"]} for n, row in enumerate(rows[:20])])
    (found / "qrels").mkdir()
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(20))
    (found / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return write_gz(tmp_path / "pairs.jsonl.gz", pairs), write_gz(tmp_path / "scored.jsonl.gz", scored), found


@pytest.mark.parametrize("how", ["contrast", "taught"])
def test_depth(texts, tmp_path, how):
    pairs, scored, found = texts
    common = ["--size", 24, "--cut", 60, "--batch", 8, "--resamples", 20, "--work", tmp_path / "work"]
    taught = ["--taught", "--align", 0, "--rotate", "--layers", 1, 3, 6, 4, 5, 6, "--own", scored, found]
    out = tmp_path / "rows.jsonl"
    ran("depth/minilm.py", "--pairs", pairs, "--sts", scored, "--retrieval", found, "--results", out, *common,
        *(taught if how == "taught" else ()))  # fmt: skip
    *scores, speed = rows_of(out)
    assert {(row["model"], row["depth"], row["width"]) for row in scores} >= {("2d", 3, 192), ("start", 6, 384)}
    assert speed["speed"] > 1


def test_text_labels(tmp_path):
    for split, count in (("train", 60), ("val", 40), ("test", 40)):
        rows = [{"text": f"a {what} of {n}", "label": what} for n in range(count // 2) for what in ("dog", "cat")]
        write_gz(tmp_path / f"clinc150_{split}.jsonl.gz", rows)
    ran("cascade/clinc.py", tmp_path, "--model", "toy", "--out", tmp_path / "rows.jsonl")
    assert [row["lost"] for row in rows_of(tmp_path / "rows.jsonl")] == [None, 0.0, 0.002, 0.01, 0.03]


@pytest.fixture
def pictures(tmp_path):
    """Both splits, of four classes of plain colours with noise."""
    from PIL import Image

    rng, colours = np.random.default_rng(0), np.random.default_rng(1).integers(0, 256, (4, 3))
    for split, count in (("train", 80), ("val", 40)):
        labels, files = np.arange(count) % 4, []
        for label in labels:
            file = io.BytesIO()
            noisy = np.clip(colours[label] + rng.normal(0, 30, (64, 64, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG")
            files.append({"bytes": file.getvalue(), "path": None})
        names = [f"a plain colour, number {label}" for label in labels]
        for name in {split, split.replace("val", "test")}:
            pq.write_table(pa.table({"image": files, "label": labels, "text": names}), tmp_path / f"{name}.parquet")
    return tmp_path


def test_pictures(pictures, tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "rows"
    common = [pictures, "--scratch", scratch, "--seeds", 1]
    ran(
        "images/tiny.py", *common, "--epochs", 1, "--models", "mrl", "mrl-e", "ff-1024", "--results", out / "tiny.jsonl"
    )
    assert [row["model"] for row in rows_of(out / "tiny.jsonl")] == ["mrl", "mrl-e", "ff-1024"]
    ran("images/baselines.py", *common, "--widths", 8, 64, "--results", out / "baselines.jsonl")
    assert {row["way"] for row in rows_of(out / "baselines.jsonl")} >= {"prefix", "SVD", "PCA"}
    for heads in ("trained", "fitted"):
        ran("images/cascade.py", *common, "--models", "mrl", "--heads", heads, "--results", out / f"{heads}.jsonl")
        assert {row["heads"] for row in rows_of(out / f"{heads}.jsonl")} == {heads}
    ran("images/probes.py", *common, "--widths", 8, 16, "--results", out / "probes.jsonl")
    ran("images/funnel.py", *common, "--keep", 20, "--results", out / "funnel.jsonl")
    assert rows_of(out / "probes.jsonl")
    assert rows_of(out / "funnel.jsonl")


def test_pictures_and_texts(pictures, tmp_path):
    out = tmp_path / "rows.jsonl"
    ran("images/clipart.py", pictures, "--scratch", tmp_path / "scratch", "--epochs", 1, "--results", out)
    assert set(rows_of(out)[0]["recall"]["8"]) == {"image to text", "text to image"}
