"""The matrix products of the incremental Gram: one block of columns at a time, forwards and backwards.

Letters: B anchors, N candidates, R rows of a chunk, w columns of a block.
"""

import platform
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

NARROW = 64
"""Columns up to which a block is kept transposed."""
WEIGHT_COLUMNS = 192
"""Columns of a weight that go to oneDNN at a time: more take more memory beside, fewer take longer."""
SHARE_COLUMNS = 96
"""Columns of the candidates' gradient that oneDNN works out at a time, as above."""


class BlockProducts(Protocol):
    """Products of anchors and candidates, block by block, chunk of rows by chunk."""

    spare: Tensor
    """Memory that was asked for beside; it goes when these products go."""

    def grams(self, rows: slice, room_RN: Tensor) -> Iterator[Tensor]:
        """(R, N) products of the prefixes of some anchors with all candidates, block after block. Each is good until
        the next is asked for; `room_RN` is memory for them, free until the last one is out."""

    def add_gradients(self, block: int, rows: slice, suffix_RN: Tensor) -> None:
        """Take the gradient of a block's product: every row once for every block, from the first row on."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(B, D) and (N, D), once all rows and blocks have been added."""


def block_products(anchors_BD: Tensor, candidates_ND: Tensor, blocks: Sequence[slice], spare: int = 0) -> BlockProducts:
    """The products of these blocks of columns by the library that is faster for them.

    Args:
        spare: numbers of memory to be had beside, for what is let go together with the products.
    """
    kind = OneDnnProducts if one_dnn(anchors_BD) else TorchProducts
    return kind(anchors_BD, candidates_ND, blocks, spare)


def one_dnn(x: Tensor) -> bool:
    """Whether float32 products of this tensor go to oneDNN.

    On x86 torch gives them to MKL, which uses half of the vector width of an AMD CPU; oneDNN asks the CPU what it has.
    """
    here: bool = x.device.type == "cpu" and x.dtype == torch.float32 and platform.machine() in ("x86_64", "AMD64")
    return here and bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class TorchProducts:
    """Products by torch.

    Matrix products whose result is a few columns wide run at a fraction of a CPU's speed; the same product with a
    result a few rows high does not. So narrow blocks are kept transposed.
    """

    def __init__(self, anchors: Tensor, candidates: Tensor, blocks: Sequence[slice], spare: int = 0) -> None:
        self.anchors, self.blocks, self.spare = anchors, blocks, anchors.new_empty(spare)
        self.narrow = [block.stop - block.start <= NARROW for block in blocks]
        parts = [candidates[:, block] for block in blocks]
        self.candidates = [_transposed(x) if few else x for x, few in zip(parts, self.narrow, strict=True)]
        self.grad_anchors, self.grad_candidates = torch.empty_like(anchors), torch.empty_like(candidates)
        sums = [self.grad_candidates[:, block] for block in blocks]
        self.sums = [_transposed(x) if few else x for x, few in zip(sums, self.narrow, strict=True)]

    def grams(self, rows: slice, room_RN: Tensor) -> Iterator[Tensor]:
        """See BlockProducts."""
        part = self.anchors[rows]
        for level, (block, candidates) in enumerate(zip(self.blocks, self.candidates, strict=True)):
            yield room_RN.addmm_(part[:, block], candidates.T, beta=int(level > 0))

    def add_gradients(self, block: int, rows: slice, suffix_RN: Tensor) -> None:
        """See BlockProducts."""
        columns, first = self.blocks[block], rows.start == 0
        part, target = self.anchors[rows, columns], self.grad_anchors[rows, columns]
        if self.narrow[block]:
            target.copy_(suffix_RN @ self.candidates[block])
            self.sums[block].T.addmm_(part.T, suffix_RN, beta=int(not first))
        else:
            torch.mm(suffix_RN, self.candidates[block], out=target)
            self.sums[block].addmm_(suffix_RN.T, part, beta=int(not first))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """See BlockProducts."""
        for block, few, total in zip(self.blocks, self.narrow, self.sums, strict=True):
            if few:
                self.grad_candidates[:, block] = total
        return self.grad_anchors, self.grad_candidates


