"""`matryo doctor`."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from matryo.cli.terminal import Json, say, say_json

EXTRAS = {
    "base": ("numpy", "faiss-cpu", "tokenizers", "safetensors", "typer", "rich"),
    "parquet": ("pyarrow",),
    "train": (
        "torch",
        "sentence-transformers",
        "transformers",
        "accelerate",
        "datasets",
        "pydantic",
        "PyYAML",
        "matplotlib",
    ),
    "lora": ("peft",),
    "serve": ("starlette", "uvicorn", "httptools", "orjson", "prometheus_client"),
    "onnx": ("onnxruntime", "onnx"),
    "openvino": ("openvino",),
    "otel": ("opentelemetry-sdk", "opentelemetry-instrumentation-asgi", "opentelemetry-exporter-otlp-proto-http"),
    "eval": ("scikit-learn", "scipy", "matplotlib", "Jinja2"),
}
FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "avx512_vpopcntdq", "asimd", "sve")


def add(app: typer.Typer) -> None:
    """Put the verb on the app."""
    app.command()(doctor)


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what the machine can do, and the command that adds what is missing.

    Example: matryo doctor
    """
    found = examine()
    if as_json:
        say_json(found)
        return
    say(f"matryo {found['matryo']}, Python {found['python']}, {found['system']}")
    say(f"processor: {found['cores']} usable cores; {', '.join(found['cpu_features']) or 'features unknown'}")
    say("threads: " + ", ".join(f"{name}={count}" for name, count in found["threads"].items()))
    if "cuda" in found:
        say(f"cuda: {found['cuda'] or 'not available to torch'}")
    for extra, packages in found["extras"].items():
        absent = [name for name, number in packages.items() if number is None]
        state = "ok" if not absent else f"missing {', '.join(absent)}; add: {found['commands'][extra]}"
        say(f"{extra}: {state}")
        say("    " + ", ".join(f"{name} {number}" for name, number in packages.items() if number))


def examine() -> dict[str, Any]:
    """Everything the verb reports."""
    import matryo

    extras = {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()}
    found: dict[str, Any] = {
        "matryo": matryo.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_features": _cpu_features(),
        "threads": {name: os.environ.get(name, "unset") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "extras": extras,
        "commands": {
            extra: "pip install matryo" if extra == "base" else f"pip install 'matryo[{extra}]'"
            for extra, packages in extras.items()
            if None in packages.values()
        },
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        found["threads"]["faiss"] = faiss.omp_get_max_threads()
        found["faiss_options"] = faiss.get_compile_options().strip()
    if importlib.util.find_spec("torch"):
        import torch

        found["threads"]["torch"] = torch.get_num_threads()
        found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_features() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return [name for name in FEATURES if name in flags]
