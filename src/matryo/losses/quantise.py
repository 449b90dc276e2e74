"""Training for the codes a prefix will be stored in: InfoNCE over widths x codes (quantisation-aware nesting).

Letters: B anchors, N candidates, D full width, L widths, d a width.

Forwards a prefix is what search will see: cut, renormalised, encoded and decoded as `matryo.core.codecs` does it.
Backwards the rounding is passed over as if it were the identity, the straight-through estimator (arXiv 1308.3432,
section 4, refined in arXiv 1602.02830, equation 4, by stopping the gradient where the value is out of range).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from matryo.core.codecs import codec
from matryo.core.errors import InputError
from matryo.core.prefix import Nesting, check_width, truncate
from matryo.losses.info_nce import nested_info_nce

CODES = ("float32", "int8", "binary")
FLOAT_AND_BINARY = {"float32": 1.0, "binary": 1.0}
Weight = float | Sequence[float]
Temperature = float | Sequence[float] | Tensor


def straight_through(
    x_BD: Tensor, code: str, width: int, scale: Tensor | None = None, *, clip: float | None = None
) -> Tensor:
    """decode(encode(truncate(x, width))) forwards, the gradient of truncate(x, width) backwards.

    Args:
        x_BD: (B, D), any row lengths. Half precision is widened to float32 first, which no code is narrower than.
        code: "float32" (nothing is lost), "int8" or "binary", with the numbers of `matryo.core.codecs`.
        width: d in 1..D; a multiple of 8 for binary.
        scale: (d,) int8 step of each dimension of the prefixes; by default fitted to these prefixes, largest magnitude
            / 127. A value beyond 127 steps is clipped and passes no gradient.
        clip: binary only: a coordinate passes no gradient where |y_i| sqrt(d) > clip, y being the unit prefix, whose
            coordinates have y_i sqrt(d) = 1 on average (root mean square). None passes all.

    Returns:
        (B, d) in float32 (float64 for float64 input): int8 codes times their step, or +-1/sqrt(d). A row whose prefix
        is zero passes no gradient; its signs are all -1/sqrt(d), as search has it.

    Raises:
        InputError: unknown code, width outside 1..D or not a multiple of 8, a scale or clip that does not fit.
    """
    _check_code(code, check_width(width, x_BD.shape[-1]))
    if (scale is not None and code != "int8") or (clip is not None and code != "binary"):
        raise InputError(f"scale is for int8 and clip for binary, got one of them for {code}")
    if clip is not None and not clip > 0:
        raise InputError(f"clip must be above 0, got {clip}; 1 stops the gradient beyond the root mean square")
    with torch.autocast(x_BD.device.type, enabled=False):
        y = truncate(x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)), width)
        if code == "float32":
            return y
        if code == "binary":
            root = y.new_tensor(width).sqrt()
            signs = ((y > 0).to(y.dtype) * 2 - 1) / root
            return _pass_through(y, signs, None if clip is None else y.abs() * root <= clip)
        step = _step(y) if scale is None else _checked_scale(scale, y)
        codes = torch.round(y.detach() / step).clamp_(-127, 127)
        return _pass_through(y, codes * step, None if scale is None else y.abs() <= 127 * step)


def int8_scale(x_ND: Tensor, width: int) -> Tensor:
    """(width,) int8 step of each dimension, fitted to the unit prefixes of these rows as `codecs.Int8.fit` does it."""
    return _step(truncate(x_ND.detach().to(torch.promote_types(x_ND.dtype, torch.float32)), width))


def nested_quantised_info_nce(
    anchors_BD: Tensor,
    candidates_ND: Tensor,
    *,
    nesting: Nesting,
    codes: Mapping[str, Weight] = FLOAT_AND_BINARY,
    temperature: Temperature | Mapping[str, Temperature] = 0.05,
    asymmetric: Collection[str] = ("int8",),
    clip: float | None = None,
    per_width: bool = False,
    **options: Any,
) -> Any:
    """Sum over codes of weight * nested InfoNCE on the prefixes in that code, straight-through backwards.

    Matryoshka Representation Learning (arXiv 2205.13147), equation 1, once for each code. What is trained is what
    `matryo.evaluate` measures and an index scans: signs meet signs (Hamming) for binary, a float query meets decoded
    documents for int8.

    Binary at all widths costs one nested InfoNCE: the sign of a coordinate does not depend on the width, so the codes
    of a prefix are, renormalised, a prefix of the codes. The gradient at the signs, summed over widths, goes straight
    through to the unit row of full width. int8 has a step of its own at each width and is taken width by width.

    Args:
        anchors_BD: (B, D) queries, as for `nested_info_nce`.
        candidates_ND: (N, D) documents, the positives first; int8 steps are fitted to their prefixes, after the cut.
        nesting: widths and weights; with binary all widths must be multiples of 8.
        codes: code -> weight, from "float32", "int8", "binary"; a weight for the code or one for each width, which
            multiplies the nesting's own. A code or width of weight 0 is only measured.
        temperature: as for `nested_info_nce`, or one such for each code: {"float32": 0.05, "binary": [0.12, 0.06]}.
            Cosines of signs are smaller than those of the vectors (2 / pi times the arc sine) and scatter by
            1 / sqrt(d), so binary wants its own, higher where prefixes are short.
        asymmetric: codes whose anchors stay float32 while the candidates are coded.
        clip: of the binary gradient, see `straight_through`.
        per_width: also return {code: (L,) unweighted loss of each width, detached}.
        **options: `targets`, `symmetric`, `ignore`, `group` and `chunk` of `nested_info_nce`.

    Returns:
        A scalar in float32 (float64 for float64 input), or (scalar, {code: per-width values}).

    Raises:
        InputError: what `nested_info_nce` refuses; unknown codes, weights that are all 0, negative or not finite, a
            code without a temperature, a width that binary cannot have.
    """
    _check_grid(codes, nesting, temperature, asymmetric)
    total, values = anchors_BD.new_zeros((), dtype=torch.promote_types(anchors_BD.dtype, torch.float32)), {}
    for code, weight in codes.items():
        degree = temperature[code] if isinstance(temperature, Mapping) else temperature
        part, share = _weighted(nesting, weight)
        one_side = code in asymmetric
        if code == "int8":
            loss, values[code] = _int8(anchors_BD, candidates_ND, part, degree, one_side, options)
        else:
            anchors, candidates = (
                x if coded == "float32" else straight_through(x, coded, nesting.D, clip=clip)
                for x, coded in ((anchors_BD, "float32" if one_side else code), (candidates_ND, code))
            )
            loss, values[code] = nested_info_nce(
                anchors, candidates, nesting=part, temperature=degree, per_width=True, **options
            )
        total = total + share * loss
    return (total, values) if per_width else total


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _values: Tensor, coded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.inside = inside
        return coded.view_as(coded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream if ctx.inside is None else upstream * ctx.inside, None, None


def _pass_through(values: Tensor, coded: Tensor, inside: Tensor | None) -> Tensor:
    through: Tensor = _StraightThrough.apply(values, coded, inside)  # type: ignore[no-untyped-call]
    return through


def _int8(
    anchors: Tensor,
    candidates: Tensor,
    nesting: Nesting,
    temperature: Temperature,
    one_side: bool,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Weighted total and (L,) losses, width by width."""
    nesting.check(candidates.shape[-1])
    given = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature, dtype=torch.float64)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != len(nesting)):
        raise InputError(
            f"temperature must be one number or one per width ({len(nesting)}), got shape {tuple(given.shape)}"
        )
    values = []
    for width, degree in zip(nesting.widths, given.expand(len(nesting)), strict=True):
        # One step for both sides, fitted to the documents: what is indexed sets the scale, queries are met by it.
        step = int8_scale(candidates, width)
        documents = straight_through(candidates, "int8", width, step)
        queries = anchors[:, :width] if one_side else straight_through(anchors, "int8", width, step)
        values.append(nested_info_nce(queries, documents, nesting=Nesting([width]), temperature=degree, **options))
    losses = torch.stack(values)
    return (losses * losses.new_tensor(nesting.weights)).sum(), losses.detach()


