"""What every benchmark needs: rows with machine, versions and seed; a child process's peak memory."""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    names = ("matryo", "torch", "sentence-transformers", "numpy", "faiss-cpu")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
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


def peak_bytes() -> int:
    """This process's highest resident memory so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Start the peak anew from what is resident now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()
