"""Is the promise of `Index.calibrate` kept on new queries, and what does keeping it cost?

    python benchmarks/search/promise.py --model runs/nested --sets retrieval/nfcorpus retrieval/debian --work runs/v
    python benchmarks/search/promise.py --smoke

For each set (BEIR layout) every query's recall@10 is measured once at every shortlist of the ladder, by real searches,
and once at every rung of the ladder in which each query stops by itself (see matryo.index.calibration). Then 200 random
splits: shortlists are chosen on one half of the queries, or on 300 of them, and looked at on the rest.

Printed for each set, plan and target:
  kept (rest)   share of splits in which the mean recall of the queries not used is at least the target. That mean is
                itself a draw: it can fall below the target when the expectation does not.
  kept (pool)   share in which the mean over all queries of the set, the best estimate of the expectation that the
                promise is about, is at least the target.
  shortlist     mean over splits (and queries, where each stops by itself), and as a multiple of the smallest fixed
                shortlist whose mean over all queries will do.

"calibrate" is what the product does: both ladders at half the error each, the shorter choice taken. "fixed" is the same
bet on the first ladder alone with all of the error. The same for two other tests: the predictable plug-in bet of
Waudby-Smith & Ramdas (2023, theorem 3) and Hoeffding-Bentkus (Bates et al. 2021). Rows go to results/promise-SET.jsonl.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo
from common import save
from matryo.core.plan import Plan, Stage
from matryo.core.promise import needed, p_value, shared, sizes
from matryo.core.records import rows as table_rows
from matryo.index import Index
from matryo.index.calibration import HALF, PROFILED, SEED, SHORTER, recalls_of, stopping, with_keep
from matryo.index.funnel import lengths
from matryo.index.snapshot import View

K, SPLITS, CONFIDENCE = 10, 200, 0.95
ENOUGH = 0.9995
"""Mean recall from which on no longer shortlist is looked at; calibrate would choose none."""
BUNDLED = Path(matryo.__file__).parent / "demo" / "data" / "retrieval"
Test = Callable[[np.ndarray, float, float], float]


def plug_in(recalls_Q: np.ndarray, target: float, confidence: float) -> float:
    """Stakes set by the variance of the queries before; their order matters, so it is that of the sample."""
    count = np.arange(1, len(recalls_Q) + 1)
    means = (0.5 + np.cumsum(recalls_Q)) / (count + 1)
    variances = (0.25 + np.cumsum((recalls_Q - means) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variances[:-1]])
    stakes = np.minimum(np.sqrt(-2 * math.log(1 - confidence) / (len(recalls_Q) * before)), 0.9 / target)
    return float(np.exp(-max(0.0, np.cumsum(np.log1p(stakes * (recalls_Q - target))).max())))


def hoeffding_bentkus(recalls_Q: np.ndarray, target: float, confidence: float) -> float:
    from scipy.stats import binom

    count, risk, most = len(recalls_Q), 1 - float(recalls_Q.mean()), 1 - target
    if risk >= most:
        return 1.0
    gap = (risk * math.log(risk / most) if risk else 0.0) + (1 - risk) * math.log((1 - risk) / (1 - most))
    return min(1.0, math.exp(-count * gap), math.e * float(binom.cdf(math.ceil(count * risk), count, most)))


TESTS: dict[str, Test] = {"fixed": p_value, "plug-in": plug_in, "Hoeffding-Bentkus": hoeffding_bentkus}


def encoded(model: Any, folder: Path, work: Path | None, cut: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of a set's documents and queries, kept in `work` for the next time."""
    found = []
    for part in ("corpus", "queries"):
        kept = work / f"{folder.name}.{part}.npy" if work else None
        if kept is not None and kept.exists():
            found.append(np.load(kept, allow_pickle=False))
            continue
        path = next(folder.glob(f"{part}.jsonl*"))
        texts = [f"{row.get('title') or ''} {row['text']}".strip()[:cut] for _, row in table_rows(path)]
        found.append(model.encode(texts))
        if kept is not None:
            np.save(kept, found[-1])
    return found[0], found[1]


class Ladder(NamedTuple):
    """(S, Q) recall and first shortlist of every query at every rung."""

    recalls: np.ndarray
    lengths: np.ndarray


def tables(index: Index, base: np.ndarray, queries: np.ndarray, plan: Plan) -> tuple[Ladder, Ladder]:
    """The ladder of one length for all queries, and the one in which each stops by itself."""
    view = View(index.snapshot())
    found = recalls_of(view, queries, K)
    rng = np.random.default_rng(SEED)
    stop = stopping(view, base[np.sort(rng.permutation(len(base))[:PROFILED])], plan, K, len(base))
    ladders: list[Ladder] = []
    for plan_of in (lambda n: with_keep(plan, n, K), stop):
        recalls, counts = [], []
        for size in sizes(K, len(base)):
            asked = plan_of(size)
            recalls.append(found(asked))
            counts.append(first_lengths(asked, queries, K, view))
            if recalls[-1].mean() >= ENOUGH:
                break
        ladders.append(Ladder(np.stack(recalls), np.stack(counts)))
    return ladders[0], ladders[1]


def first_lengths(plan: Plan, queries: np.ndarray, k: int, view: View) -> np.ndarray:
    """(Q,) rows that the first stage hands on."""
    first = plan.stages[0]
    if first.within is None:
        return np.full(len(queries), min(first.keep or k, view.count))
    return lengths(Plan((first, Stage(view.width, "float32"))), queries, k, view)


