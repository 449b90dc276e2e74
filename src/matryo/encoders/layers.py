"""The blocks of a transformer: run the first k of them, or see what each gives on the way. Needs the `train` extra.

What is served at depth k is what was trained: blocks 1..k, then whatever follows the last block in the whole encoder
(the final norm of a pre-norm encoder such as ModernBERT or Qwen; nothing in a post-norm one such as BERT), then pooling
and every later module. Which module that is is not guessed from a name but found by running the encoder, and a cut is
refused unless it gives exactly what the whole encoder gave at that block.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from matryo.core.errors import InputError

KINDS = "BERT, MPNet, RoBERTa, DeBERTa, ModernBERT, Qwen, Llama, Gemma and others that keep a list of blocks"
COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
"""Names a configuration gives the number of blocks."""
TOLERANCE = 1e-6
"""Between a block's output seen in the whole encoder and in the cut one; kernels may sum in orders of their own."""


Runner = Callable[[dict[str, Any]], dict[str, Any]]


class Layers:
    """The blocks of a sentence-transformers model, found and tried out.

    Attributes:
        count: how many there are.
    """

    def __init__(self, model: Any) -> None:
        """Find the blocks of `model` and what follows the last one.

        Raises:
            InputError: it has no such blocks, or cutting them would not give what the whole encoder computes there.
        """
        self.model = model
        backbone = getattr(model[0], "auto_model", None)
        if backbone is None:
            raise InputError(f"{type(model[0]).__name__} has no layers to cut; depths are for transformers")
        self._place = _place_of_blocks(backbone)
        self._blocks: nn.ModuleList = backbone.get_submodule(self._place)
        self.count = len(self._blocks)
        self._after = self._find_what_follows()

    def cut(self, depth: int) -> Any:
        """The model with its first `depth` blocks only: a SentenceTransformer that shares the weights of the whole one.

        Raises:
            InputError: `depth` outside 1..count.
        """
        self.check(depth)
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        low = copy.deepcopy(self.model, shared)
        backbone = low[0].auto_model
        parent, _, name = self._place.rpartition(".")
        setattr(backbone.get_submodule(parent), name, nn.ModuleList(list(backbone.get_submodule(self._place))[:depth]))
        _shorten(backbone.config, self.count, range(1, depth + 1))
        return low

    def choose(self, layers: Sequence[int]) -> Any:
        """A new model of some of the blocks, with weights of its own: a start for training, as it has no use before.

        The last block knows how to end an encoder: a start that keeps it (1, 3, 6 of 6) is far ahead of the first ones.
        The new encoder is made from its configuration, as it will be when it is loaded.

        Args:
            layers: blocks in the order they are to have, counted from 1; one may be named several times.

        Raises:
            InputError: no layers, one outside 1..count, or one with weights that its new place has none for.
        """
        if not layers:
            raise InputError(f"layers must name at least one of the encoder's {self.count}")
        for layer in layers:
            self.check(layer, "a layer")
        backbone = self.model[0].auto_model
        config = copy.deepcopy(backbone.config)
        _shorten(config, self.count, layers)
        weights = {}
        for name, value in backbone.state_dict().items():
            number, _, rest = name.removeprefix(f"{self._place}.").partition(".")
            if not name.startswith(f"{self._place}."):
                weights[name] = value
            else:
                places = [place for place, layer in enumerate(layers) if layer == int(number) + 1]
                weights.update({f"{self._place}.{place}.{rest}": value for place in places})
        chosen = type(backbone)(config)
        try:
            chosen.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(
                f"{type(backbone).__name__} does not take its layers in the order {list(layers)}: one of them has "
                "weights that others have not (often the first); keep it where it was, and once"
            ) from error
        model = copy.deepcopy(self.model, {id(backbone): chosen.to(backbone.device, backbone.dtype)})
        return model.train(self.model.training)

    def check(self, depth: int, what: str = "depth") -> int:
        """`depth`, if the encoder has as many blocks."""
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= self.count:
            raise InputError(f"{what} must be a whole number in 1..{self.count}, the encoder's layers; got {depth!r}")
        return depth

    def embeddings(self, features: dict[str, Any], depths: Sequence[int]) -> Tensor:
        """(B, K, D): the embeddings of a batch at K depths, from one run of the whole encoder. Differentiable.

        Blocks below the deepest are run once and share their part of the graph. As `cut(depth)` gives for each depth.
        """
        seen: dict[int, Any] = {}
        first: dict[str, Any] = {}
        with ExitStack() as stack:
            for depth in set(depths) - {self.count}:
                stack.callback(self._blocks[depth - 1].register_forward_hook(_into(seen, depth)).remove)
            stack.callback(self.model[0].register_forward_hook(lambda _m, _i, out: first.update(out)).remove)
            whole = self.model(features)["sentence_embedding"]
        made = [whole if depth == self.count else self._finish(first, seen[depth]) for depth in depths]
        return torch.stack(made, dim=1)

    def runner(self, depths: Sequence[int]) -> Runner:
        """The whole encoder as a function of features whose `sentence_embedding` is (B, K, D)."""
        return lambda features: {"sentence_embedding": self.embeddings(features, depths)}

    def _finish(self, first: dict[str, Any], hidden: Tensor) -> Tensor:
        """A sentence embedding from what a block gave."""
        for module in self._after:
            hidden = module(hidden)
        features = {**first, self.model[0].module_output_name: hidden}
        for module in list(self.model)[1:]:
            features = module(features)
        embedding: Tensor = features["sentence_embedding"]
        return embedding

    def _find_what_follows(self) -> tuple[nn.Module, ...]:
        """The modules between the last block and the encoder's output, found by running one short text."""
        backbone, order, outputs = self.model[0].auto_model, [], {}
        beside = backbone.get_submodule(self._place.rpartition(".")[0])

        def note(module: nn.Module, _inputs: Any, out: Any) -> None:
            order.append(module)
            outputs[module] = _hidden(out)

        candidates = {self._blocks[-1], *beside.children(), *backbone.children()} - {self._blocks, beside}
        with ExitStack() as stack:
            for module in candidates:
                stack.callback(module.register_forward_hook(note).remove)
            whole = self._hidden_states(self.model)
        after = order[order.index(self._blocks[-1]) + 1 :] if self._blocks[-1] in order else []
        for tail in [(), *((module,) for module in after)]:
            end = outputs[tail[0]] if tail else outputs.get(self._blocks[-1])
            if isinstance(end, Tensor) and end.shape == whole.shape and torch.equal(end, whole):
                self._after = tail
                self._try()
                return tail
        raise InputError(
            f"{type(backbone).__name__} does something after its last layer that cannot be repeated after another, so "
            f"it has one depth only; depths work for {KINDS}"
        )

    def _try(self) -> None:
        """Refuse an encoder whose cut at half its depth is not what the whole encoder computes there."""
        if self.count < 2:
            return
        depth = self.count // 2
        was, low = self.model.training, self.cut(depth)
        self.model.eval()
        try:
            with torch.no_grad():
                seen = self.embeddings(self._sample(self.model), [depth])[:, 0]
                own = low.eval()(self._sample(low))["sentence_embedding"]
        finally:
            self.model.train(was)
        worst = float((seen - own).abs().max() / own.abs().max())
        if not worst <= TOLERANCE:
            raise InputError(
                f"{type(self.model[0].auto_model).__name__} cut to {depth} layers differs by {worst:.1e} from what it "
                f"computes there as a whole, so it has one depth only; depths work for {KINDS}"
            )

    def _sample(self, model: Any) -> dict[str, Any]:
        features = model.preprocess(["two dogs run through the snow", "one"])
        return {key: x.to(model.device) if isinstance(x, Tensor) else x for key, x in features.items()}

    def _hidden_states(self, model: Any) -> Tensor:
        was = model.training
        model.eval()
        try:
            with torch.no_grad():
                hidden: Tensor = model[0](self._sample(model))[model[0].module_output_name]
        finally:
            model.train(was)
        return hidden


def _place_of_blocks(backbone: Any) -> str:
    """Where the list lies that has as many entries as the configuration has layers."""
    config = backbone.config
    said = next((getattr(config, name) for name in COUNTS if isinstance(getattr(config, name, None), int)), None)
    lists = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, blocks in lists.items() if len(blocks) == said]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise InputError(
            f"{type(backbone).__name__} has no single list of its {said if said else ''} layers (those of ALBERT share "
            f"one, for example), so they cannot be cut; depths work for {KINDS}".replace("  ", " ")
        )
    place: str = outer[0]
    return place


def _shorten(config: Any, count: int, layers: Sequence[int]) -> None:
    """Say the new number of blocks, and of each what the configuration said of the one it was."""
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and name.startswith("layer"):
            setattr(config, name, type(value)(value[layer - 1] for layer in layers))
    for name in COUNTS:
        if getattr(config, name, None) == count:
            setattr(config, name, len(layers))


def _into(seen: dict[int, Any], depth: int) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps what a block gives."""

    def keep(_module: nn.Module, _inputs: Any, out: Any) -> None:
        seen[depth] = _hidden(out)

    return keep


def _hidden(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
