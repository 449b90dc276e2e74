"""Folders for small devices: the model's prefix within the stated tolerance, by their own file and nothing of ours."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import matryo as mt
from matryo.core.errors import InputError
from matryo.encoders.edge import export_edge
from matryo.encoders.edge.write import TOLERANCE

TEXTS = ["a puzzle game for the terminal", "Library for reading PNG images", "ß, Ünïcode and 漢字", "x", "word " * 300]
ALONE = """
import sys
allowed = {*sys.stdlib_module_names, *sys.argv[1].split(",")}
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Only())
sys.path.insert(0, ".")
import json
import numpy as np
import embed
rows = embed.embed(json.loads(sys.argv[2]))
np.save(sys.argv[3], rows)
print(embed.nearest(rows[0], rows, 2))
"""


def alone(folder, allowed, out):
    """The vectors of TEXTS by the folder's own file, where only some packages can be imported; and what it found."""
    line = [sys.executable, "-I", "-c", ALONE, ",".join(["embed", *allowed]), json.dumps(TEXTS), str(out)]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return np.load(out), ran.stdout


@pytest.fixture(scope="module")
def texts(debian_rows):
    return [row["positive"] for row in debian_rows]


@pytest.mark.parametrize(("code", "width"), [("float32", 13), ("float16", 32), ("int8", 8), ("int8", 32)])
def test_a_static_model_runs_on_numpy_and_tokenizers(trained, texts, tmp_path, code, width):
    found = export_edge(trained, tmp_path / "small", width=width, code=code, texts=texts)
    rows, said = alone(tmp_path / "small", ("numpy", "tokenizers"), tmp_path / "rows.npy")
    expected = mt.truncate(mt.load(trained).encoder.vectors(TEXTS), width)
    np.testing.assert_allclose(rows, expected, atol=TOLERANCE[code])
    assert found["quality"]["difference"] <= TOLERANCE[code]
    assert said.startswith("[(0, ")
    lengths = np.linalg.norm(rows, axis=1)
    assert ((np.abs(lengths - 1) < 1e-5) | (lengths == 0)).all()


def test_it_is_small_and_says_what_was_measured(trained, texts, tmp_path, python):
    out = tmp_path / "small"
    found = export_edge(trained, out, width=16, texts=texts)
    assert found == json.loads((out / "edge.json").read_text())
    files = {path.name: path.stat().st_size for path in out.iterdir() if path.name not in ("edge.json", "README.md")}
    assert set(files) == {"embed.py", "table.npy", "scales.npy", "tokenizer.json"}
    assert found["bytes"] == sum(files.values())
    assert np.load(out / "table.npy").dtype == np.int8
    assert len((out / "embed.py").read_text().splitlines()) < 60
    quality = found["quality"]
    assert quality["texts"] == len(texts)
    assert 0.99 < quality["cosine_least"] <= quality["cosine_mean"] <= 1.0001
    assert quality["neighbours_of_prefix"] > 0.9
    assert quality["neighbours_of_full_width"] < quality["neighbours_of_prefix"]
    measured = [row for row in mt.load(trained).card.scores if (row["width"], row["code"]) == (16, "float32")]
    assert quality["evaluation_of_prefix"] == measured
    assert measured
    page = (out / "README.md").read_text()
    assert f"{measured[0]['value']:.3f}" in page
    assert "this width before quantising" in page
    (tmp_path / "lines.txt").write_text("\n".join(texts[:20]))
    ran = python(out / "embed.py", texts[3], tmp_path / "lines.txt")
    assert ran.stdout.splitlines()[0] == f"1.000  {texts[3]}", ran.stderr
    assert len(ran.stdout.splitlines()) == 10


def test_a_transformer_runs_on_onnxruntime(minilm, tmp_path):
    found = export_edge(minilm, tmp_path / "small", width=64, code="float32")
    allowed = ("numpy", "tokenizers", "onnxruntime")
    rows, _ = alone(tmp_path / "small", allowed, tmp_path / "rows.npy")
    np.testing.assert_allclose(rows, mt.load(minilm).encode(TEXTS, width=64), atol=1e-5)
    assert found["kind"] == "onnx"
    assert found["quality"]["difference"] <= 1e-5
    assert len((tmp_path / "small" / "embed.py").read_text().splitlines()) < 60
    with pytest.raises(InputError, match=r"int8 of a transformer is judged.*at least 100"):
        export_edge(minilm, tmp_path / "no", width=64)
    with pytest.raises(InputError, match="float16 is for static models"):
        export_edge(minilm, tmp_path / "no", width=64, code="float16")


