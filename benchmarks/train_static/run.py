"""Static training end to end: ours against sentence-transformers' StaticEmbedding, MatryoshkaLoss and own trainer.

    python benchmarks/train_static/run.py [--smoke] [--rounds 3]

Same tokeniser, D, widths, pairs, batch size, epochs, learning rate schedule and starting table (random rows weighted by
idf, ours) for both, so that the difference is the loss and the handling of tokens and rows. The clock runs from texts
in memory to a trained table: tokenising, building the trainer, training; not importing, reading or evaluating.
Their learning rate is tried at several values and the best of them by the mean over widths on the dev split is theirs.
Quality is nDCG@10 on the test split of the bundled Debian descriptions.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
import matryo as mt
from common import save
from matryo.core.metrics import Metric, measure
from matryo.core.ranking import ranks_at_widths
from matryo.core.records import Pairs, Retrieval, read_pairs, read_retrieval
from matryo.demo import DATA
from matryo.encoders.static import StaticEncoder
from matryo.training.config import DataConfig, StaticConfig
from matryo.training.data import Rows, token_datasets
from matryo.training.objective import NestedObjective, Part
from matryo.training.row_adam import RowAdam
from matryo.training.static import make_row_sparse, new_static, train_tokenizer
from matryo.training.trainer import NestedTrainer

WIDTHS = (16, 32, 64, 128, 256, 512)


def arguments(folder: str, options: Any, rate: float, rows: int, clip: float) -> SentenceTransformerTrainingArguments:
    steps = -(-rows // options.batch) * options.epochs
    return SentenceTransformerTrainingArguments(
        output_dir=folder,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        learning_rate=rate,
        warmup_steps=round(0.1 * steps),
        lr_scheduler_type="linear",
        max_grad_norm=clip,
        use_cpu=True,
        seed=0,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def finish(trainer: Any, table: torch.Tensor, start: float) -> tuple[np.ndarray, float]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return table.detach().numpy().copy(), time.perf_counter() - start


def ours(pairs: Pairs, tokenizer: Any, table: np.ndarray, options: Any, rate: float) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    module = StaticEmbedding(tokenizer, embedding_weights=table.copy())
    model = SentenceTransformer(modules=[module], device="cpu")
    columns = {"anchor": pairs.anchors, "positive": pairs.positives}
    dataset, collator = token_datasets([Rows("pairs", DataConfig(path="pairs"), columns)], tokenizer)
    nesting = mt.Nesting(WIDTHS)
    make_row_sparse(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = NestedTrainer(
            model=model,
            args=arguments(folder, options, rate, len(pairs), 0.0),
            train_dataset=dataset,
            loss=NestedObjective(model, nesting, {"pairs": Part("info_nce", {"temperature": 0.05}, nesting)}),
            data_collator=collator,
            optimizers=(RowAdam(model.parameters(), lr=rate), None),
        )
        return finish(trainer, model[0].embedding.weight, start)


def theirs(pairs: Pairs, tokenizer: Any, table: np.ndarray, options: Any, rate: float) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    module = StaticEmbedding(tokenizer, embedding_weights=table.copy())
    model = SentenceTransformer(modules=[module], device="cpu")
    loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), list(WIDTHS))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(folder, options, rate, len(pairs), 1.0),
            train_dataset=Dataset.from_dict({"anchor": pairs.anchors, "positive": pairs.positives}),
            loss=loss,
        )
        return finish(trainer, module.embedding.weight, start)


def quality(tokenizer: Any, table: np.ndarray, task: Retrieval) -> dict[int, float]:
    encoder = StaticEncoder(tokenizer, table)
    ranks = ranks_at_widths(encoder.vectors(task.queries), encoder.vectors(task.documents), task.judged, WIDTHS)
    return {width: float(measure(Metric("nDCG", 10), r, task.judged).mean()) for width, r in ranks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    pairs = read_pairs(DATA / "train.jsonl.gz")
    if options.smoke:
        pairs = Pairs(pairs.anchors[:600], pairs.positives[:600])
        options.batch, options.epochs, options.rounds, options.rates = 200, 1, 1, [0.2]
    dev, test = read_retrieval(DATA / "retrieval", "dev"), read_retrieval(DATA / "retrieval", "test")
    texts = [*pairs.anchors, *pairs.positives]
    tokenizer = train_tokenizer(texts, 15000)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        start = new_static(StaticConfig(width=512, tokenizer=Path(folder) / "tokenizer.json"), texts, 0)
    table = start[0].embedding.weight.detach().numpy().copy()

    best = {}
    for name, run in {"ours": ours, "theirs": theirs}.items():
        tried = {}
        for rate in options.rates:
            trained, _ = run(pairs, tokenizer, table, options, rate)
            tried[rate] = float(np.mean(list(quality(tokenizer, trained, dev).values())))
        best[name] = max(tried, key=lambda rate: tried[rate])
        print(f"{name}: dev mean by rate { {r: round(v, 4) for r, v in tried.items()} }", flush=True)
    rows = []
    for number in range(options.rounds):
        for name, run in {"ours": ours, "theirs": theirs}.items():
            trained, seconds = run(pairs, tokenizer, table, options, best[name])
            scores = quality(tokenizer, trained, test)
            row = {"contender": name, "round": number, "rate": best[name], "seconds": seconds, "pairs": len(pairs)}
            setting = {"epochs": options.epochs, "batch": options.batch, "seed": 0, "threads": torch.get_num_threads()}
            rows.append({**row, **setting, "ndcg10": scores})
            print(f"{name:7} {seconds:6.1f} s  {len(pairs) * options.epochs / seconds:7.0f} pairs/s  "
                  f"{ {w: round(v, 4) for w, v in scores.items()} }", flush=True)  # fmt: skip
    medians = {n: statistics.median(r["seconds"] for r in rows if r["contender"] == n) for n in ("ours", "theirs")}
    print(f"ours is {medians['theirs'] / medians['ours']:.2f}x as fast (medians of {options.rounds})")
    if not options.smoke:
        save(options.out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
