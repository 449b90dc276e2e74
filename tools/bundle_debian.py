"""Make the demo's data, src/matryo/demo/data, from the two sets of Debian package descriptions it is drawn from.

    python tools/bundle_debian.py PAIRS_FOLDER RETRIEVAL_FOLDER

Pairs keep what training reads; documents of the retrieval set gain the archive section, for filtered search.
"""

import gzip
import io
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "src/matryo/demo/data"


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # No time stamp and no name inside, so that the same rows give the same bytes.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        io.BytesIO(text.encode()) as source,
    ):
        shutil.copyfileobj(source, packed)


def main(pairs: Path, retrieval: Path) -> None:
    (DATA / "retrieval/qrels").mkdir(parents=True, exist_ok=True)
    train = read(pairs / "train.jsonl.gz")
    write(DATA / "train.jsonl.gz", ({"anchor": row["anchor"], "positive": row["positive"]} for row in train))
    section = {row["id"]: row["section"] for split in ("dev", "test") for row in read(pairs / f"{split}.jsonl.gz")}
    corpus = read(retrieval / "corpus.jsonl.gz")
    write(DATA / "retrieval/corpus.jsonl.gz", ({**row, "section": section[row["_id"]]} for row in corpus))
    write(DATA / "retrieval/queries.jsonl.gz", read(retrieval / "queries.jsonl.gz"))
    for split in ("dev", "test"):
        shutil.copyfile(retrieval / f"qrels/{split}.tsv", DATA / f"retrieval/qrels/{split}.tsv")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
