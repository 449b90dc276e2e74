"""Haystack: embedders of texts and of documents, and a retriever. Needs the `haystack` extra.

Haystack counts pipeline runs and sends them to its makers unless HAYSTACK_TELEMETRY_ENABLED is "False".
"""

from dataclasses import replace
from typing import Any, Self

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret

from matryo.clients.http import KEY, Client
from matryo.clients.local import Local
from matryo.core.errors import InputError


class _Source:
    """Where vectors come from, in a form that a pipeline's file can hold: an address and the name of a secret.

    Args:
        url: the server's address; MATRYO_URL by default.
        key: the key's place; MATRYO_API_KEY by default, where it is set.
        model: what the server calls the model; the first it serves by default.
        local: a model of this process in the place of a server. Such a pipeline cannot be written to a file.
    """

    def __init__(
        self, url: str | None = None, key: Secret | None = None, model: str | None = None, local: Local | None = None
    ) -> None:
        self.url, self.model, self.local = url, model, local
        self.key = Secret.from_env_var(KEY, strict=False) if key is None else key
        self._caller: Client | Local | None = local

    @property
    def _source(self) -> Client | Local:
        if self._caller is None:
            self._caller = Client(self.url, self.key.resolve_value(), model=self.model)
        return self._caller

    def _written(self, **more: Any) -> dict[str, Any]:
        if self.local is not None:
            raise InputError("a component with a model of this process cannot be written to a file; give it a url")
        return default_to_dict(self, url=self.url, key=self.key, model=self.model, **more)

    def close(self) -> None:
        """Close the connections to the server; the next run opens new ones."""
        if isinstance(self._caller, Client):
            self._caller.close()
            self._caller = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From what `to_dict` gave."""
        return default_from_dict(cls, data)


@component
class MatryoTextEmbedder(_Source):
    """The vector of a query: `run(text)` gives `embedding`, a unit vector of the width asked for."""

    def __init__(
        self,
        url: str | None = None,
        key: Secret | None = None,
        model: str | None = None,
        width: int | None = None,
        local: Local | None = None,
    ) -> None:
        _Source.__init__(self, url, key, model, local)  # the decorator makes another class, which super() misses
        self.width = width

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        """Encode one text as a query."""
        return {"embedding": self._source.embed([text], self.width, input_type="query")[0].tolist()}

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline's file."""
        return self._written(width=self.width)


@component
class MatryoDocumentEmbedder(_Source):
    """Vectors of documents: `run(documents)` gives copies of them with `embedding` set.

    Args:
        meta_fields_to_embed: fields of `meta` to put in front of the content, a line each.
    """

    def __init__(
        self,
        url: str | None = None,
        key: Secret | None = None,
        model: str | None = None,
        width: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        local: Local | None = None,
    ) -> None:
        _Source.__init__(self, url, key, model, local)  # the decorator makes another class, which super() misses
        self.width, self.meta_fields_to_embed = width, meta_fields_to_embed or []

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Encode documents as documents. One without text is an InputError that names it by position."""
        rows = self._source.embed([self._text(one) for one in documents], self.width, input_type="document")
        with_rows = zip(documents, rows.tolist(), strict=True)
        return {"documents": [replace(one, embedding=row) for one, row in with_rows]}

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline's file."""
        return self._written(width=self.width, meta_fields_to_embed=self.meta_fields_to_embed)

    def _text(self, document: Document) -> str:
        fields = [document.meta.get(name) for name in self.meta_fields_to_embed]
        return "\n".join([*(str(field) for field in fields if field is not None), document.content or ""])


@component
class MatryoRetriever(_Source):
    """The best items of an index: `run(query)` gives `documents`, scored by their full-width cosine.

    Args:
        top_k, plan, where: as `Client.search` takes them; `top_k` and `where` may be given to `run` too.
    """

    def __init__(
        self,
        url: str | None = None,
        key: Secret | None = None,
        top_k: int = 10,
        plan: str | None = None,
        where: dict[str, Any] | None = None,
        local: Local | None = None,
    ) -> None:
        _Source.__init__(self, url, key, None, local)
        self.top_k, self.plan, self.where = top_k, plan, where

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, top_k: int | None = None, where: dict[str, Any] | None = None
    ) -> dict[str, list[Document]]:
        """Search with one text."""
        k, limits = self.top_k if top_k is None else top_k, self.where if where is None else where
        found = self._source.search(query, k, plan=self.plan, where=limits)
        rows = zip(found.ids[0], found.scores[0], found.documents[0], found.metadata[0], strict=True)
        return {
            "documents": [
                Document(id=key, content=words, meta=more or {}, score=score) for key, score, words, more in rows
            ]
        }

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline's file."""
        written = self._written(top_k=self.top_k, plan=self.plan, where=self.where)
        del written["init_parameters"]["model"]
        return written
