"""`Local`: what a `Client` does, by a model and an index of this process."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.clients.wire import Found, texts_of
from matryo.core.errors import InputError


class Local:
    """A model, and an index of its vectors where there is one, with the methods of a `Client`.

    Args:
        model: from `matryo.load`. One whose queries need words in front is refused: only a server puts them there.
        index: a `matryo.Index` of vectors of that model; needed for `search`.

    Raises:
        InputError: the model has prompts, or the index is of another width.
    """

    def __init__(self, model: Any, index: Any = None) -> None:
        held = sorted(name for name, words in _prompts(model).items() if words)
        if held:
            raise InputError(
                f"{model.name} has prompts ({', '.join(held)}), which only a server applies; run 'matryo serve' and "
                "use a Client"
            )
        self._model, self._index = model, index
        held_width = model.width if index is None else index.stats()["width"]
        if held_width != model.width:
            raise InputError(
                f"the index holds vectors of width {held_width} and the model gives {model.width}; open the index that "
                "this model made"
            )
        self.url, self.model = None, model.name

    def embed(
        self,
        texts: Sequence[str],
        width: int | None = None,
        *,
        depth: int | None = None,
        input_type: str | None = None,
    ) -> NDArray[np.float32]:
        """(N, width) unit rows, as `Client.embed` gives them. Without prompts every input type is encoded alike."""
        if input_type not in (None, "query", "document"):
            raise InputError(f"input_type must be query or document, got {input_type!r}")
        rows: NDArray[np.float32] = self._model.encode(texts, width=width, depth=depth)
        return rows

    def search(
        self,
        query: str | Sequence[str],
        k: int = 10,
        *,
        plan: str | None = None,
        where: dict[str, Any] | None = None,
        explain: bool = False,
    ) -> Found:
        """The k best items for each query, as `Client.search` gives them."""
        if self._index is None:
            raise InputError("there is no index to search; give one: Local(model, index)")
        vectors = self._model.encode(texts_of(query, "query"))
        hits = self._index.search(vectors, k=k, plan=plan, where=where, explain=explain)
        ran = plan or str(self._index.stats()["plan"])
        stages = None if hits.explanation is None else [dataclasses.asdict(stage) for stage in hits.explanation]
        return Found(hits.ids, hits.scores, hits.documents, hits.metadata, ran, stages, hits.promise)

    def __repr__(self) -> str:
        return f"Local({self.model!r}, index={self._index!r})"


def _prompts(model: Any) -> dict[str, str]:
    """Those of an export or of a sentence-transformers model; others have none."""
    inner = getattr(model.encoder, "about", None) or getattr(model.encoder, "model", None)
    return dict(getattr(inner, "prompts", None) or {})
