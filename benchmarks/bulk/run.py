"""How much sooner are two workers done than one, when a corpus is encoded in bulk?

    python benchmarks/bulk/run.py [--rounds 3] [--scratch DIR]
    python benchmarks/bulk/run.py --smoke

A million short texts, put together from the bundled Debian synopses, in Parquet; a static model trained on the bundled
pairs; 128 dimensions as int8. Sides take turns, each in a process of its own: one process without Ray, Ray with one
worker, Ray with two, all of them with one thread a worker. `whole` is from the call to the manifest, starting Ray and
loading models included; `encoding` is from there on where the parts are handed out. All sides must write the same
bytes. `--smoke` leaves Ray out.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np
import pyarrow
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import save
from matryo.demo import DATA

ROWS, GROUP, FILES = 1_000_000, 25_000, 4
SIDES = {"one process": 0, "Ray, one worker": 1, "Ray, two workers": 2}
ONCE = """
import json, sys, time
from matryo.bulk import Bulk, Ray, embed
model, corpus, out, workers, part_rows = sys.argv[1:]
ray = Ray(address="local", workers=int(workers)) if int(workers) else None
steps, started = [], time.perf_counter()
found = embed(model, [corpus], out, Bulk(width=128, code="int8", part_rows=int(part_rows)), ray=ray,
              report=steps.append)
whole = time.perf_counter() - started
told = {"whole_s": whole, "encoding_s": steps[-1].seconds, "rows": found["rows"], "checksum": found["checksum"]}
sys.stderr.write(json.dumps(told) + "\\n")
"""


def make_corpus(folder: Path, rows: int, group: int, files: int) -> None:
    """Two synopses a row, in every order: none of them blank, about sixty characters."""
    with gzip.open(DATA / "train.jsonl.gz", "rt") as stream:
        texts = [json.loads(line)["anchor"] for line in stream]
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(files):
        first, second = rng.integers(0, len(texts), (2, rows // files))
        column = [f"{texts[i]}, {texts[j]}" for i, j in zip(first, second, strict=True)]
        ids = [f"{n}-{i}" for i in range(rows // files)]
        pyarrow.parquet.write_table(
            pyarrow.table({"_id": ids, "text": column}), folder / f"{n}.parquet", row_group_size=group
        )


def make_model(folder: Path, smoke: bool) -> None:
    from matryo.training import StaticConfig, TrainConfig, train

    static = StaticConfig(width=32, vocabulary=2000) if smoke else StaticConfig(width=256, vocabulary=15000)
    widths = (16, 32) if smoke else (128, 256)
    train(
        TrainConfig(
            pairs=DATA / "train.jsonl.gz",
            out=folder,
            widths=widths,
            static=static,
            epochs=1,
            max_steps=3 if smoke else 16,
        )
    )


def once(model: Path, corpus: Path, out: Path, workers: int, group: int, width: int) -> dict[str, Any]:
    """One whole encoding in a fresh process."""
    code = ONCE.replace("width=128", f"width={width}")
    line = [sys.executable, "-c", code, *map(str, (model, corpus, out, workers, group))]
    before, started = busy_seconds(), time.perf_counter()
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    busy = (busy_seconds() - before) / (time.perf_counter() - started)
    if ran.returncode:
        sys.exit(ran.stderr)
    shutil.rmtree(out)
    told: dict[str, Any] = json.loads(ran.stderr.splitlines()[-1])
    return told | {"busy_cores": busy}


def busy_seconds() -> float:
    """Seconds that all cores together have worked for anyone: tells whether the machine was ours alone."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def earlier(path: Path) -> list[dict[str, Any]]:
    names = ("what", "side", "workers", "round", "whole_s", "encoding_s", "rows", "checksum", "busy_cores")
    rows = map(json.loads, path.read_text().splitlines())
    return [{name: row[name] for name in names} for row in rows if row["what"] == "run"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one process, few rows, written nowhere")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--append", action="store_true", help="go on after the rounds that are in the results")
    parser.add_argument("--scratch", type=Path, help="folder for model and corpus, which are made if not there")
    parser.add_argument("--prepare", action="store_true", help="only make model and corpus in --scratch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    sides = {"one process": 0} if options.smoke else SIDES
    rows, group, files = (2000, 250, 2) if options.smoke else (ROWS, GROUP, FILES)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        if not (scratch / "model").exists():
            make_model(scratch / "model", options.smoke)
        if not (scratch / "corpus").exists():
            make_corpus(scratch / "corpus", rows, group, files)
        if options.prepare:
            return
        found = earlier(options.out / "rows.jsonl") if options.append else []
        start = len({row["round"] for row in found})
        for turn in range(start, start + (1 if options.smoke else options.rounds)):
            for side, workers in sides.items():
                width = 32 if options.smoke else 128
                told = once(scratch / "model", scratch / "corpus", scratch / "out", workers, group, width)
                found.append({"what": "run", "side": side, "workers": workers, "round": turn, **told})
                spent = f"whole {told['whole_s']:.1f} s, encoding {told['encoding_s']:.1f} s"
                print(f"{side}: {spent}, {told['busy_cores']:.2f} cores busy", flush=True)
            if len({row["checksum"] for row in found}) > 1 or {row["rows"] for row in found} != {rows}:
                sys.exit("the sides did not write the same vectors")
            if not options.smoke:  # after every round, that one which is cut off costs itself alone
                save(options.out / "rows.jsonl", [*found, *summary(found)])


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each side, and how much sooner two workers were done than one."""
    names = ("whole_s", "encoding_s")
    told: list[dict[str, Any]] = []
    for side, workers in SIDES.items():
        mine = [row for row in found if row["side"] == side]
        middle = {name: statistics.median(row[name] for row in mine) for name in names}
        speed = mine[0]["rows"] / middle["encoding_s"]
        told.append({"what": "median", "side": side, "workers": workers, **middle, "rows_per_second": speed})
        print(f"{side}: {speed:,.0f} rows/s, whole {middle['whole_s']:.1f} s")
    one, two = told[1:]
    ratio = {name: one[name] / two[name] for name in names}
    print(f"two workers against one: {ratio['encoding_s']:.2f}x encoding, {ratio['whole_s']:.2f}x whole")
    return [*told, {"what": "one worker / two", "rounds": len({row["round"] for row in found}), **ratio}]


if __name__ == "__main__":
    main()
