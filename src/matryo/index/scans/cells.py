"""Cells: rows sorted by their nearest centre, and codes packed for faiss' 4-bit fast scan. One cell is a flat scan.

`pq`, `int4` and `binary` are all product codes to faiss: int4 has a part per dimension whose centroids are 16 steps,
binary a part per 4 dimensions whose centroids are the 16 patterns of signs (so that a float query meets the bits).
`IndexPQFastScan` takes no selector of rows; `IndexIVFPQFastScan` with one cell does, and is as quick.

Cells may be made at a smaller width (`at`) than the codes are of, as AdANNS (Rege et al., 2023) does: the centres are
found, and the query finds its cells, in the first `at` dimensions.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from matryo.core.codecs import Codec, Float32s, Int4
from matryo.core.plan import Stage
from matryo.core.prefix import truncate
from matryo.index.column import Stored, sample
from matryo.index.scans.common import Allowed, Found, Rows, asked_first, filled, first, settled
from matryo.index.trained import ProductCode, RaBitQ, faiss_module, index_codec, product_quantizer
from matryo.index.vectors import CHUNK_ROWS

BLOCK = 32
"""Rows the fast scan takes at a time."""
QUERY_BITS = 8
"""Of the query, in RaBitQ's scan."""
SEED = 1234
PLAIN = {"float16": "QT_fp16", "bfloat16": "QT_bf16", "int8": "QT_8bit"}


