"""Static encoders in training: tokenise once, touch only the rows a batch uses.

The trained module is sentence-transformers' own StaticEmbedding, so the saved folder is theirs. Only its embedding bag
is exchanged, for one whose gradient is sparse in rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from matryo.core.errors import InputError
from matryo.core.records import read_vectors
from matryo.training.config import StaticConfig

Ints = NDArray[np.int64]
UNKNOWN = "[UNK]"
TEXTS = 1024
"""Texts tokenised at a time: what a tokeniser returns takes far more memory than the numbers kept of it."""


class RowSparseBag(nn.EmbeddingBag):
    """Mean of embedding rows whose gradient holds the touched rows only, each once.

    Neither pass grows with the vocabulary, and the optimiser gets a coalesced sparse gradient of (rows used, D) instead
    of one row per token.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:  # noqa: A002
        """(tokens,) ids and (texts,) offsets -> (texts, D)."""
        found: Tensor = _Bag.apply(self.weight, input, offsets)  # type: ignore[no-untyped-call]
        return found


class _Bag(torch.autograd.Function):
    """The mean over the tokens of each text. The gradient of a bag is a bag: of each token, over the texts it is in."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(ids, offsets)
        ctx.shape = weight.shape
        return F.embedding_bag(ids, weight, offsets, mode="mean")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        ids, offsets = ctx.saved_tensors
        lengths = torch.diff(offsets, append=offsets.new_tensor([len(ids)]))
        tokens, order = torch.sort(ids, stable=True)
        first = torch.ones_like(tokens, dtype=torch.bool)
        torch.ne(tokens[1:], tokens[:-1], out=first[1:])
        starts = first.nonzero().squeeze(1)
        texts = torch.repeat_interleave(lengths)[order]
        values = F.embedding_bag(texts, upstream / lengths[:, None], starts, mode="sum")
        rows = tokens[starts][None]
        return torch.sparse_coo_tensor(rows, values, ctx.shape, is_coalesced=True, check_invariants=False), None, None


def _mark_coalesced(weight: Tensor) -> None:
    # Accumulating forgets that rows come sorted and distinct, so the optimiser need not sort and add them up again.
    if weight.grad is not None and weight.grad.is_sparse:
        weight.grad = weight.grad._coalesced_(True)


def make_row_sparse(model: SentenceTransformer) -> None:
    """Exchange the bag of a static model for a row-sparse one that shares its weight."""
    module: Any = model[0]
    weight = module.embedding.weight.detach()
    bag = RowSparseBag(weight.shape[0], weight.shape[1], mode="mean", _weight=weight)
    weight_hook: Any = bag.weight.register_post_accumulate_grad_hook
    weight_hook(_mark_coalesced)
    module.embedding = bag


class TokenBags:
    """Texts tokenised once: flat token ids and where each text starts."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        found = [np.empty(0, np.int64)]
        for start in range(0, len(texts), TEXTS):
            encodings = tokenizer.encode_batch_fast(texts[start : start + TEXTS], add_special_tokens=False)
            found += [np.array(encoding.ids, np.int64) for encoding in encodings]
        self.lengths = np.array([len(ids) for ids in found[1:]], np.int64)
        self.ids = np.concatenate(found)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def take(self, rows: Ints) -> tuple[Ints, Ints]:
        """Flat ids and offsets of some texts."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(self.starts[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return self.ids[source], offsets[:-1]


def merge_bags(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several columns as one, so that the table is gathered once and has one gradient."""
    sizes = np.cumsum([0] + [len(f["input_ids"]) for f in features[:-1]])
    return {
        "input_ids": torch.cat([f["input_ids"] for f in features]),
        "offsets": torch.cat([f["offsets"] + int(size) for f, size in zip(features, sizes, strict=True)]),
    }


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A lower-casing WordPiece tokeniser with BERT's normalisation, trained on these texts: equal texts, equal tokens.

    The trainer breaks ties between merges by token number, and numbers the letters inside words in the order of a hash
    table that differs from call to call. So the letters are found first, and numbered in alphabetical order.
    """
    texts = list(texts)

    def trained(size: int, first: list[str]) -> dict[str, int]:
        made = _word_piece(models.WordPiece(unk_token=UNKNOWN))
        made.train_from_iterator(
            texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        )
        return made.get_vocab()

    letters = sorted(token for token in trained(0, [UNKNOWN]) if token.startswith("##") and len(token) == 3)
    tokenizer = _word_piece(models.WordPiece(vocab=trained(vocabulary, [UNKNOWN, *letters]), unk_token=UNKNOWN))
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


def _word_piece(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def new_static(config: StaticConfig, texts: Sequence[str], seed: int) -> SentenceTransformer:
    """A static model to train: from given vectors, or random rows weighted by inverse document frequency.

    Random rows of equal length make the untrained model a random projection of word counts; weighting them by idf makes
    it one of tf-idf, which is where training should start from: rare words say what a text is about.
    """
    if config.tokenizer is None:
        tokenizer = train_tokenizer(texts, config.vocabulary)
    elif config.tokenizer.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(config.tokenizer))
        except Exception as error:  # tokenizers raises bare Exception for malformed files
            raise InputError(f"{config.tokenizer} is not a tokenizer.json ({error})") from error
    else:
        raise InputError(f"no such file: {config.tokenizer}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    if config.vectors is not None:
        table = torch.from_numpy(np.array(read_vectors(config.vectors)))
        if len(table) != size:
            raise InputError(f"{config.vectors} has {len(table)} rows, but {config.tokenizer} has {size} tokens")
    else:
        table = torch.randn(size, config.width, generator=torch.Generator().manual_seed(seed))
        table *= torch.from_numpy(_inverse_document_frequency(tokenizer, texts)).float()[:, None] ** config.idf
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu")


def _inverse_document_frequency(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.float64]:
    """log((N + 1) / (documents with the token + 1)) of each token, scaled to mean 1."""
    documents = np.zeros(tokenizer.get_vocab_size())
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        documents[np.unique(np.array(encoding.ids, np.int64))] += 1
    idf = np.log((len(texts) + 1) / (documents + 1)) + 1e-3
    return np.asarray(idf / idf.mean(), dtype=np.float64)
