"""The simplest server anybody writes: FastAPI around `SentenceTransformer.encode`. What ours is measured against."""

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
model = SentenceTransformer(sys.argv[1], device="cpu")
torch.set_num_threads(1)


class Asked(BaseModel):
    model: str
    input: str | list[str]
    dimensions: int | None = None


@app.post("/v1/embeddings")
def embeddings(asked: Asked) -> dict:
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    rows = model.encode(texts, normalize_embeddings=True, truncate_dim=asked.dimensions)
    data = [{"object": "embedding", "index": n, "embedding": row.tolist()} for n, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": asked.model, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
