"""nested_cross_entropy with a tied head at nine widths against the full-width head alone, in one process, interleaved.

    python benchmarks/head/run.py [--smoke]

Time is the median over rounds of forward plus backward (gradients of features, weight and bias), every contender once
a round; a ratio is the median of the rounds' ratios. Memory is the peak of resident memory during one forward plus
backward above what was resident before, each contender in a process of its own, the gradients included. "one head per
width" is what the tied head saves: the same sum with F.linear on every prefix.
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
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import peak_bytes, reset_peak, save
from matryo.losses import NestedHead, nested_cross_entropy

CASES = {"B=256": (256, 10_000, 8, 2048), "B=1024": (1024, 10_000, 8, 2048)}
SMOKE = {"small": (32, 500, 8, 64)}
OURS, FULL = "NestedHead tied, all widths", "full head alone"


def contenders(size: int, classes: int, first: int, full: int) -> dict[str, Callable[[], None]]:
    make = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    nesting = mt.Nesting.doubling(first, full)
    head = NestedHead(nesting, classes, tied=True)
    weight, bias = head.linears[0].weight, head.linears[0].bias
    features = torch.randn(size, full, generator=make).requires_grad_()
    labels = torch.randint(classes, (size,), generator=make)

    def clear() -> None:
        features.grad = weight.grad = bias.grad = None

    def ours() -> None:
        clear()
        nested_cross_entropy(features, labels, head, nesting=nesting).backward()

    def full_head() -> None:
        clear()
        F.cross_entropy(F.linear(features, weight, bias), labels).backward()

    def plain() -> None:
        clear()
        torch.stack(
            [F.cross_entropy(F.linear(features[:, :d], weight[:, :d], bias), labels) for d in nesting.widths]
        ).sum().backward()

    return {OURS: ours, FULL: full_head, "one head per width": plain}


def memory(name: str, case: str, smoke: bool) -> int:
    """Bytes above what was resident at the peak of one forward plus backward, measured in a fresh process."""
    command = [sys.executable, __file__, "--child", name, case, *(["--smoke"] if smoke else [])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def child(name: str, case: str, smoke: bool) -> None:
    # A tiny call first, so that code and thread pools are resident before the measured one.
    contenders(8, 50, 8, 32)[name]()
    run = contenders(*(SMOKE if smoke else CASES)[case])[name]
    gc.collect()
    before = reset_peak()
    run()
    print(peak_bytes() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
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
        for turn in range(1 + (2 if options.smoke else options.rounds)):
            # There and back: what one contender leaves in the allocator and the caches meets each of the others.
            for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        peaks = {name: memory(name, case, options.smoke) for name in runs}
        print(f"\n{case}: B={shape[0]} C={shape[1]} widths {shape[2]}..{shape[3]} doubling")
        for name, taken in times.items():
            # Round by round, so that a slow minute of the machine is slow for both.
            ratio = statistics.median(mine / this for mine, this in zip(times[OURS][1:], taken[1:], strict=True))
            print(
                f"  {name:28} {statistics.median(taken[1:]):7.3f} s [{min(taken[1:]):.3f}, {max(taken[1:]):.3f}]"
                f"  {peaks[name] / 1e6:6.0f} MB   ours / this: time {ratio:.2f}, "
                f"memory {peaks[OURS] / max(1, peaks[name]):.2f}"
            )
            row = {"case": case, "B": shape[0], "C": shape[1], "D": shape[3], "first": shape[2], "contender": name}
            rows.append({**row, "seconds": taken[1:], "peak_bytes": peaks[name], "threads": torch.get_num_threads()})
    if not options.smoke:
        save(options.out / "rows.jsonl", [{**row, "seed": 0} for row in rows])


if __name__ == "__main__":
    main()
