"""What merely starting costs: seconds and peak memory of `import matryo` and of `matryo --help`, in fresh processes.

    python benchmarks/startup/run.py [--smoke]

Each is run in turn with a bare interpreter, ten times, and the median is taken: as installed, and "uncompiled", where
Python finds no .pyc file of any package, as in the very first run from a read-only image. Fails if a median as
installed is over half a second or 120 MB, or if torch comes in at all.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import save

SECONDS, MEGABYTES = 0.5, 120
HELP = "import matryo.cli, sys; sys.exit(matryo.cli.run(['--help']))"
COMMANDS = {"interpreter": "pass", "import matryo": "import matryo", "matryo --help": HELP}
TELL = "import atexit,sys; atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n"


def once(code: str, uncompiled: bool) -> dict[str, Any]:
    """One fresh process. Uncompiled: it looks for compiled files in an empty folder."""
    with tempfile.TemporaryDirectory() as empty:
        settings = os.environ | ({"PYTHONPYCACHEPREFIX": empty} if uncompiled else {})
        started = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", TELL + code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=settings
        )
        assert child.stderr is not None
        said = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        child.stderr.close()
    if child.returncode or said != "False":
        sys.exit(f"{code}: exit status {child.returncode}, it said: {said} (torch must not be imported)")
    return {"seconds": seconds, "megabytes": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="once each, no limits, written nowhere")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = [
        {"what": what, "uncompiled": uncompiled, "round": turn, **once(code, uncompiled)}
        for turn in range(1 if options.smoke else 10)
        for uncompiled in (False, True)
        for what, code in COMMANDS.items()
    ]
    late = []
    for uncompiled in (False, True):
        for what in COMMANDS:
            mine = [row for row in rows if (row["what"], row["uncompiled"]) == (what, uncompiled)]
            seconds, megabytes = (statistics.median(row[name] for row in mine) for name in ("seconds", "megabytes"))
            print(f"{what:14} {'uncompiled' if uncompiled else 'installed':10} {seconds:.3f} s {megabytes:.0f} MB")
            late += [what] if not uncompiled and (seconds > SECONDS or megabytes > MEGABYTES) else []
    if options.smoke:
        return
    save(options.out / "rows.jsonl", rows)
    if late:
        sys.exit(f"over {SECONDS} s or {MEGABYTES} MB: {', '.join(late)}")


if __name__ == "__main__":
    main()
