"""What `matryo plan` found, for those who look at the server: the file it wrote, read and checked."""

import json
from pathlib import Path
from typing import Any

from matryo.core.errors import InputError
from matryo.core.plan import Plan

KINDS = (".json", ".yaml", ".yml")


def read_plans(path: Path) -> dict[str, Any]:
    """The frontier of a `plans.json`, or the one recommendation of a `plan.yaml`, in one shape.

    Returns:
        `items`, `k`, `recall`, `confidence`, and `plans`: each with `plan`, `recall`, `at_least`, `bytes_per_item`
        (None in a yaml), `ms`, `memory_bytes` (at `items`) and whether it is the `best`.

    Raises:
        InputError: not a file of `matryo plan`.
    """
    if path.suffix not in KINDS:
        raise InputError(f"{path}: plans are read from {', '.join(KINDS)}; make one with matryo plan --out plans.json")
    try:
        text = path.read_text(encoding="utf-8")
        found = _from_json(json.loads(text)) if path.suffix == ".json" else _from_yaml(text)
        for row in found["plans"]:
            Plan.parse(row["plan"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: not a readable file of matryo plan ({reason}); make one with matryo plan VECTORS QUERIES "
            f"--out {path.name}"
        ) from error


def _from_json(content: dict[str, Any]) -> dict[str, Any]:
    best = content["best"]
    plans = [
        {
            "plan": row["planned"],
            "recall": float(row["recall"]),
            "at_least": float(row["bound"]),
            "bytes_per_item": float(row["bytes_per_item"]),
            "ms": float(row["predicted"]["ms"]),
            "memory_bytes": float(row["predicted"]["code_bytes"]),
            "best": best is not None and row["planned"] == best["planned"],
        }
        for row in content["frontier"]
    ]
    return _facts(content, int(content["items"])) | {"plans": plans}


def _from_yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    measured, predicted = content["measured"], content["predicted"]
    row = {
        "plan": content["plan"],
        "recall": float(measured["recall"]),
        "at_least": float(measured["at_least"]),
        "bytes_per_item": None,
        "ms": float(predicted["ms"]),
        "memory_bytes": float(predicted["memory_bytes"]),
        "best": True,
    }
    return _facts(content, int(predicted["items"])) | {"plans": [row]}


def _facts(content: dict[str, Any], items: int) -> dict[str, Any]:
    facts = {"recall": float(content["recall"]), "confidence": float(content["confidence"])}
    return {"items": items, "k": int(content["k"]), **facts}