def chosen(recalls_SQ: np.ndarray, test: Test, target: float, confidence: float = CONFIDENCE) -> int:
    """The rung a walk from the top stops at; the top one if not even that passes."""
    low, high = -1, len(recalls_SQ)
    while high - low > 1:
        middle = (low + high) // 2
        passes = test(recalls_SQ[middle], target, confidence) <= 1 - confidence
        low, high = (low, middle) if passes else (middle, high)
    return min(high, len(recalls_SQ) - 1)


def calibrated(fixed: Ladder, stop: Ladder, some: np.ndarray, target: float) -> tuple[Ladder, int]:
    """What `Index.calibrate` chooses from these queries."""
    half = shared(CONFIDENCE, HALF)
    if len(some) < needed(target, half):
        return fixed, chosen(fixed.recalls[:, some], p_value, target)
    rungs = [chosen(ladder.recalls[:, some], p_value, target, half) for ladder in (fixed, stop)]
    means = [ladder.lengths[rung, some].mean() for ladder, rung in zip((fixed, stop), rungs, strict=True)]
    return (stop, rungs[1]) if means[1] <= SHORTER * means[0] else (fixed, rungs[0])


def splits(fixed: Ladder, stop: Ladder, name: str, target: float, sample: int) -> dict[str, Any]:
    rng, means = np.random.default_rng(0), fixed.recalls.mean(axis=1)
    least = float(fixed.lengths[int(np.argmax(means >= target))].mean())
    rest, pool, alone, keeps = 0, 0, 0, []
    for _ in range(SPLITS):
        order = rng.permutation(fixed.recalls.shape[1])
        if name == "calibrate":
            ladder, rung = calibrated(fixed, stop, order[:sample], target)
        else:
            ladder, rung = fixed, chosen(fixed.recalls[:, order[:sample]], TESTS[name], target)
        rest += ladder.recalls[rung, order[sample:]].mean() >= target
        pool += ladder.recalls[rung].mean() >= target
        alone += ladder is stop
        keeps.append(ladder.lengths[rung].mean())
    keep = float(np.mean(keeps))
    return {
        "sample": sample, "kept_rest": rest / SPLITS, "kept_pool": pool / SPLITS, "keep": keep, "least": least,
        "over_least": keep / least, "keep_low": int(np.min(keeps)), "keep_high": int(np.max(keeps)),
        "stopped_alone": alone / SPLITS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--sets", type=Path, nargs="+", default=[BUNDLED])
    parser.add_argument(
        "--plan", action="append", help="a plan whose shortlists are chosen (repeatable); by default four"
    )
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--work", type=Path, help="folder that keeps the vectors")
    parser.add_argument("--queries", type=int, default=2000, help="of each set, at most")
    parser.add_argument("--cut", type=int, default=400, help="characters of each text that are encoded")
    parser.add_argument("--smoke", action="store_true", help="a size that takes seconds, written nowhere")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    for folder in args.sets:
        base, queries = encoded(matryo.load(args.model), folder, args.work, args.cut)
        if args.smoke:
            base, queries, args.targets = base[:600], queries[:400], [0.9]
        kept = (base != 0).any(axis=1)
        base, queries = base[kept], queries[(queries != 0).any(axis=1)]
        queries = queries[np.random.default_rng(0).permutation(len(queries))[: args.queries]]
        full = base.shape[1]
        short = full // 4 // 8 * 8
        plans = args.plan or [
            f"{full // 2 // 8 * 8}:binary keep 400 > {full}:float32",
            f"{full // 8 * 8}:binary keep 400 > {full}:float32",
            f"{short}:int8 keep 400 > {full}:float32",
            f"{short}:binary keep 800 > {full}:int8 keep 100 > {full}:float32",
        ]
        with tempfile.TemporaryDirectory() as temporary, Index.create(f"{temporary}/index", width=full) as index:
            index.upsert([str(n) for n in range(len(base))], base)
            for plan in plans[:1] if args.smoke else plans:
                fixed, stop = tables(index, base, queries, Plan.parse(plan))
                for target in args.targets:
                    for sample in (len(queries) // 2, min(300, len(queries) // 3)):
                        if sample < needed(target, CONFIDENCE):
                            continue  # calibrate would refuse it
                        for name in ("calibrate", *TESTS):
                            row = splits(fixed, stop, name, target, sample)
                            where = {"set": folder.name, "items": len(base), "queries": len(queries), "plan": plan}
                            rows.append({**where, "model": args.model, "target": target, "test": name, **row})
                            print(
                                f"{folder.name:12} {plan:48} {target:.2f} {name:18} n={sample:<5}"
                                f" kept rest {row['kept_rest']:.3f} pool {row['kept_pool']:.3f}"
                                f" shortlist {row['keep']:7.1f} ({row['over_least']:.2f}x of {row['least']:.0f})"
                                f" {row['stopped_alone']:.2f}",
                                flush=True,
                            )
    if not args.smoke:
        for name in {row["set"] for row in rows}:
            mine = [row for row in rows if row["set"] == name]
            save(Path(__file__).parent / "results" / f"promise-{name}.jsonl", mine)


if __name__ == "__main__":
    main()
