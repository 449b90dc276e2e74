"""LlamaIndex: an embedding and a retriever. Needs the `llamaindex` extra."""

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from matryo.clients.http import Client
from matryo.clients.local import Local


class MatryoEmbedding(BaseEmbedding):
    """Unit vectors of any width for LlamaIndex's vector stores.

    Args:
        source: a `Client` or a `Local`; by default a `Client` of MATRYO_URL and MATRYO_API_KEY.
        width: leading dimensions to keep, renormalised; all by default.

    Queries and texts are encoded with the prompts that the model has for each.
    """

    width: int | None = Field(default=None, description="Leading dimensions to keep; all by default.")
    _source: Client | Local = PrivateAttr()

    def __init__(self, source: Client | Local | None = None, width: int | None = None, **more: Any) -> None:
        found = Client() if source is None else source
        super().__init__(width=width, **{"model_name": found.model or "matryo", **more})
        self._source = found

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex writes into its files."""
        return "MatryoEmbedding"

    def _embed(self, texts: list[str], kind: str) -> list[list[float]]:
        rows: list[list[float]] = self._source.embed(texts, self.width, input_type=kind).tolist()
        return rows

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text], "document")[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts, "document")

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


class MatryoRetriever(BaseRetriever):
    """The best items of an index for a query, each a `TextNode` with its id, text and metadata; scores are cosines.

    Args:
        source: a `Client` of a server that has an index, or a `Local` with one.
        k, plan, where: as `Client.search` takes them.
    """

    def __init__(
        self,
        source: Client | Local | None = None,
        k: int = 10,
        plan: str | None = None,
        where: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self._source = Client() if source is None else source
        self._asked: dict[str, Any] = {"k": k, "plan": plan, "where": where}
        super().__init__(**more)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._source.search(query_bundle.query_str, **self._asked)
        rows = zip(found.ids[0], found.scores[0], found.documents[0], found.metadata[0], strict=True)
        return [
            NodeWithScore(node=TextNode(id_=key, text=words or "", metadata=more or {}), score=score)
            for key, score, words, more in rows
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