def _step(prefixes: Tensor) -> Tensor:
    return prefixes.detach().abs().amax(0).clamp(min=1e-6) / 127


def _check_code(code: str, width: int) -> None:
    if code not in CODES:
        raise InputError(f"unknown code {code!r}; a loss can train for {', '.join(CODES)}")
    codec(code, width)


def _checked_scale(scale: Tensor, prefixes: Tensor) -> Tensor:
    if scale.shape != prefixes.shape[1:] or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise InputError(
            f"scale must be {prefixes.shape[1]} positive numbers, one per dimension, got shape {tuple(scale.shape)}"
        )
    return scale.detach().to(prefixes)


def _weighted(nesting: Nesting, weight: Weight) -> tuple[Nesting, float]:
    """The nesting of one code and what its loss counts: 0 where all its weights are 0, which a nesting cannot have."""
    weights = np.multiply(nesting.weights, weight)
    return (Nesting(nesting.widths, weights.tolist()), 1.0) if weights.any() else (nesting, 0.0)


def _check_grid(
    codes: Mapping[str, Weight],
    nesting: Nesting,
    temperature: Temperature | Mapping[str, Temperature],
    asymmetric: Collection[str],
) -> None:
    for code in (*codes, *asymmetric):
        for width in nesting.widths:
            _check_code(code, width)
    for code, weight in codes.items():
        if np.shape(weight) not in ((), (len(nesting),)):
            raise InputError(
                f"the weight of {code} must be one number or one per width ({len(nesting)}), got {weight!r}"
            )
    weights = np.array([np.multiply(nesting.weights, weight) for weight in codes.values()])
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError(f"codes need finite weights >= 0, one of them above 0, got {dict(codes)}")
    missing = [code for code in codes if code not in temperature] if isinstance(temperature, Mapping) else []
    if missing:
        raise InputError(f"temperature has nothing for {', '.join(missing)}; give one number, or one for every code")
