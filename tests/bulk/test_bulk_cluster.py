"""A Ray cluster of three machines on loopback loses a worker and a machine: no row is lost or there twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

from matryo.bulk import check

SCRIPT = Path(__file__).with_name("lose_machines.py")
ROWS = 9_600


def test_lost_workers_and_machines_lose_and_double_nothing(trained, write, debian_rows, tmp_path, files_of):
    texts = [row["positive"] for row in debian_rows]
    many = [f"{texts[n % 300]} {texts[n * 7 % 299]}" if n % 100 else None for n in range(ROWS)]
    for n in range(2):
        part = many[n * ROWS // 2 : (n + 1) * ROWS // 2]
        ids = [f"d{n}-{i}" for i in range(len(part))]
        corpus = write(f"{n}.parquet", {"_id": ids, "text": part}, group=800).parent
    refused = {"text": ["mail server", "\u200b"]}
    pyarrow.parquet.write_table(pyarrow.table(refused), tmp_path / "refused.parquet")

    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_raylet_start_wait_time_s"] = "120"  # on a busy machine
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    line = [sys.executable, str(SCRIPT), str(trained), str(corpus), str(tmp_path / "plain"), str(tmp_path / "v")]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])

    assert set(told["lost"]) == {"worker", "machine"}
    for part in told["lost"].values():
        assert any(name.startswith(f".{part}.") for name in told["torn"]), "it was lost in the middle of the part"
    assert files_of(tmp_path / "v") == files_of(tmp_path / "plain")
    found = check(tmp_path / "v")
    assert (found["read"], found["rows"], found["left_out"]) == (ROWS, ROWS * 99 // 100, ROWS // 100)
    ids = [
        key
        for path in sorted((tmp_path / "v").glob("*.parquet"))
        for key in pyarrow.parquet.read_table(path, columns=["_id"]).column(0).to_pylist()
    ]
    assert ids == [f"d{n * 2 // ROWS}-{n % (ROWS // 2)}" for n in range(ROWS) if n % 100]

    kind, said = told["refused"]["text"]
    assert kind == "InputError"
    assert f"{tmp_path / 'refused.parquet'} row 1 (from 0): the model gave only zeros" in said
    kind, said = told["refused"]["gpu"]
    assert kind == "UnavailableError"
    assert "has the 1 CPU and 1 GPU that one worker takes" in said
    assert told["left alone"], "a connection that was there before is not closed"
