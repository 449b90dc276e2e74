"""Vectors of a nested model over real texts, for the benchmarks of this folder.

    matryo train general/train.jsonl.gz --dim 768 --widths 24,48,96,192,384,768 --epochs 2 --out runs/general
    python benchmarks/search/vectors.py --model runs/general --texts general/train.jsonl.gz corpus.jsonl.gz \\
        --query-texts general/dev.jsonl.gz --items 1000000 --out runs/vectors

The tables' distinct texts come first, then the sentences of those texts, then passages of twelve words that overlap by
four, until there are enough; what has a vector that another text has already is left out. Rows are shuffled once with
a seed, so the first n of them are a random sample. Writes vectors.npy (items, D), queries.npy (anchors and texts of the
query tables, none of them among the items) and about.json with the counts of each kind.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import matryo
from matryo.core.records import rows as table_rows

COLUMNS = ("anchor", "positive", "text", "title")
END = re.compile(r"(?<=[.!?;:])\s+|\n+")
WORDS, STEP = 12, 8


def whole_texts(tables: Iterable[Path]) -> Iterator[str]:
    for table in tables:
        for _, row in table_rows(table):
            for column in COLUMNS:
                if row.get(column):
                    yield str(row[column])


def sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (part for part in END.split(text) if len(part.split()) >= 4)


def passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        words = text.split()
        if len(words) >= WORDS + 4:
            yield from (" ".join(words[at : at + WORDS]) for at in range(0, len(words) - WORDS + 5, STEP))


def unit_rows(model: str, texts: Iterable[str], most: int, taken: set[bytes]) -> np.ndarray:
    """Up to `most` unit rows whose vectors are not taken."""
    encoder, part, kept, count = matryo.load(model).encoder, [], [], 0

    def flush() -> None:
        nonlocal count
        vectors = encoder.vectors(part, 64, False)
        lengths = np.linalg.norm(vectors, axis=1)
        new = []
        for number, row in enumerate(vectors):
            key = hashlib.blake2b(row.tobytes(), digest_size=12).digest()
            if lengths[number] > 0 and key not in taken:
                taken.add(key)
                new.append(number)
        new = new[: most - count]
        count += len(new)
        kept.append(vectors[new] / lengths[new, None])
        part.clear()

    for text in texts:
        part.append(text)
        if len(part) == 8192:
            flush()
            if count >= most:
                break
    if part and count < most:
        flush()
    return np.concatenate(kept).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--query-texts", type=Path, nargs="+", required=True)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    taken: set[bytes] = set()
    asked = dict.fromkeys(whole_texts(options.query_texts))
    order = rng.permutation(len(asked))
    every = list(asked)
    queries = unit_rows(options.model, (every[n] for n in order), options.queries, taken)
    whole = [text for text in dict.fromkeys(whole_texts(options.texts)) if text not in asked]
    blocks: list[np.ndarray] = []
    counts: dict[str, int] = {}
    for kind, source in (("texts", whole), ("sentences", sentences(whole)), ("passages", passages(whole))):
        left = options.items - sum(counts.values())
        if left > 0:
            blocks.append(unit_rows(options.model, dict.fromkeys(source), left, taken))
            counts[kind] = len(blocks[-1])
            print(f"{kind}: {counts[kind]}", flush=True)
    vectors = np.concatenate(blocks)
    options.out.mkdir(parents=True, exist_ok=True)
    np.save(options.out / "vectors.npy", vectors[rng.permutation(len(vectors))])
    np.save(options.out / "queries.npy", queries)
    about = {"model": options.model, "items": len(vectors), "queries": len(queries), "kinds": counts}
    (options.out / "about.json").write_text(json.dumps(about | {"width": vectors.shape[1], "seed": options.seed}))
    print(json.dumps(about))


if __name__ == "__main__":
    main()
