"""Callers of a server: `Client` and `AsyncClient` over HTTP, `Local` for the same calls in this process.

`langchain`, `llamaindex` and `haystack` hold classes for those frameworks, each with its extra. Nothing here needs
torch, faiss or the server.
"""

from matryo.clients.http import AsyncClient, Client
from matryo.clients.local import Local
from matryo.clients.wire import Found

__all__ = ["AsyncClient", "Client", "Found", "Local"]
