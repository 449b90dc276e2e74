"""A transformer's graph with int8 weights, whose vectors do not depend on what else is in the batch.

The field's quantisers take one step for all activations of a run (fitted to it, so that a text's vector moves with its
neighbours) or one fixed step (fitted beforehand, which the long tail of a feed-forward block makes coarse). Here each
token has a step of its own, the largest magnitude of its row, as in ZeroQuant (Yao et al. 2022, arXiv:2206.01861,
section 4.1): nothing is fitted, and a row's numbers depend on that row alone. Needs the `onnx` extra.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.core.errors import InputError

Float32s = NDArray[np.float32]

LEVELS = 64
"""Of a weight's magnitude: seven bits. Processors without dot products of bytes (AVX2) add two products in 16 bits,
where 2 x 255 x 127 is cut off without a word and 2 x 255 x 64 is not."""
STEPS = 127
"""Of an activation's magnitude, on either side of zero."""
LEAST = 1e-30
"""In the place of a largest magnitude or a step of zero."""
TABLE_BYTES = 1 << 20
"""From this size on, a table that rows are looked up in is quantised too; smaller ones do not pay for it."""
MICROSOFT = "com.microsoft"
"""Where onnxruntime keeps its product of integers with a float result. OpenVINO reads it too."""


def quantise(source: Path, target: Path, *, leave: Collection[str] = ()) -> None:
    """Write a graph whose products with fixed weights are of integers.

    Of `x @ W`: W has one step a column, x one step a row, and the result is their integers' product times both. Tables
    that rows are looked up in have one step a row.

    Args:
        leave: names of products (nodes) that stay float32.

    Raises:
        InputError: the graph has no product with fixed weights.
    """
    import onnx

    model = onnx.load(str(source))
    graph = model.graph
    rewriter = _Rewriter(onnx, {one.name: one for one in graph.initializer})
    nodes, changed = [], 0
    for node in graph.node:
        if rewriter.is_product(node) and node.name not in leave:
            nodes += rewriter.product(node)
            changed += 1
        elif rewriter.is_table(node):
            nodes += rewriter.lookup(node)
        else:
            nodes.append(node)
    if not changed and not leave:
        raise InputError(f"{source} has no products with fixed weights, which is what int8 is for")
    read = {name for node in nodes for name in node.input}
    kept = [one for one in [*graph.initializer, *rewriter.added.values()] if one.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    if MICROSOFT not in {one.domain for one in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def quantise_enough(
    source: Path, target: Path, kept: Callable[[], float], floor: float, width: int
) -> tuple[float, int]:
    """Quantise all that can be; where that keeps too little, all but products that narrow, as few as it takes.

    They are left from the first layer on: what a feed-forward block's second product takes has the longest tail, and
    what the first layers lose every later one works with.

    Args:
        kept: measures the share of neighbours that the graph at `target` keeps.
        floor: the least share.
        width: at which it is measured, for the error.

    Returns:
        The share, and how many products were left in float32.

    Raises:
        InputError: too little is kept however many are left.
    """
    narrow, shares = _narrowing(source), []
    for count in _doubling(len(narrow)):
        quantise(source, target, leave=narrow[:count])
        shares.append(kept())
        if shares[-1] >= floor:
            return shares[-1], count
    raise InputError(
        f"int8 keeps {max(shares):.3f} of the 10 nearest neighbours at width {width}, below {floor}, with up to "
        f"{len(narrow)} products left in float32; export in float32, or lower --floor knowingly for larger widths only"
    )


def _doubling(most: int) -> list[int]:
    """0, 1, 2, 4 and so on, and the most."""
    return sorted({0, *(1 << n for n in range(most.bit_length()) if 1 << n < most), most})


def _narrowing(path: Path) -> list[str]:
    """Names of the products whose weights have more rows than columns, the first layer's first."""
    import onnx

    graph = onnx.load(str(path)).graph
    rewriter = _Rewriter(onnx, {one.name: one for one in graph.initializer})
    return [node.name for node in graph.node if rewriter.is_product(node) and rewriter.narrows(node)]


class _Rewriter:
    """Nodes in the place of others, and the weights they read. What several read is made once."""

    def __init__(self, onnx: Any, weights: dict[str, Any]) -> None:
        self.onnx, self.weights = onnx, weights
        self.added: dict[str, Any] = {}
        self.coded_inputs: set[str] = set()
        self._add("int8_step", np.array(1 / STEPS, np.float32))
        self._add("int8_zero", np.array(128, np.uint8))
        self._add("int8_least", np.array(LEAST, np.float32))

    def is_product(self, node: Any) -> bool:
        return bool(node.op_type == "MatMul" and self._is_matrix(node.input[1]))

    def is_table(self, node: Any) -> bool:
        """A table of which rows are taken by number (axis 0, where the attribute is left out)."""
        by_row = node.op_type == "Gather" and not any(one.name == "axis" and one.i for one in node.attribute)
        return by_row and self._is_matrix(node.input[0]) and 4 * np.prod(self.weights[node.input[0]].dims) > TABLE_BYTES

    def narrows(self, node: Any) -> bool:
        rows, columns = self.weights[node.input[1]].dims
        return bool(rows > columns)

    def product(self, node: Any) -> list[Any]:
        given, weight, out = node.input[0], node.input[1], node.output[0]
        if f"{weight}_int8" not in self.added:
            whole_KN, step_N = coded(self._array(weight), LEVELS, axis=0)
            self._add(f"{weight}_int8", whole_KN)
            self._add(f"{weight}_step", step_N[0])
        read = [f"{given}_uint8", f"{weight}_int8", "int8_step", f"{weight}_step", "int8_zero"]
        return [
            *self._coded_rows(given),
            self._node("MatMulIntegerToFloat", read, f"{out}_unscaled", MICROSOFT),
            self._node("Mul", [f"{out}_unscaled", f"{given}_largest"], out),
        ]

    def lookup(self, node: Any) -> list[Any]:
        table, which, out = node.input[0], node.input[1], node.output[0]
        if f"{table}_int8" not in self.added:
            whole_VD, step_V1 = coded(self._array(table), STEPS, axis=1)
            self._add(f"{table}_int8", whole_VD)
            self._add(f"{table}_step", step_V1)
        return [
            self._node("Gather", [f"{table}_int8", which], f"{out}_int8"),
            self._node("Gather", [f"{table}_step", which], f"{out}_step"),
            self._node("Cast", [f"{out}_int8"], f"{out}_whole", to=self.onnx.TensorProto.FLOAT),
            self._node("Mul", [f"{out}_whole", f"{out}_step"], out),
        ]

    def _coded_rows(self, given: str) -> list[Any]:
        """Integers of what a product takes, and each row's largest magnitude; once for all products that take it."""
        if given in self.coded_inputs:
            return []
        self.coded_inputs.add(given)
        return [
            self._node("Abs", [given], f"{given}_magnitudes"),
            self._node("ReduceMax", [f"{given}_magnitudes"], f"{given}_most", axes=[-1], keepdims=1),
            self._node("Max", [f"{given}_most", "int8_least"], f"{given}_largest"),
            self._node("Div", [given, f"{given}_largest"], f"{given}_shares"),
            self._node("QuantizeLinear", [f"{given}_shares", "int8_step", "int8_zero"], f"{given}_uint8"),
        ]

    def _is_matrix(self, name: str) -> bool:
        one = self.weights.get(name)
        return one is not None and len(one.dims) == 2 and one.data_type == self.onnx.TensorProto.FLOAT

    def _array(self, name: str) -> Float32s:
        found: Float32s = self.onnx.numpy_helper.to_array(self.weights[name])
        return found

    def _add(self, name: str, values: NDArray[Any]) -> None:
        self.added[name] = self.onnx.numpy_helper.from_array(values, name)

    def _node(self, kind: str, given: list[str], out: str, domain: str = "", **attributes: Any) -> Any:
        return self.onnx.helper.make_node(kind, given, [out], domain=domain, **attributes)


def coded(values: Float32s, levels: int, axis: int) -> tuple[NDArray[np.int8], Float32s]:
    """Integers in -levels..levels and the step they count, one for each line along the axis."""
    step = (np.abs(values).max(axis=axis, keepdims=True) / np.float32(levels)).astype(np.float32)
    step = np.maximum(step, np.float32(LEAST))
    return np.rint(values / step).astype(np.int8), step
