"""Makes golden/index-2 and index-2.json. Run once per format version; the result is committed and never made again."""

import json
from pathlib import Path

import numpy as np

from matryo.index import Index

HERE = Path(__file__).parent


def main() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((12, 32)).astype(np.float32)
    keys = [f"g{n}" for n in range(12)]
    searches = []
    with Index.create(
        HERE / "index-2", width=32, plan="16:binary keep 8 > 32:int8 keep 6 > 32:float32", model={"name": "golden"}
    ) as index:
        index.upsert(
            keys, base, [f"text {n}" for n in range(12)], [{"shelf": n % 3, "name": f"é{n}"} for n in range(12)]
        )
        index.delete(["g0", "g5"])
        index.upsert(["g1"], base[11:12])
        for arguments in ({"k": 3}, {"k": 20, "plan": "32:float32"}, {"k": 4, "where": {"shelf": 2}}):
            query = rng.standard_normal(32).astype(np.float32)
            hits = index.search(query, **arguments)
            searches.append(
                {
                    "query": query.tolist(),
                    "arguments": arguments,
                    "ids": hits.ids,
                    "scores": hits.scores,
                    "documents": hits.documents,
                    "metadata": hits.metadata,
                }
            )
    (HERE / "index-2.json").write_text(json.dumps({"searches": searches}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
