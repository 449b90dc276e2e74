"""Adaptive classification (arXiv 2205.13147, section 4.2.1): each item is read only as wide as it needs.

Letters: N items, C classes, D full width, L widths, d a width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from matryo.classify.heads import STRENGTH, LinearHeads, fit_heads
from matryo.classify.thresholds import NEVER, frontier, levels_of, paid
from matryo.core.errors import DamagedError, FormatError, InputError
from matryo.core.files import write_atomically
from matryo.core.gram import check_widths
from matryo.core.labelled import check_labels
from matryo.core.promise import p_value
from matryo.core.records import check_vectors

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
FORMAT = 1
FILE = "classifier.safetensors"
"""Tensors, and all else as JSON in its metadata: one file, so that it is there whole or not at all."""
SEED = 0
CONFIDENCES = ("softmax", "margin")


@dataclass(frozen=True)
class Predicted:
    """Labels of N items and the width each was decided at."""

    labels: list[str]
    widths: NDArray[np.int64]
    """(N,) the last prefix used."""
    read: NDArray[np.int64]
    """(N,) dimensions read: the sum over every head that was evaluated; tied heads read each dimension once."""


@dataclass(frozen=True)
class Tradeoff:
    """One point of the curve. The honest cost is `expected_width`; `last_width` is what the paper counts."""

    accuracy: float
    expected_width: float
    """Mean over items of the summed widths of every head that was evaluated; of tied heads, that of the last one."""
    last_width: float
    """Mean width of the last prefix used."""
    multiply_adds: float
    """Mean multiplications and additions of all heads evaluated: expected width times classes."""
    thresholds: tuple[float, ...]


class AdaptiveClassifier:
    """Heads on prefixes with a threshold each: an item stops at the first width whose confidence reaches it.

    A threshold of infinity skips its head, which then costs nothing. One above 1 that is finite evaluates the head and
    always goes on.

    Args:
        heads: of L widths.
        thresholds: L - 1 numbers of at least 0, for all widths but the last.
        confidence: "softmax", the largest probability, or "margin", the largest less the second.
        ladder: other threshold vectors, learned on the same calibration split, for the curve.
    """

    def __init__(
        self,
        heads: LinearHeads,
        thresholds: Sequence[float] | Float64s,
        confidence: str = "softmax",
        ladder: Sequence[Float64s] = (),
    ) -> None:
        if confidence not in CONFIDENCES:
            raise InputError(f"unknown confidence {confidence!r}; use {' or '.join(CONFIDENCES)}")
        self.heads, self.confidence = heads, confidence
        self.thresholds = self._checked(thresholds)
        self.ladder = [self._checked(t) for t in ladder]

    def _checked(self, thresholds: Sequence[float] | Float64s) -> Float64s:
        given = np.asarray(thresholds, dtype=np.float64)
        if given.shape != (len(self.heads.widths) - 1,) or not (given >= 0).all():
            raise InputError(
                f"{len(self.heads.widths)} widths need {len(self.heads.widths) - 1} thresholds "
                f"of at least 0, got {given}"
            )
        return given

    @classmethod
    def fit(
        cls,
        vectors_ND: Float32s,
        labels: Sequence[Any],
        calibration: tuple[Float32s, Sequence[Any]],
        *,
        widths: Sequence[int] | None = None,
        heads: LinearHeads | None = None,
        target: float | None = None,
        promised: float | None = None,
        confidence: str = "softmax",
        strength: float | None = STRENGTH,
    ) -> "AdaptiveClassifier":
        """Fit heads on vectors and labels, and thresholds on a calibration split that the heads have not seen.

        Args:
            vectors_ND, labels: N training items; not looked at where `heads` are given.
            calibration: (vectors_MD, labels) of other items; never those of a test.
            widths: rising, ending at most at D; powers of two from 8 on and D by default.
            heads: trained heads to use instead. Those that do not normalise need vectors of raw length, here and to
                predict: `Model.features`.
            target: accuracy to keep; by default that of the full head on the calibration split.
            promised: with this confidence (say 0.95) the expected accuracy on new items is at least `target`. A random
                half of the calibration split then makes the ladder, the other tests it from its dearest rung down
                until one fails (fixed-sequence testing; Angelopoulos et al., Learn then test, arXiv 2110.01052).
            strength: of `fit_heads`, None for the best of each width; not looked at where `heads` are given. Dimensions
                that say much the same ask for more: with too little, widths that hold the same differ, and nothing
                stops early.

        Raises:
            InputError: what does not fit; a target that cannot be reached or, with `promised`, not be shown.
        """
        known, names = check_vectors(np.asarray(calibration[0]), "calibration"), check_labels(calibration[1])
        if len(known) != len(names):
            raise InputError(f"calibration: {len(known)} vectors but {len(names)} labels; give one for each")
        if promised is not None and not 0 < promised < 1:
            raise InputError(f"promised must lie between 0 and 1, got {promised}; 0.95 is usual")
        if target is not None and not (0 < target < 1 or (target == 1 and promised is None)):
            raise InputError(f"target is an accuracy between 0 and 1 (below 1 where it is promised), got {target}")
        if heads is None:
            full = known.shape[1]
            powers = [1 << n for n in range(3, full.bit_length()) if 1 << n < full]
            heads = fit_heads(vectors_ND, labels, check_widths(list(widths or [*powers, full]), full), strength)
        made = cls(heads, np.full(len(heads.widths) - 1, NEVER), confidence)
        made._calibrate(known, names, target, promised)
        return made

    def _calibrate(self, vectors: Float32s, names: list[str], target: float | None, promised: float | None) -> None:
        confidences, right = self._judged(vectors, names)
        if promised is not None:  # the halves have to be alike, and files are often sorted by class
            order = np.random.default_rng(SEED).permutation(len(right))
            confidences, right = confidences[order], right[order]
        half = len(right) if promised is None else len(right) // 2
        if half < 2:
            raise InputError(f"{len(right)} calibration items are too few; give some hundreds")
        wanted = float(right[:half, -1].mean()) if target is None else target
        self.ladder = frontier(confidences[:half], right[:half], np.array(self.heads.widths), self.heads.tied)
        shown = slice(0, None) if promised is None else slice(half, None)
        passed: list[tuple[float, Float64s]] = []
        for thresholds in self.ladder:
            levels = levels_of(confidences[shown], thresholds)
            hits = right[shown][np.arange(len(levels)), levels].astype(np.float64)
            if promised is not None:
                if p_value(hits, wanted, promised) > 1 - promised:
                    break
            elif hits.mean() < wanted:
                continue
            passed.append((float(self._paid(thresholds)[levels].mean()), thresholds))
        if not passed:
            best = right[shown, -1].mean()
            how = "" if promised is None else f" at confidence {promised:g} from {len(right) - half} items"
            raise InputError(f"accuracy {wanted:g} cannot be kept{how}: the full head has {best:.4f}; ask for less")
        self.thresholds = min(passed, key=lambda pair: pair[0])[1]

    def predict(self, vectors_ND: Float32s) -> Predicted:
        """Labels and widths of (N, D) vectors. A head is evaluated on those items alone that reach it."""
        vectors = self._vectors(vectors_ND)
        guesses, levels = np.zeros((2, len(vectors)), dtype=np.int64)
        left = np.arange(len(vectors))
        sums, read = np.zeros((len(vectors), len(self.heads.classes)), np.float32), 0
        last = len(self.heads.widths) - 1
        for level, width in enumerate(self.heads.widths):
            if not len(left) or (level < last and self.thresholds[level] == NEVER):
                continue
            if self.heads.tied:
                logits, read = self.heads.logits_after(vectors[left], level, sums, read), width
            else:
                logits = self.heads.logits(vectors[left], level)
            sure, best = self._judge(logits)
            guesses[left], levels[left] = best, level
            if level < last:
                on = sure < self.thresholds[level]
                left, sums = left[on], sums[on]
        labels = [self.heads.classes[n] for n in guesses]
        return Predicted(labels, np.array(self.heads.widths)[levels], self._paid(self.thresholds)[levels])

    def predict_texts(self, model: Any, texts: Sequence[str]) -> Predicted:
        """The same of texts (or what else the model encodes)."""
        encode = model.encode if self.heads.normalize else model.features
        return self.predict(np.asarray(encode(list(texts)), dtype=np.float32))

    def curve(self, vectors_ND: Float32s, labels: Sequence[Any]) -> list[Tradeoff]:
        """Accuracy against cost on other items, for every rung learned; nothing is tuned on them."""
        vectors, names = self._vectors(vectors_ND), check_labels(labels)
        if len(vectors) != len(names):
            raise InputError(f"{len(vectors)} vectors but {len(names)} labels; give one for each")
        confidences, right = self._judged(vectors, names)
        return [self._point(confidences, right, thresholds) for thresholds in self.ladder or [self.thresholds]]

    def measure(self, vectors_ND: Float32s, labels: Sequence[Any]) -> Tradeoff:
        """Accuracy and cost of the thresholds in use."""
        return AdaptiveClassifier(self.heads, self.thresholds, self.confidence).curve(vectors_ND, labels)[0]

    def alone(self, vectors_ND: Float32s, labels: Sequence[Any]) -> list[Tradeoff]:
        """Each width's head for every item, with no cascade: what a cascade has to beat."""
        found = []
        for level in range(len(self.heads.widths)):
            stop = np.full(len(self.heads.widths) - 1, NEVER)
            stop[level : level + 1] = 0  # past the end for the full head, which needs no threshold
            found.append(AdaptiveClassifier(self.heads, stop, self.confidence).measure(vectors_ND, labels))
        return found

    def save(self, folder: str | Path) -> Path:
        """Write `classifier.safetensors` into a folder, a model's for example."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, NDArray[Any]] = {"thresholds": self.thresholds}
        if self.ladder:
            tensors["ladder"] = np.stack(self.ladder)
        for width, weight, bias in zip(self.heads.widths, self.heads.weights, self.heads.biases, strict=True):
            tensors |= {f"{width}.weight": np.ascontiguousarray(weight), f"{width}.bias": np.ascontiguousarray(bias)}
        card = {
            "format": FORMAT,
            "widths": list(self.heads.widths),
            "classes": list(self.heads.classes),
            "normalize": self.heads.normalize,
            "confidence": self.confidence,
        }
        said = {"matryo": json.dumps(card, ensure_ascii=False)}
        write_atomically(folder / FILE, lambda path: save_file(tensors, path, said))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "AdaptiveClassifier":
        """The classifier that `save` wrote, bit for bit."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(f"{folder} holds no classifier; AdaptiveClassifier.fit makes one and save writes it")
        try:
            with safe_open(path, "np") as file:
                card = json.loads(file.metadata()["matryo"])
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            if card["format"] != FORMAT:
                raise FormatError(f"{path} has format {card['format']}; this release reads {FORMAT}")
            heads = LinearHeads(
                tuple(card["widths"]),
                tuple(card["classes"]),
                tuple(tensors[f"{width}.weight"] for width in card["widths"]),
                tuple(tensors[f"{width}.bias"] for width in card["widths"]),
                card["normalize"],
            )
            return cls(heads, tensors["thresholds"], card["confidence"], list(tensors.get("ladder", ())))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{path} cannot be read ({error}); fit the classifier again") from error

    def _vectors(self, vectors_ND: Float32s) -> Float32s:
        vectors = check_vectors(np.asarray(vectors_ND))
        if vectors.shape[1] < self.heads.full:
            raise InputError(f"vectors have {vectors.shape[1]} dimensions; the heads read {self.heads.full}")
        return vectors

    def _judged(self, vectors: Float32s, names: list[str]) -> tuple[Float64s, NDArray[np.bool_]]:
        """(N, L) confidences of every head, and whether each is right."""
        found = [self._judge(self.heads.logits(vectors, level)) for level in range(len(self.heads.widths))]
        guesses = np.stack([best for _, best in found], axis=1)
        right: NDArray[np.bool_] = np.array(self.heads.classes)[guesses] == np.array(names)[:, None]
        return np.stack([sure for sure, _ in found], axis=1), right

    def _paid(self, thresholds: Float64s) -> NDArray[np.int64]:
        return paid(np.array(self.heads.widths), thresholds, self.heads.tied)

    def _judge(self, logits_NC: Float32s) -> tuple[Float64s, NDArray[np.int64]]:
        """(N,) confidences and best classes."""
        logits = logits_NC.astype(np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        best: NDArray[np.int64] = logits.argmax(axis=1)
        if self.confidence == "softmax":
            return shares.max(axis=1), best
        two = np.partition(shares, -2, axis=1)[:, -2:]
        return two[:, 1] - two[:, 0], best

    def _point(self, confidences: Float64s, right: NDArray[np.bool_], thresholds: Float64s) -> Tradeoff:
        widths = np.array(self.heads.widths)
        levels = levels_of(confidences, thresholds)
        read = float(self._paid(thresholds)[levels].mean())
        return Tradeoff(
            float(right[np.arange(len(levels)), levels].mean()), read, float(widths[levels].mean()),
            read * len(self.heads.classes), tuple(thresholds.tolist()),
        )  # fmt: skip
