"""LangChain: an embedding and a retriever. Needs the `langchain` extra."""

import asyncio
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from matryo.clients.http import Client
from matryo.clients.local import Local


class MatryoEmbeddings(Embeddings):
    """Unit vectors of any width for LangChain's vector stores.

    Args:
        source: a `Client` or a `Local`; by default a `Client` of MATRYO_URL and MATRYO_API_KEY.
        width: leading dimensions to keep, renormalised; all by default.

    Queries and documents are encoded with the prompts that the model has for each.
    """

    def __init__(self, source: Client | Local | None = None, width: int | None = None) -> None:
        self.source = Client() if source is None else source
        self.width = width

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector a text."""
        rows: list[list[float]] = self.source.embed(texts, self.width, input_type="document").tolist()
        return rows

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        row: list[float] = self.source.embed([text], self.width, input_type="query")[0].tolist()
        return row


class MatryoRetriever(BaseRetriever):
    """The best items of an index for a query.

    A document's text is `page_content` (empty where the index keeps none); its id, metadata and full-width cosine, as
    `score`, come with it. `k`, `plan` and `where` are set here, or per call: `retriever.invoke("chess", k=3)`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    source: Client | Local = Field(default_factory=Client)
    k: int = 10
    plan: str | None = None
    where: dict[str, Any] | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **call: Any
    ) -> list[Document]:
        return self._documents(query, call)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **call: Any
    ) -> list[Document]:
        return await asyncio.to_thread(self._documents, query, call)

    def _documents(self, query: str, call: dict[str, Any]) -> list[Document]:
        asked = {"k": self.k, "plan": self.plan, "where": self.where} | call
        found = self.source.search(query, **asked)
        rows = zip(found.ids[0], found.scores[0], found.documents[0], found.metadata[0], strict=True)
        return [
            Document(id=key, page_content=words or "", metadata={**(more or {}), "score": score})
            for key, score, words, more in rows
        ]
