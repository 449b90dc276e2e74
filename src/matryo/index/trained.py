"""Codes that faiss trains: product quantisation and RaBitQ, as codecs like those of `core.codecs`."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.codecs import CODECS, Codec, Codes, Float32s, codec
from matryo.core.errors import InputError
from matryo.index.funnel import product_problem

CENTROIDS = 16
"""What four bits can tell apart."""


def faiss_module() -> Any:
    """faiss, imported when it is first needed."""
    return importlib.import_module("faiss")


class ProductCode(Codec):
    """`pq<bytes>`: the prefix in 2 x bytes equal parts, each stored as the nearest of 16 centroids (4 bits).

    Product quantisation (Jegou, Douze, Schmid, 2011) with k-means by faiss, seeded, so that equal rows give equal
    centroids. Fewer than 16 rows are repeated to make 16. The float query meets the centroids: scores are asymmetric.
    """

    name = "pq"

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width)
        problem = product_problem(width, size)
        if problem:
            raise InputError(problem)
        self.size = size
        self.centroids: Float32s | None = None
        """(2 x bytes, 16, width / (2 x bytes))."""

    def fit(self, prefixes: Float32s) -> "ProductCode":
        checked = self._checked(np.ascontiguousarray(prefixes, dtype=np.float32))
        if len(checked) == 0:
            raise InputError(f"pq{self.size} needs at least one vector to train on, got none")
        if len(checked) < CENTROIDS:
            checked = np.resize(checked, (CENTROIDS, self.width))
        quantizer = faiss_module().ProductQuantizer(self.width, 2 * self.size, 4)
        quantizer.cp.min_points_per_centroid = 1
        quantizer.train(checked)
        found = faiss_module().vector_to_array(quantizer.centroids)
        return self.load({"centroids": found.reshape(2 * self.size, CENTROIDS, -1)})

    @property
    def quantizer(self) -> Any:
        """faiss' object with these centroids."""
        if self.centroids is None:
            raise InputError(f"this pq{self.size} codec has no centroids yet; call fit(prefixes) first")
        return product_quantizer(self.centroids)

    def encode(self, prefixes: Float32s) -> Codes:
        checked = self._checked(np.ascontiguousarray(prefixes, dtype=np.float32))
        codes: Codes = self.quantizer.compute_codes(checked)
        return codes

    def decode(self, codes: Codes) -> Float32s:
        decoded: Float32s = self.quantizer.decode(np.ascontiguousarray(codes, dtype=np.uint8))
        return decoded

    @property
    def bytes_per_item(self) -> int:
        return self.size

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        return {} if self.centroids is None else {"centroids": self.centroids}

    def load(self, state: dict[str, NDArray[Any]]) -> "ProductCode":
        shape = (2 * self.size, CENTROIDS, self.width // (2 * self.size))
        found = np.asarray(state["centroids"], np.float32) if set(state) == {"centroids"} else np.empty(0, np.float32)
        if found.shape != shape or not np.isfinite(found).all():
            raise InputError(f"pq{self.size} at width {self.width} needs 'centroids': {shape} finite numbers")
        self.centroids = found
        return self


class RaBitQ(Codec):
    """`rabitq`: one sign bit a dimension about a centre, and two floats that make the estimated product unbiased.

    RaBitQ (Gao and Long, 2024) as faiss has it, that is, without a random rotation before it: the vectors of an
    embedding model need none, or bring their own.
    """

    name = "rabitq"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.centre: Float32s | None = None
        self._quantizer = faiss_module().RaBitQuantizer(width, faiss_module().METRIC_INNER_PRODUCT)

    def fit(self, prefixes: Float32s) -> "RaBitQ":
        checked = self._checked(np.asarray(prefixes, dtype=np.float32))
        if len(checked) == 0:
            raise InputError("rabitq needs at least one vector to find its centre, got none")
        return self.load({"centre": checked.mean(axis=0, dtype=np.float64).astype(np.float32)})

    @property
    def _fitted(self) -> Float32s:
        if self.centre is None:
            raise InputError("this rabitq codec has no centre yet; call fit(prefixes) first")
        return self.centre

    def encode(self, prefixes: Float32s) -> Codes:
        checked = self._checked(np.ascontiguousarray(prefixes, dtype=np.float32))
        codes = np.zeros((len(checked), self.bytes_per_item), np.uint8)
        self._run(self._quantizer.compute_codes_core, checked, codes)
        return codes

    def decode(self, codes: Codes) -> Float32s:
        packed = np.ascontiguousarray(codes, dtype=np.uint8)
        out = np.zeros((len(packed), self.width), np.float32)
        self._run(self._quantizer.decode_core, packed, out)
        return out

    def _run(self, call: Any, given: NDArray[Any], out: NDArray[Any]) -> None:
        pointer = faiss_module().swig_ptr
        call(pointer(given), pointer(out), len(given), pointer(self._fitted))

    @property
    def bytes_per_item(self) -> int:
        return (self.width + 7) // 8 + 8

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        return {} if self.centre is None else {"centre": self.centre}

    def load(self, state: dict[str, NDArray[Any]]) -> "RaBitQ":
        found = np.asarray(state["centre"], np.float32) if set(state) == {"centre"} else np.empty(0, np.float32)
        if found.shape != (self.width,) or not np.isfinite(found).all():
            raise InputError(f"rabitq at width {self.width} needs 'centre': {self.width} finite numbers")
        self.centre = np.ascontiguousarray(found)
        return self


def index_codec(name: str, width: int) -> Codec:
    """An unfitted codec by name, for one width: those of core, and those that faiss trains."""
    if name.startswith("pq") and name[2:].isdecimal():
        return ProductCode(width, int(name[2:]))
    if name == "rabitq":
        return RaBitQ(width)
    if name not in CODECS:
        raise InputError(f"unknown code {name!r}; the index stores {', '.join(CODECS)}, rabitq, pq<bytes>")
    return codec(name, width)


def product_quantizer(centroids: Float32s) -> Any:
    """faiss' product quantiser with these (parts, 16, dimensions of a part) centroids."""
    parts, _, each = centroids.shape
    made = faiss_module().ProductQuantizer(parts * each, parts, 4)
    faiss_module().copy_array_to_vector(np.ascontiguousarray(centroids, np.float32).ravel(), made.centroids)
    return made
