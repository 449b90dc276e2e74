"""What the room needs and does not need: no torch for static models, an error that names the extra, little memory."""

import builtins
import json
import re
import shlex
from pathlib import Path

import pytest

from matryo.core.errors import MissingExtraError
from matryo.serving import Settings, machine, serve, tracing

ROOT = Path(__file__).parents[2]

LOOK = """
import sys
from matryo.serving import Settings, create_app
create_app(Settings(model=sys.argv[1]))
assert not {"torch", "transformers", "sentence_transformers", "onnxruntime", "pydantic"} & set(sys.modules)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


def test_a_static_model_is_served_without_torch_in_little_memory(python, static_model):
    ran = python("-c", LOOK, static_model)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 150


def test_a_missing_extra_is_named(monkeypatch, static_model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "orjson" else object())
    with pytest.raises(MissingExtraError, match=r"needs orjson.*pip install 'matryo\[serve\]'"):
        serve(Settings(model=str(static_model)))


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("onnxruntime", r"needs onnxruntime.*matryo\[onnx\]"),
        ("openvino", r"needs openvino.*matryo\[openvino\]"),
        ("opentelemetry", r"--traces needs .*matryo\[otel\]"),
    ],
)
def test_missing_runtimes_are_named(monkeypatch, package, said):
    from matryo.encoders import onnx

    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    start = {
        "onnxruntime": lambda: onnx._onnxruntime(Path("x/model.onnx"), 1),
        "openvino": lambda: onnx._openvino(Path("x/model.onnx"), 1),
        "opentelemetry": tracing.tracing,
    }[package]
    with pytest.raises(MissingExtraError, match=said):
        start()


def test_threads_respect_the_quota_and_are_shared(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    assert machine.usable_processors() == 8
    for text, count in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 8)):
        machine.QUOTA.write_text(text)
        assert machine.usable_processors() == count
    machine.QUOTA.write_text("400000 100000")
    assert [machine.threads_for(workers) for workers in (1, 2, 3, 9)] == [4, 2, 1, 1]


def test_deploy_files_give_options_that_exist(python):
    known = python("-m", "matryo", "serve", "--help").stdout
    unit = (ROOT / "deploy/matryo.service").read_text()
    started = shlex.split(re.search(r"ExecStart=(.*)", unit)[1])
    container = re.search(r"ENTRYPOINT (\[.*\])", (ROOT / "deploy/Containerfile").read_text())[1]
    options = {part for part in [*started, *json.loads(container)] if part.startswith("--")}
    assert options
    for option in options:
        assert option in known
