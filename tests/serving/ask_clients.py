"""Asks a running server by LangChain, LlamaIndex and LiteLLM, as their users would. Run by test_serving_clients.py."""

import json
import math
import sys

url, model = sys.argv[1:3]
TEXTS = ["a puzzle game", "library for images"]
found = {}

from langchain_openai import OpenAIEmbeddings  # noqa: E402

langchain = {"model": model, "base_url": url, "api_key": "none"}
found["langchain"] = OpenAIEmbeddings(**langchain, dimensions=16, check_embedding_ctx_length=False).embed_documents(
    TEXTS
)
try:
    OpenAIEmbeddings(**langchain, tiktoken_enabled=False).embed_documents(TEXTS)
except Exception as error:
    found["langchain refused"] = f"{type(error).__name__}: {error}"

from llama_index.embeddings.openai_like import OpenAILikeEmbedding  # noqa: E402

llama = OpenAILikeEmbedding(model_name=model, api_base=url, api_key="none", dimensions=16)
found["llama_index"] = llama.get_text_embedding_batch(TEXTS)

import litellm  # noqa: E402

litellm.telemetry = False
asked = {"dimensions": 16, "allowed_openai_params": ["dimensions"]}
answer = litellm.embedding(model=f"openai/{model}", input=TEXTS, api_base=url, api_key="none", **asked)
found["litellm"] = [one["embedding"] for one in answer.data]

for name in ("langchain", "llama_index", "litellm"):
    assert all(math.isclose(sum(x * x for x in row), 1, abs_tol=1e-4) for row in found[name])
sys.stdout.write(json.dumps(found) + "\n")
