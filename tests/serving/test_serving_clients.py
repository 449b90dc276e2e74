"""LangChain, LlamaIndex and LiteLLM against a running server.

Their many dependencies stay out of this environment: MATRYO_CLIENTS names an interpreter that has langchain-openai,
llama-index-embeddings-openai-like and litellm.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import matryo as mt

CLIENTS = os.environ.get("MATRYO_CLIENTS")


@pytest.mark.slow
@pytest.mark.skipif(not CLIENTS, reason="MATRYO_CLIENTS names no interpreter with the three clients")
def test_three_clients_get_the_same_vectors(served, static_model):
    script = Path(__file__).parent / "ask_clients.py"
    line = [str(CLIENTS), str(script), f"{served.url}/v1", "words"]
    ran = subprocess.run(
        line,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": os.environ["PATH"], "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    unit = mt.load(static_model).encode(["a puzzle game", "library for images"], width=16)
    for name in ("langchain", "llama_index", "litellm"):
        np.testing.assert_allclose(found[name], unit, atol=1e-6)
