"""A transformer on a small device: numpy, tokenizers and onnxruntime alone.

python embed.py "a query" texts.txt    # the lines of a file that are nearest to the query, with their cosines
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

HERE = Path(__file__).parent


@cache
def opened(folder: Path) -> tuple[Tokenizer, Any, dict[str, str]]:
    """The tokeniser, the graph, and the words that each kind of text gets in front."""
    about = json.loads((folder / "edge.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(about["max_tokens"])
    tokenizer.enable_padding(pad_id=about["pad"])
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return tokenizer, session, about["prompts"]


def embed(texts: Sequence[str], folder: Path = HERE, kind: str = "", batch: int = 16) -> Any:
    """Unit vectors, one row a text. `kind` is "query", "document" or another prompt of the model, where it has some."""
    tokenizer, session, prompts = opened(folder)
    whole = [prompts.get(kind, "") + text for text in texts]
    rows = []
    for start in range(0, len(whole), batch):
        found = tokenizer.encode_batch(whole[start : start + batch])
        ids, mask = (np.array([getattr(one, name) for one in found], np.int64) for name in ("ids", "attention_mask"))
        rows.append(session.run(None, {"input_ids": ids, "attention_mask": mask})[0])
    return np.concatenate(rows)


def nearest(query: Any, rows: Any, k: int = 10) -> list[tuple[int, float]]:
    """The k rows with the largest cosine, as (row, cosine), best first, the earlier of two equal ones first."""
    cosines = rows @ query
    return [(int(n), float(cosines[n])) for n in np.argsort(-cosines, kind="stable")[:k]]


if __name__ == "__main__":
    lines = [line for line in Path(sys.argv[2]).read_text().splitlines() if line.strip()]
    for n, cosine in nearest(embed([sys.argv[1]], kind="query")[0], embed(lines, kind="document")):
        sys.stdout.write(f"{cosine:.3f}  {lines[n]}\n")
