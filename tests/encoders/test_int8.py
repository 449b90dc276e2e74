"""A graph's products in integers: against a slow twin, row by row whatever else is there, and on hard rows."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from matryo.core.errors import InputError
from matryo.encoders.int8 import _narrowing, quantise, quantise_enough

make, FLOAT, INT64 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
rng = np.random.default_rng(0)
TABLE = rng.standard_normal((9000, 32)).astype(np.float32) * rng.random((9000, 1), dtype=np.float32)
WIDE, NARROW = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 64), (64, 32)))
WIDE[:, 3] = 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A lookup, a product that widens and is used twice, and one that narrows."""
    weights = {"table": TABLE, "wide": WIDE, "narrow": NARROW}
    nodes = [
        make.make_node("Gather", ["table", "ids"], ["looked"], name="lookup"),
        make.make_node("MatMul", ["looked", "wide"], ["up"], name="first"),
        make.make_node("MatMul", ["looked", "wide"], ["again"], name="second"),
        make.make_node("Add", ["up", "again"], ["both"]),
        make.make_node("MatMul", ["both", "narrow"], ["vectors"], name="third"),
        make.make_node("MatMul", ["rows", "wide"], ["products"], name="fourth"),
    ]
    inputs = [
        make.make_tensor_value_info("ids", INT64, ["inputs", "tokens"]),
        make.make_tensor_value_info("rows", FLOAT, ["inputs", 32]),
    ]
    outputs = [
        make.make_tensor_value_info("vectors", FLOAT, ["inputs", "tokens", 32]),
        make.make_tensor_value_info("products", FLOAT, ["inputs", 64]),
    ]
    held = [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = make.make_graph(nodes, "small", inputs, outputs, held)
    path = tmp_path_factory.mktemp("int8") / "plain.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.fixture(scope="module")
def coded(plain):
    quantise(plain, plain.with_name("coded.onnx"))
    return plain.with_name("coded.onnx")


def opened(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda ids, rows: session.run(None, {"ids": ids, "rows": rows})


@pytest.fixture(scope="module")
def run(coded):
    return opened(coded)


def twin(rows, weights):
    """The same product, in float64 and in so many words."""
    step = np.maximum(np.abs(weights).max(axis=0) / np.float32(64), np.float32(1e-30)).astype(np.float32)
    whole = np.rint(weights / step).astype(np.float64)
    largest = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(1e-30))
    shares = np.rint((rows / largest) / np.float32(1 / 127)).astype(np.float64)
    return shares @ whole * step * largest / 127


IDS = np.array([[1, 2, 3, 8999], [5, 0, 4000, 7]])


def test_a_product_is_its_slow_twin(run):
    rows = rng.standard_normal((50, 32)).astype(np.float32) * 10 ** rng.uniform(-6, 6, (50, 1)).astype(np.float32)
    found = run(IDS, rows)[1]
    scale = np.abs(rows).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found / scale, twin(rows, WIDE) / scale, atol=1e-5)
    np.testing.assert_allclose(found / scale, rows @ WIDE / scale, atol=0.3)
    assert not found[:, 3].any()  # a column of zeros


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, (5, 32), elements=st.floats(-1e6, 1e6, width=32)), st.integers(0, 4))
def test_a_row_is_the_same_alone_as_among_others(run, rows, n):
    np.testing.assert_array_equal(run(IDS, rows)[1][n], run(IDS, rows[n : n + 1])[1][0])


def test_integers_at_their_largest_are_not_cut_off(tmp_path):
    """Sums of pairs reach 2 x 255 x 64, which 16 bits hold."""
    weights = np.full((1024, 8), 3, np.float32)
    held = [onnx.numpy_helper.from_array(weights, "weights")]
    given, out = (make.make_tensor_value_info(name, FLOAT, ["inputs", size]) for name, size in (("x", 1024), ("y", 8)))
    graph = make.make_graph([make.make_node("MatMul", ["x", "weights"], ["y"], name="one")], "g", [given], [out], held)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), str(tmp_path / "a"))
    quantise(tmp_path / "a", tmp_path / "b")
    session = onnxruntime.InferenceSession(str(tmp_path / "b"), providers=["CPUExecutionProvider"])
    for value in (2, -2):
        rows = np.full((3, 1024), value, np.float32)
        np.testing.assert_allclose(session.run(None, {"x": rows})[0], rows @ weights, rtol=1e-5)


def test_rows_of_zeros_stay_zeros_and_nan_is_not_hidden(run):
    rows = np.zeros((3, 32), np.float32)
    rows[1, 5], rows[2, 0] = 1e-20, np.nan
    found = run(IDS, rows)[1]
    assert not found[0].any()
    np.testing.assert_allclose(found[1], twin(rows[1], WIDE), rtol=1e-5)
    assert np.isnan(found[2]).any()


def test_what_was_looked_up_keeps_its_direction(run, plain):
    rows = np.ones((1, 32), np.float32)
    ids = rng.integers(0, 9000, (40, 3))
    was, now = (call(ids, rows)[0].reshape(-1, 32) for call in (opened(plain), run))
    cosines = (was * now).sum(axis=1) / np.linalg.norm(was, axis=1) / np.linalg.norm(now, axis=1)
    assert cosines.min() > 0.999


def test_weights_are_stored_once_and_small(coded, plain):
    names = [one.name for one in onnx.load(str(coded)).graph.initializer]
    assert len(names) == len(set(names))
    assert {"table", "wide", "narrow"}.isdisjoint(names)
    assert coded.stat().st_size < 0.4 * plain.stat().st_size


def test_what_is_left_stays_float32(plain, tmp_path):
    assert _narrowing(plain) == ["third"]
    quantise(plain, tmp_path / "part", leave=["third", "fourth"])
    names = {one.name for one in onnx.load(str(tmp_path / "part")).graph.initializer}
    assert {"narrow", "wide", "wide_int8", "wide_step"} <= names
    assert "narrow_int8" not in names
    rows = rng.standard_normal((4, 32)).astype(np.float32)
    np.testing.assert_allclose(opened(tmp_path / "part")(IDS, rows)[1], rows @ WIDE, rtol=1e-4, atol=1e-5)


def test_a_graph_without_products_is_refused(tmp_path):
    given, out = (make.make_tensor_value_info(name, FLOAT, ["inputs", 5]) for name in ("given", "vectors"))
    graph = make.make_graph([make.make_node("Identity", ["given"], ["vectors"])], "same", [given], [out])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), str(tmp_path / "a"))
    with pytest.raises(InputError, match="has no products with fixed weights"):
        quantise(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_as_little_is_left_as_it_takes(plain, tmp_path):
    out, asked = tmp_path / "out", []

    def kept():
        names = {one.name for one in onnx.load(str(out)).graph.initializer}
        asked.append("narrow" in names)
        return 0.95 if asked[-1] else 0.85

    assert quantise_enough(plain, out, kept, 0.8, 32) == (0.85, 0)
    assert quantise_enough(plain, out, kept, 0.9, 32) == (0.95, 1)
    assert asked == [False, False, True]
    with pytest.raises(InputError, match=r"int8 keeps 0\.950 .* at width 32, below 0\.99, with up to 1 products left"):
        quantise_enough(plain, out, kept, 0.99, 32)
