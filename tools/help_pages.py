"""Write docs/reference/cli.md from the commands' own --help, or fail if it is out of date (--check)."""

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/reference/cli.md"
VERBS = ("", "train", "mine", "eval", "classify", "classify fit", "classify predict", "embed",
         "index", "index build", "index add", "index delete", "index stats", "index check",
         "index compact", "search", "export", "serve", "key", "demo", "doctor")  # fmt: skip


def page() -> str:
    settings = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    parts = ["# Command line\n\nGenerated from `--help` by `make docs`.\n"]
    for verb in VERBS:
        command = [sys.executable, "-m", "matryo", *verb.split(), "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=settings).stdout
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## matryo {verb}".rstrip() + f"\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text() != page():
            sys.exit(f"{PAGE} is out of date; run: make docs")
    else:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page())