class Cells:
    """The rows 0:rows in `cells` cells. A search scans the `probe` nearest, more where they hold too few rows."""

    def __init__(self, stage: Stage, index: Any) -> None:
        options = dict(stage.options)
        self.width, self.code, self.index = stage.width, stage.code, index
        self.cells = options.get("cells", 1)
        self._unfiltered: dict[int, Any] = {}
        """faiss' parameters of searches without a filter, by cells probed."""

    @classmethod
    def build(cls, stage: Stage, vectors: Stored, end: int) -> "Cells":
        """Train on a sample of rows 0:end and add them all."""
        options = dict(stage.options)
        prefixes = sample(vectors, stage.width, end)
        made = cls(stage, _empty(stage.code, prefixes, options.get("cells", 1), options.get("at", stage.width)))
        made._add(vectors, end)
        return made

    @property
    def rows(self) -> int:
        """Rows it covers."""
        return int(self.index.ntotal)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, row numbers and centres."""
        lists = self.index.invlists
        held = sum(lists.list_size(n) for n in range(lists.nlist))
        code = lists.code_size if lists.code_size != faiss_module().InvertedLists.INVALID_CODE_SIZE else 0
        packed = getattr(self.index, "M2", 0)
        extra = self.index.compute_per_vector_storage_size() if self.code == "rabitq" else 0
        each = code or (packed + 1) // 2 + extra
        return int(held * (each + 8) + self.cells * self.width * 4)

    def grown(self, vectors: Stored, end: int) -> "Cells":
        """A copy that covers the rows up to `end` too; this one stays as it is."""
        faiss = faiss_module()
        copy = faiss.deserialize_index(faiss.serialize_index(self.index))
        made = Cells.__new__(Cells)
        made.width, made.code, made.index, made.cells = self.width, self.code, copy, self.cells
        made._unfiltered = {}
        made._add(vectors, end)
        return made

    def search(self, queries_QD: Float32s, n: int, allowed: Allowed | None, options: dict[str, int]) -> list[Found]:
        """The n best rows of each query."""
        count = self.rows if allowed is None else min(allowed.count, self.rows)
        probe = min(options.get("probe", 1), self.cells)
        queries = np.ascontiguousarray(queries_QD[:, : self.width])
        ask = asked_first(n, count)
        scores_Qn, rows_Qn = self.index.search(queries, ask, params=self._parameters(allowed, probe))
        return [
            self._one(query[None], n, count, allowed, probe, (ask, filled(scores, rows)))
            for query, scores, rows in zip(queries, scores_Qn, rows_Qn, strict=True)
        ]

    def _one(
        self, query: Float32s, n: int, count: int, allowed: Allowed | None, probe: int, known: tuple[int, Found]
    ) -> Found:
        """The n best rows of one (1, width) query, from what a first search found and more searches where need be."""
        while True:
            chosen, had = self._parameters(allowed, probe), known

            def ask(most: int, chosen: Any = chosen, had: tuple[int, Found] = had) -> Found:
                if most == had[0]:
                    return had[1]
                scores, rows = self.index.search(query, most, params=chosen)
                return filled(scores[0], rows[0])

            scores, rows = settled(ask, n, count)
            if len(rows) >= min(n, count):
                return scores, rows
            if probe >= self.cells:
                return self._completed(scores, rows, min(n, count), allowed)
            probe, known = min(2 * probe, self.cells), (-1, known[1])

    def tail_codec(self) -> Codec | None:
        """The codec its rows are in, for the rows after them; None where any fitted one will do."""
        made = index_codec(self.code, self.width)
        if isinstance(made, RaBitQ):
            return made.load({"centre": self.index.quantizer.reconstruct(0)}) if self.cells == 1 else None
        if not isinstance(made, ProductCode | Int4):
            return None
        flat = faiss_module().vector_to_array(self.index.pq.centroids)
        centroids = flat.reshape(self.index.pq.M, 16, -1)
        if isinstance(made, ProductCode):
            return made.load({"centroids": centroids})
        return made.load({"step": (centroids[:, 15, 0] - centroids[:, 0, 0]) / np.float32(15)})

    def _parameters(self, allowed: Allowed | None, probe: int) -> Any:
        if allowed is None and probe in self._unfiltered:
            return self._unfiltered[probe]
        faiss = faiss_module()
        made = faiss.IVFRaBitQSearchParameters() if self.code == "rabitq" else faiss.SearchParametersIVF()
        if self.code == "rabitq":
            made.qb = QUERY_BITS
        made.nprobe = probe
        if allowed is not None:
            made.sel = allowed.selector
        else:
            self._unfiltered[probe] = made
        return made

    def _completed(self, scores: Float32s, rows: Rows, n: int, allowed: Allowed | None) -> Found:
        """With the lowest of the rows that the fast scan left out, whose quantised score is its least; zero queries do
        that to every row.
        """
        every = np.arange(self.rows) if allowed is None else allowed.rows
        others = np.setdiff1d(every[: np.searchsorted(every, self.rows)], rows)[: n - len(rows)]
        least = np.full(len(others), scores.min() if len(scores) else 0, np.float32)
        return first(np.concatenate([scores, least]), np.concatenate([rows, others]), n)

    def _add(self, vectors: Stored, end: int) -> None:
        for prefixes in chunks(vectors, self.width, self.rows, end):
            self.index.add(prefixes)


def chunks(vectors: Stored, width: int, start: int, end: int) -> Iterator[Float32s]:
    """Unit prefixes of rows start:end, contiguous, some thousands at a time."""
    for at in range(start, end, CHUNK_ROWS):
        part = vectors.chunk(at, min(at + CHUNK_ROWS, end))[:, :width]
        yield np.ascontiguousarray(truncate(part, width))


def _empty(code: str, prefixes: Float32s, cells: int, at: int) -> Any:
    """A trained index without rows."""
    faiss = faiss_module()
    width = prefixes.shape[1]
    product = faiss.METRIC_INNER_PRODUCT
    quantizer = _centres(code, prefixes, cells, at)
    if code == "float32":
        index = faiss.IndexIVFFlat(quantizer, width, cells, product)
    elif code in PLAIN:
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, width, cells, getattr(faiss.ScalarQuantizer, PLAIN[code]), product, False
        )
        index.sq.train(prefixes)
    elif code == "rabitq":
        index = faiss.IndexIVFRaBitQFastScan(quantizer, width, cells, product, BLOCK)
        index.train(prefixes)
    else:
        centroids = _centroids(code, prefixes)
        index = faiss.IndexIVFPQFastScan(quantizer, width, cells, len(centroids), 4, product, BLOCK)
        index.by_residual = False
        index.pq = product_quantizer(centroids)
    index.is_trained = True
    return index


def _centres(code: str, prefixes: Float32s, cells: int, at: int) -> Any:
    """faiss' quantiser of the cells: takes vectors of the stage's width, looks at the first `at` dimensions."""
    faiss = faiss_module()
    width = prefixes.shape[1]
    flat = faiss.IndexFlatIP(at)
    if cells == 1:
        centre = prefixes.mean(axis=0, dtype=np.float64) if code == "rabitq" else np.zeros(at)
        flat.add(centre.astype(np.float32)[None])
    else:
        means = faiss.Kmeans(at, cells, niter=10, spherical=True, seed=SEED, min_points_per_centroid=1)
        means.train(np.ascontiguousarray(truncate(prefixes[:, :at], at)))
        flat.add(means.centroids)
    if at == width:
        return flat
    short = faiss.IndexPreTransform(flat)
    short.prepend_transform(faiss.NormalizationTransform(at, 2.0))
    short.prepend_transform(faiss.RemapDimensionsTransform(width, at, False))
    return short


def _centroids(code: str, prefixes: Float32s) -> Float32s:
    """A code as (parts, 16, dimensions of a part) centroids."""
    width = prefixes.shape[1]
    if code == "binary":
        signs = np.array(list(itertools.product((-1, 1), repeat=4)), np.float32)
        return np.repeat(signs[None] / np.float32(np.sqrt(width)), width // 4, axis=0)
    fitted = index_codec(code, width).fit(prefixes)
    if isinstance(fitted, Int4):
        levels = np.arange(16, dtype=np.float32) - np.float32(7.5)
        steps: Float32s = fitted.state["step"][:, None, None] * levels[None, :, None]
        return steps
    return fitted.state["centroids"]
