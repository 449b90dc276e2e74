"""`hnsw`: a navigable graph over the codes of a prefix, by faiss. What a step costs is proportional to the prefix."""

from typing import Any

import numpy as np

from matryo.core.codecs import Codec, Float32s
from matryo.core.plan import Stage
from matryo.index.column import Stored, sample
from matryo.index.funnel import best
from matryo.index.scans.cells import chunks
from matryo.index.scans.common import Allowed, Found, Rows, filled, first
from matryo.index.trained import faiss_module

LINKS = 32
LOOKED_AT = 64
"""M and ef where the plan does not say."""
CONSTRUCTION = 200
SELECTIVE = 16
"""A filter that leaves fewer than one row in so many is scanned exactly instead: the graph's paths run through rows
that may not come back, so `ef` would have to grow by that factor."""
DECODED = 1 << 20
KINDS = {"float16": "QT_fp16", "bfloat16": "QT_bf16", "int8": "QT_8bit", "int4": "QT_4bit"}


class Graph:
    """The rows 0:rows as a graph (Malkov and Yashunin, 2016), each node a code of the prefix."""

    def __init__(self, stage: Stage, index: Any) -> None:
        self.width, self.code, self.index = stage.width, stage.code, index
        self._unfiltered: dict[int, Any] = {}
        """faiss' parameters of searches without a filter, by ef."""

    @classmethod
    def build(cls, stage: Stage, vectors: Stored, end: int) -> "Graph":
        """Fit the code on a sample of rows 0:end and add them all."""
        faiss = faiss_module()
        links = dict(stage.options).get("M", LINKS)
        product = faiss.METRIC_INNER_PRODUCT
        if stage.code == "float32":
            index = faiss.IndexHNSWFlat(stage.width, links, product)
        else:
            kind = getattr(faiss.ScalarQuantizer, KINDS[stage.code])
            index = faiss.IndexHNSWSQ(stage.width, kind, links, product)
            index.train(sample(vectors, stage.width, end))
        index.hnsw.efConstruction = CONSTRUCTION
        made = cls(stage, index)
        made._add(vectors, end)
        return made

    @property
    def rows(self) -> int:
        """Rows it covers."""
        return int(self.index.ntotal)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and links."""
        storage, graph = faiss_module().downcast_index(self.index.storage), self.index.hnsw
        return int(
            storage.codes.size() + 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
        )

    def grown(self, vectors: Stored, end: int) -> "Graph":
        """A copy that covers the rows up to `end` too; this one stays as it is."""
        faiss = faiss_module()
        made = Graph.__new__(Graph)
        made.width, made.code, made._unfiltered = self.width, self.code, {}
        made.index = faiss.deserialize_index(faiss.serialize_index(self.index))
        made.index.hnsw.efConstruction = CONSTRUCTION
        made._add(vectors, end)
        return made

    def search(self, queries_QD: Float32s, n: int, allowed: Allowed | None, options: dict[str, int]) -> list[Found]:
        """About the n best rows of each query; exactly those where few rows are allowed or the graph finds too few."""
        count = self.rows if allowed is None else min(allowed.count, self.rows)
        looked_at = max(options.get("ef", LOOKED_AT), n)
        if allowed is not None:
            looked_at = min(self.rows, looked_at * self.rows // max(1, count))
            if count * SELECTIVE < self.rows:
                return [self._exact(query, n, allowed) for query in queries_QD]
        chosen = self._unfiltered.get(looked_at) if allowed is None else None
        if chosen is None:
            # The walk ends after `ef` steps. Counting the nearer candidates at each step, as faiss does unless told not
            # to, found the same rows and took a tenth longer.
            chosen = faiss_module().SearchParametersHNSW(efSearch=looked_at, check_relative_distance=False)
            if allowed is None:
                self._unfiltered[looked_at] = chosen
            else:
                chosen.sel = allowed.selector
        scores_Qn, rows_Qn = self.index.search(np.ascontiguousarray(queries_QD[:, : self.width]), n, params=chosen)
        found = [filled(scores, rows) for scores, rows in zip(scores_Qn, rows_Qn, strict=True)]
        return [
            first(scores, rows, n) if len(rows) >= min(n, count) else self._exact(query, n, allowed)
            for query, (scores, rows) in zip(queries_QD, found, strict=True)
        ]

    def tail_codec(self) -> Codec | None:
        """Any fitted codec will do for the rows after these."""
        return None

    def _exact(self, query_D: Float32s, n: int, allowed: Allowed | None) -> Found:
        """The n best of the allowed rows by their codes."""
        rows: Rows = np.arange(self.rows) if allowed is None else allowed.rows
        rows = rows[: np.searchsorted(rows, self.rows)]
        faiss = faiss_module()
        storage = faiss.downcast_index(self.index.storage)
        size = storage.codes.size()
        codes = faiss.rev_swig_ptr(storage.codes.data(), size).reshape(self.rows, -1)
        query, scores = query_D[: self.width], np.empty(len(rows), np.float32)
        step = max(1, DECODED // self.width)
        for start in range(0, len(rows), step):
            part = np.ascontiguousarray(codes[rows[start : start + step]])
            scores[start : start + step] = storage.sa_decode(part) @ query
        chosen = best(-scores, n)
        return scores[chosen], rows[chosen]

    def _add(self, vectors: Stored, end: int) -> None:
        for prefixes in chunks(vectors, self.width, self.rows, end):
            self.index.add(prefixes)
