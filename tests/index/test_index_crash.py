import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kill_writer.py"


def kill_repeatedly(folder: Path, rounds: int, seed: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), str(folder), str(rounds), str(seed)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["wrong"] == []
    assert told["rounds"] == rounds
    return told


def test_acknowledged_batches_survive_kill_9_at_100_random_moments(tmp_path):
    told = kill_repeatedly(tmp_path / "index", 100, seed=1)
    # The test is worth something only if most kills fell into a running operation.
    assert told["acknowledged"] > 50
    assert told["cut"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_acknowledged_batches_survive_kill_9_at_many_more(tmp_path, seed):
    kill_repeatedly(tmp_path / "index", 500, seed)
