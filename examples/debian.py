"""What the examples share: bundled pairs (a package's name and line, its description), a small model, a measure."""

import gzip
import itertools
import json

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import matryo as mt
from matryo.demo import DATA
from matryo.training.static import train_tokenizer

WIDTHS = [8, 16, 32, 64]


def pairs(count: int = 400) -> tuple[list[str], list[str]]:
    """Anchors and their positives."""
    with gzip.open(DATA / "train.jsonl.gz", "rt") as stream:
        rows = [json.loads(line) for line in itertools.islice(stream, count)]
    return [row["anchor"] for row in rows], [row["positive"] for row in rows]


def new_model(texts: list[str]) -> SentenceTransformer:
    """An untrained static encoder of 64 dimensions."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts, vocabulary=3000)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=WIDTHS[-1])], device="cpu")


def found(model: SentenceTransformer, width: int) -> float:
    """Share of anchors whose own positive is the nearest of all, at this width."""
    anchors, positives = (mt.truncate(model.encode(texts), width) for texts in pairs())
    return float(((anchors @ positives.T).argmax(1) == range(len(anchors))).mean())
