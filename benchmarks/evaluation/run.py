"""What does measuring every width cost beside measuring full width alone? Encoding is left out on both sides.

    python benchmarks/evaluation/run.py                 # 3,911 queries x 6,005 documents x 512 dimensions
    python benchmarks/evaluation/run.py --size smoke    # a second or two

The two sides run in turn (full, all, full, all, ...), so that a busy machine disturbs both alike; the figures are
medians. Every run is a row of raw.jsonl with machine, versions and seed; the summary is made from those rows alone.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from matryo import __version__
from matryo.core.metrics import Judgements, Metric, measure
from matryo.core.prefix import truncate
from matryo.core.ranking import ranks_at_widths

SIZES = {"full": (3911, 6005, 512, 15), "smoke": (300, 500, 512, 5)}
WIDTHS = [4, 8, 16, 32, 64, 128, 256, 512]
TARGET = 1.6


def main() -> None:
    """Measure, write raw rows, print the summary; exit 1 with --check where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--repeats", type=int)
    parser.add_argument(
        "--out", type=Path, help="raw rows; by default raw.jsonl beside this file, for smoke under runs/"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help=f"fail above {TARGET} (full size only)")
    chosen = parser.parse_args()
    queries, documents, full, repeats = SIZES[chosen.size]
    rows = [
        {**row, **about(chosen.size, chosen.seed)}
        for row in measured(queries, documents, full, chosen.repeats or repeats, chosen.seed)
    ]
    smoke = Path("runs/evaluation-smoke.jsonl")
    out: Path = chosen.out or (smoke if chosen.size == "smoke" else Path(__file__).with_name("raw.jsonl"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratio = summary(out)
    if chosen.check and chosen.size == "full" and ratio > TARGET:
        raise SystemExit(1)


def measured(queries: int, documents: int, full: int, repeats: int, seed: int) -> list[dict[str, object]]:
    """Seconds of ranking and scoring, full width alone and all widths in turn, after one run of each to warm up."""
    rng = np.random.default_rng(seed)
    q, d = (truncate(rng.standard_normal((n, full)).astype(np.float32), full) for n in (queries, documents))
    judged = Judgements(np.arange(queries), rng.integers(0, documents, queries), np.ones(queries), queries)
    metric = Metric.parse("nDCG@10")
    rows: list[dict[str, object]] = []
    for repeat in range(-1, repeats):
        for side, widths in (("full width", [full]), ("all widths", WIDTHS)):
            start = time.perf_counter()
            found = ranks_at_widths(q, d, judged, widths)
            values = {width: float(measure(metric, ranks, judged).mean()) for width, ranks in found.items()}
            seconds = time.perf_counter() - start
            shape = {"queries": queries, "documents": documents, "width": full, "widths": widths}
            if repeat >= 0:
                rows.append({"side": side, "repeat": repeat, "seconds": seconds, **shape, "nDCG@10": values[full]})
    return rows


def about(size: str, seed: int) -> dict[str, object]:
    """What a reader needs to place a row."""
    return {
        "size": size,
        "seed": seed,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "matryo": __version__,
    }


def summary(path: Path) -> float:
    """Print medians and their ratio from the raw rows."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    medians = {
        side: statistics.median(row["seconds"] for row in rows if row["side"] == side)
        for side in ("full width", "all widths")
    }
    first = rows[0]
    ratio = medians["all widths"] / medians["full width"]
    print(f"{first['queries']:,} queries x {first['documents']:,} documents x {first['width']}, {first['cores']} cores")
    for side, seconds in medians.items():
        print(f"  {side}: {seconds:.3f} s (median of {len(rows) // 2})")
    print(f"  {len(WIDTHS)} widths cost {ratio:.2f} x full width alone (target {TARGET})")
    return ratio


if __name__ == "__main__":
    main()
