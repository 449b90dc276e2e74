"""A static model on a small device: numpy and tokenizers alone.

python embed.py "a query" texts.txt    # the lines of a file that are nearest to the query, with their cosines
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

HERE = Path(__file__).parent


@cache
def opened(folder: Path) -> tuple[Tokenizer, Any, Any]:
    """The tokeniser, the table of token vectors (read from the disk as it is needed), and the scale of each row."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    table = np.load(folder / "table.npy", mmap_mode="r")
    scales = folder / "scales.npy"
    return tokenizer, table, np.load(scales) if scales.is_file() else np.ones(len(table), np.float32)


def embed(texts: Sequence[str], folder: Path = HERE) -> Any:
    """Unit vectors, one row a text: the mean of its tokens' vectors, scaled to length 1. No known token gives zeros."""
    tokenizer, table, scales = opened(folder)
    rows = np.zeros((len(texts), table.shape[1]), np.float32)
    for row, found in zip(rows, tokenizer.encode_batch_fast(list(texts), add_special_tokens=False), strict=True):
        if found.ids:
            row[:] = (table[found.ids] * scales[found.ids, None]).mean(axis=0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def nearest(query: Any, rows: Any, k: int = 10) -> list[tuple[int, float]]:
    """The k rows with the largest cosine, as (row, cosine), best first, the earlier of two equal ones first."""
    cosines = rows @ query
    return [(int(n), float(cosines[n])) for n in np.argsort(-cosines, kind="stable")[:k]]


if __name__ == "__main__":
    lines = [line for line in Path(sys.argv[2]).read_text().splitlines() if line.strip()]
    for n, cosine in nearest(embed([sys.argv[1]])[0], embed(lines)):
        sys.stdout.write(f"{cosine:.3f}  {lines[n]}\n")