def test_the_graph_leaves_a_row_of_zeros_at_zero(tmp_path):
    import onnx
    import onnxruntime

    from matryo.encoders.edge.write import _cut

    make = onnx.helper
    kind = onnx.TensorProto.FLOAT
    given, out = (make.make_tensor_value_info(name, kind, ["inputs", 5]) for name in ("given", "vectors"))
    graph = make.make_graph([make.make_node("Identity", ["given"], ["vectors"])], "same", [given], [out])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), str(tmp_path / "a"))
    _cut(tmp_path / "a", tmp_path / "b", 3)
    session = onnxruntime.InferenceSession(str(tmp_path / "b"), providers=["CPUExecutionProvider"])
    rows = np.array([[0, 0, 0, 4, 5], [1, -2, 3, 4, 5], [1e-8, 0, 0, 1, 1]], np.float32)
    np.testing.assert_allclose(session.run(None, {"given": rows})[0], mt.truncate(rows, 3), atol=1e-6)


@pytest.mark.slow
def test_int8_of_a_transformer_is_judged_by_neighbours_at_its_width(minilm, texts, tmp_path):
    found = export_edge(minilm, tmp_path / "small", width=64, texts=texts, floor=0.7)
    kept = found["quality"]["neighbours_of_prefix"]
    assert 0.7 <= kept < 1
    assert found["bytes"] < 30e6
    assert found["float32_products"] == 0
    part = export_edge(minilm, tmp_path / "part", width=64, texts=texts, floor=kept + 0.001)
    assert part["float32_products"] in (1, 2, 4, 6)
    assert part["quality"]["neighbours_of_prefix"] > kept
    with pytest.raises(InputError, match=r"int8 keeps 0\.\d+ of the 10 nearest neighbours at width 64, below 0\.999"):
        export_edge(minilm, tmp_path / "no", width=64, texts=texts, floor=0.999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "small"]


def test_what_is_refused_leaves_nothing(trained, tmp_path):
    out = tmp_path / "out"
    for options, said in (
        ({"width": 33}, r"width 33 is outside 1\.\.32"),
        ({"width": 8, "code": "pq8"}, "code must be one of float32, float16, int8, got 'pq8'"),
    ):
        with pytest.raises(InputError, match=said):
            export_edge(trained, out, **options)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(InputError, match="is there already"):
        export_edge(trained, out, width=8)


def test_a_table_that_int8_cannot_hold_is_refused(trained, tmp_path):
    """Tokens that nearly cancel leave a mean that is smaller than the rounding."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(trained, tmp_path / "model")
    (weights,) = folder.rglob("model.safetensors")
    table = load_file(weights)["embedding.weight"].astype(np.float32)
    sign = np.where(np.arange(len(table)) % 2, 1, -1).astype(np.float32)[:, None]
    common = np.linspace(1, 2, table.shape[1], dtype=np.float32) * sign
    save_file({"embedding.weight": common * 100 + table * 1e-3}, weights)
    with pytest.raises(InputError, match=r"vectors at width 8 in int8 differ from the model's by .* 0\.02 is allowed"):
        export_edge(folder, tmp_path / "out", width=8, texts=["a b c d e f g h i j k l"] * 3)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_line(trained, tmp_path, python):
    out = tmp_path / "small"
    ran = python("-m", "matryo", "export", trained, "--width", 16, "--out", out, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads((out / "edge.json").read_text())
    for arguments, said in (
        ((), "say what to write: --onnx FOLDER for a server, or --out FOLDER"),
        (("--out", "x"), "--out needs --width"),
        (("--onnx", "x", "--width", 3), "--width goes with --out"),
    ):
        ran = python("-m", "matryo", "export", trained, *arguments)
        assert ran.returncode == 2
        assert said in ran.stderr
