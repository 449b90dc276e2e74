"""What every benchmark needs: rows with machine, versions and seed; peak memory; vectors that look like a model's."""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import matryo


def machine() -> dict[str, Any]:
    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    names = ("torch", "sentence-transformers", "numpy", "faiss-cpu")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {"matryo": matryo.__version__} | {name: version(name) for name in names},
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Raw rows as JSONL, each with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = machine()
    path.write_text("".join(json.dumps({**row, **where}) + "\n" for row in rows))


def synthetic(items: int, queries: int, width: int, seed: int, flatness: float = 0.35) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows with the spectrum of nested embeddings: 2,000 clusters, deviation falling like i^-flatness."""
    rng = np.random.default_rng(seed)
    scale = (np.arange(1, width + 1, dtype=np.float32) ** -np.float32(flatness)).astype(np.float32)
    centres = rng.standard_normal((2000, width), dtype=np.float32)

    def draw(n: int) -> np.ndarray:
        out = np.empty((n, width), np.float32)
        for start in range(0, n, 20000):
            part = out[start : start + 20000]
            which = rng.integers(0, len(centres), len(part))
            part[:] = (centres[which] + rng.standard_normal(part.shape, dtype=np.float32)) * scale
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return out

    return draw(items), draw(queries)


def peak_bytes() -> int:
    """This process's highest resident memory so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Start the peak anew from what is resident now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()
