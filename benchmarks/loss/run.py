"""nested_info_nce against sentence-transformers' MatryoshkaLoss, on the same embeddings, in one process, interleaved.

    python benchmarks/loss/run.py [--smoke]

Time is the median over rounds of forward plus backward, every contender once a round; a ratio is the median of
the rounds' ratios. Memory is the peak of resident memory during one forward plus backward above what was resident
before, each contender in a process of its own, the gradients of the embeddings (which every contender must return)
included. The floor is one width done by hand: normalise, one product, softmax, two products.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import peak_bytes, reset_peak, save
from matryo.losses import nested_info_nce

CASES = {
    "doubling": (4096, 1024, [32, 64, 128, 256, 512, 1024]),
    "many": (1024, 768, list(range(8, 769, 8))),
}
SMOKE = {"doubling": (256, 128, [16, 32, 64, 128]), "many": (128, 64, list(range(8, 65, 8)))}


class Ready(nn.Module):
    """A model whose embeddings are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def get_embedding_dimension(self) -> int:
        return self.width

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["embedding"]}


def contenders(size: int, full: int, widths: list[int]) -> dict[str, Callable[[], None]]:
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    make = torch.Generator().manual_seed(0)
    anchors = torch.randn(size, full, generator=make).requires_grad_()
    positives = (anchors.detach() + torch.randn(size, full, generator=make)).requires_grad_()
    model, labels, nesting = Ready(full), torch.arange(size), mt.Nesting(widths)
    plain = MultipleNegativesRankingLoss(model)
    matryoshka = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), widths)

    def theirs(loss: nn.Module) -> None:
        anchors.grad = positives.grad = None
        loss([{"embedding": anchors}, {"embedding": positives}], labels).backward()

    def ours() -> None:
        anchors.grad = positives.grad = None
        nested_info_nce(anchors, positives, nesting=nesting, temperature=0.05).backward()

    def floor() -> None:
        with torch.no_grad():
            a, c = F.normalize(anchors), F.normalize(positives)
            weights = torch.softmax((a @ c.T).mul_(20), 1)
            weights.diagonal().sub_(1)
            weights @ c, weights.T @ a

    return {
        "nested_info_nce": ours,
        "MatryoshkaLoss": lambda: theirs(matryoshka),
        "MNRL full width": lambda: theirs(plain),
        "floor, one width": floor,
    }


def memory(name: str, case: str, smoke: bool) -> int:
    """Bytes above the resident embeddings at the peak of one forward plus backward, measured in a fresh process."""
    command = [sys.executable, __file__, "--child", name, case, *(["--smoke"] if smoke else [])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def child(name: str, case: str, smoke: bool) -> None:
    # A tiny call first, so that code and thread pools are resident before the measured one.
    contenders(64, 32, [8, 16, 32])[name]()
    run = contenders(*(SMOKE if smoke else CASES)[case])[name]
    gc.collect()
    before = reset_peak()
    run()
    print(peak_bytes() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.smoke)
        return
    rows = []
    for case, shape in (SMOKE if options.smoke else CASES).items():
        runs = contenders(*shape)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(1 + (2 if options.smoke else options.rounds)):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        peaks = {name: memory(name, case, options.smoke) for name in runs}
        ours = times["nested_info_nce"][1:]
        print(f"\n{case}: B={shape[0]} D={shape[1]} widths={len(shape[2])}")
        for name, taken in times.items():
            median = statistics.median(taken[1:])
            memory_ratio = peaks["nested_info_nce"] / max(1, peaks[name])
            # Round by round, so that a slow minute of the machine is slow for both.
            ratio = statistics.median(mine / this for mine, this in zip(ours, taken[1:], strict=True))
            print(
                f"  {name:18} {median:7.3f} s [{min(taken[1:]):.3f}, {max(taken[1:]):.3f}]  {peaks[name] / 1e6:7.0f} MB"
                f"   ours / this: time {ratio:.2f}, memory {memory_ratio:.2f}"
            )
            row = {"case": case, "B": shape[0], "D": shape[1], "widths": len(shape[2]), "contender": name, "seed": 0}
            rows.append({**row, "seconds": taken[1:], "peak_bytes": peaks[name], "threads": torch.get_num_threads()})
    if not options.smoke:
        save(options.out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