class OneDnnProducts:
    """Products by oneDNN, through the operator that torch's compiler calls: x @ weight^T (+ other).

    It is fast for a dense x, and for a weight that is dense as it stands or transposed. So every block of candidates is
    a matrix of its own, and what is summed over chunks for the candidates is summed transposed. Every call takes memory
    for its result and for a copy of the weight in its own layout, so wide blocks are worked on in parts.
    """

    def __init__(self, anchors: Tensor, candidates: Tensor, blocks: Sequence[slice], spare: int = 0) -> None:
        self.anchors = anchors
        self.blocks = [_parts(block) for block in blocks]
        self.shape = candidates.shape
        # What stays is allocated first, and what goes with these products in one piece: the C library gives a large
        # piece back, and keeps holes of the sizes that the backward pass wants next, too small by its own padding.
        self.room = candidates.new_empty(candidates.numel())
        self.grad_anchors = torch.empty_like(anchors)
        self.candidates = self._matrices(self.room)
        for columns, part in self.candidates.items():
            part.copy_(candidates[:, slice(*columns)])
        sums, self.spare = candidates.new_empty(candidates.numel() + spare).split_with_sizes(
            [candidates.numel(), spare]
        )
        self.sums = {columns: part.view(part.shape[1], -1) for columns, part in self._matrices(sums).items()}

    def _matrices(self, room: Tensor) -> dict[tuple[int, int], Tensor]:
        """(N, w) for each part of a block, dense, one after the other."""
        count = self.shape[0]
        parts = [columns for block in self.blocks for columns in block]
        sizes = [count * (end - start) for start, end in parts]
        return {columns: x.view(count, -1) for columns, x in zip(parts, room.split_with_sizes(sizes), strict=True)}

    def grams(self, rows: slice, room_RN: Tensor) -> Iterator[Tensor]:
        """See BlockProducts; the operator gives memory of its own."""
        gram: Tensor | None = None
        for block in self.blocks:
            for columns in block:
                gram = _linear(self.anchors[rows, slice(*columns)].contiguous(), self.candidates[columns], gram)
            assert gram is not None
            yield gram

    def add_gradients(self, block: int, rows: slice, suffix_RN: Tensor) -> None:
        """See BlockProducts."""
        for columns in self.blocks[block]:
            place = slice(*columns)
            self.grad_anchors[rows, place] = _linear(suffix_RN, self.candidates[columns].T)
            parts = torch.split(self.anchors[rows, place].T, SHARE_COLUMNS)
            for part, total in zip(parts, torch.split(self.sums[columns], SHARE_COLUMNS), strict=True):
                share = _linear(part.contiguous(), suffix_RN.T)
                if rows.start == 0:
                    total.copy_(share)
                else:
                    total.add_(share)
                del share  # before the next is taken

    def gradients(self) -> tuple[Tensor, Tensor]:
        """See BlockProducts."""
        # The copies of the blocks have served: the candidates' gradient takes their place.
        self.candidates = {}
        grad_candidates = self.room.view(self.shape)
        for columns, total in self.sums.items():
            grad_candidates[:, slice(*columns)] = total.T
        return self.grad_anchors, grad_candidates


def _parts(block: slice) -> list[tuple[int, int]]:
    """(start, end) of pieces of at most `WEIGHT_COLUMNS` columns."""
    starts = range(block.start, block.stop, WEIGHT_COLUMNS)
    return [(start, min(start + WEIGHT_COLUMNS, block.stop)) for start in starts]


def _transposed(x: Tensor) -> Tensor:
    """The same matrix, its columns dense."""
    return x.T.contiguous().T


def _linear(x: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    operator: Any = torch.ops.mkldnn._linear_pointwise
    found: Tensor = (
        operator(x, weight, None, "none", [], "") if other is None else operator.binary(x, other, weight, None, "add")
    )
    return found
