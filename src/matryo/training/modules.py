"""Nested losses in the shape of sentence-transformers' own: a module of a model that takes features and labels.

So a script that trains with `SentenceTransformerTrainer(loss=...)` or `model.fit(train_objectives=[(data, loss)])`
changes one line. What goes where is read off the names of a tensor loss's arguments:

    anchors_BD, ...                              the next column of texts
    candidates_ND, candidates_BKD                all other columns, one after the other; side by side
    guide_anchors_BE, guide_candidates_NE        the same columns as the guide embeds them
    labels_B, teacher_scores_BK, teacher_BE      the labels
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from matryo.core.depths import DepthNesting
from matryo.core.errors import InputError
from matryo.core.prefix import Nesting
from matryo.core.sampling import WidthSampler
from matryo.encoders.layers import Layers
from matryo.losses import gather_with_gradient, gathered_info_nce, nested, nested_info_nce, over_depths
from matryo.training.caching import cached_embeddings, sentence_embedding

OURS = {"nesting", "per_width", "targets", "ignore", "group"}
"""Arguments of a loss that a batch of sentence-transformers decides, or nobody."""


class NestedLoss(nn.Module):
    """Any nested loss as a sentence-transformers loss.

    `MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [64, 256, 768])` becomes
    `NestedLoss(model, nested_info_nce, [64, 256, 768])`: the same value and gradient. The model embeds each column once
    and is not touched otherwise.

    After a call, `values` holds the unweighted loss of each width (L,), detached (by code for the quantised loss); with
    `depths`, that by depth.

    `Matryoshka2dLoss(model, loss, [64, 384])` becomes `NestedLoss(model, nested_info_nce, [64, 384], depths=[3, 6])`,
    with every depth in every step at hardly more than the cost of one, since they share their layers.
    """

    citation = """
@inproceedings{kusupati2022matryoshka,
    title={Matryoshka Representation Learning},
    author={Kusupati, Aditya and Bhatt, Gantavya and Rege, Aniket and Wallingford, Matthew and Sinha, Aditya and
        Ramanujan, Vivek and Howard-Snyder, William and Chen, Kaifeng and Kakade, Sham and Jain, Prateek and
        Farhadi, Ali},
    booktitle={Advances in Neural Information Processing Systems},
    year={2022},
    eprint={2205.13147},
    archivePrefix={arXiv}
}
"""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        nesting: Nesting | Iterable[int],
        *,
        mini_batch_size: int | None = None,
        keep: int | None = None,
        depths: DepthNesting | Iterable[int] | None = None,
        gather_across_devices: bool = False,
        guide: nn.Module | None = None,
        **arguments: Any,
    ) -> None:
        """Train `model` with `loss` at every width.

        Args:
            model: a SentenceTransformer, or anything that returns a dict with `sentence_embedding` (B, D).
            loss: of `matryo.losses`; or your own, un-nested: columns of (B, d) unit prefixes, then the labels if it
                takes one argument more, to a scalar.
            nesting: a Nesting, or widths in any order, each of weight 1; the largest is the model's D.
            mini_batch_size: embed so many rows at a time (gradient caching): any batch size in their memory.
            keep: train so many of the widths in each step, the full one among them, unbiased (`WidthSampler`).
            depths: numbers of layers to train, all of them last; or a DepthNesting, which has weights, an alignment to
                the last layer and fixed pairs of depth and width.
            gather_across_devices: compare the rows of all processes; without it each process sees its own.
            guide: the model whose vectors mask false negatives in `nested_guided_info_nce`. It reads the features of
                `model`, so both need the same tokeniser.
            arguments: what the loss takes by name. Modules (`head`) and parameters (a learned temperature) are trained.

        Raises:
            InputError: an argument the loss does not take, a width or depth beyond the model's, layers that cannot be
                cut, a guide missing or too many.
        """
        super().__init__()
        self.model, self.loss = model, loss
        self.name: str = getattr(loss, "__name__", type(loss).__name__)
        self.nesting = nesting if isinstance(nesting, Nesting) else Nesting(sorted(nesting))
        size = getattr(model, "get_embedding_dimension", lambda: None)()
        if size is not None:
            self.nesting.check(size)
        self.mini_batch_size, self.gather_across_devices = mini_batch_size, gather_across_devices
        self.sampler = None if keep is None else WidthSampler(self.nesting, keep)
        self.depths = depths if depths is None or isinstance(depths, DepthNesting) else self._every(depths)
        self._layers = None if self.depths is None else Layers(model)
        if self.depths is not None and self._layers is not None:
            self.depths.check(self._layers.count)
            if keep is not None and any(part != self.nesting for part in self.depths.nestings):
                raise InputError("depths with widths of their own and keep both choose the widths; drop one of the two")
        self.step = 0
        self.values: Any = None
        self._signature = dict(inspect.signature(loss).parameters)
        self._check_arguments(arguments, guide)
        self._guide = (guide,)  # in a tuple, so that it is no part of this module: not trained, not saved
        self.trained = nn.ModuleDict({k: v for k, v in arguments.items() if isinstance(v, nn.Module)})
        self.learned = nn.ParameterDict({k: v for k, v in arguments.items() if isinstance(v, nn.Parameter)})
        self.arguments = {k: v for k, v in arguments.items() if k not in self.trained and k not in self.learned}

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The scalar to minimise.

        Args:
            sentence_features: one dict of tensors for each column of texts.
            labels: (B,) classes or scores, (B, K) teacher's scores or (B, E) teacher's vectors, as the loss needs.

        Raises:
            InputError: columns or labels that do not fit the loss; whatever the loss refuses.
        """
        if isinstance(self.model, DistributedDataParallel) and any(True for _ in self._own_parameters()):
            raise InputError(
                "a head or a learned argument outside DDP would drift apart between processes; "
                "wrap the NestedLoss itself in DistributedDataParallel, or use `matryo train`"
            )
        if isinstance(self.model, DistributedDataParallel) and self.depths is not None:
            raise InputError("several depths run the bare model, whose gradients DDP does not see; use `matryo train`")
        features = list(sentence_features)
        guided = self._embed_with_guide(features)
        columns = self._embed(features)
        nesting, depths = self.nesting, self.depths
        if self.sampler is not None and self.training:
            nesting = self.sampler.draw(self.step)
            depths = depths and depths.at(nesting)
            self.step += 1
        if depths is None:
            total, self.values = self._compare(columns, guided, labels, nesting)
            return total
        total, found = over_depths(lambda own, its: self._compare(own, guided, labels, its), columns, depths)
        self.values = {depth: values for depth, (_, values) in found.items()}
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        said = {
            "loss": self.name,
            "widths": list(self.nesting.widths),
            "weights": list(self.nesting.weights),
            "mini_batch_size": self.mini_batch_size,
            "keep": None if self.sampler is None else self.sampler.keep,
            "depths": None if self.depths is None else list(self.depths.depths),
            "gather_across_devices": self.gather_across_devices,
        }
        learned = {name: value.detach().tolist() for name, value in self.learned.items()}
        heads = {name: type(module).__name__ for name, module in self.trained.items()}
        return said | {name: _plain(value) for name, value in self.arguments.items()} | learned | heads

    def _embed(self, features: Sequence[dict[str, Any]]) -> list[Tensor]:
        run: Any = self.model
        if self.depths is not None and self._layers is not None:
            run = self._layers.runner(self.depths.depths)
        if self.mini_batch_size is not None:
            return cached_embeddings(run, features, mini_batch_size=self.mini_batch_size)
        return [sentence_embedding(run(f)) for f in features]

    def _every(self, depths: Iterable[int]) -> DepthNesting:
        return DepthNesting.of(list(depths), self.nesting)

    def _embed_with_guide(self, features: Sequence[dict[str, Any]]) -> list[Tensor]:
        guide = self._guide[0]
        if guide is None:
            return []
        tensor = next(x for x in features[0].values() if isinstance(x, Tensor))
        guide.to(tensor.device).eval()
        with torch.no_grad():
            return [sentence_embedding(guide(dict(f))) for f in features]

    def _compare(
        self, columns: list[Tensor], guided: list[Tensor], labels: Tensor | None, nesting: Nesting
    ) -> tuple[Tensor, Any]:
        options = {name: self._for_widths(value, nesting) for name, value in (self.arguments | self._own()).items()}
        if self.gather_across_devices:
            if self.loss is nested_info_nce and options.keys() <= {"temperature", "symmetric"}:
                total, values = gathered_info_nce(columns, nesting=nesting, per_width=True, **options)
                return total, values
            every = gather_with_gradient([*columns, *guided], labels=labels)
            columns, guided = list(every.columns[: len(columns)]), list(every.columns[len(columns) :])
            labels = every.labels
        if labels is not None:
            labels = labels.to(columns[0].device)
        if "nesting" in self._signature:
            given = self._lay_out(columns, guided, labels)
            total, values = self.loss(*given, nesting=nesting, per_width=True, **options)
        else:
            beside = [] if labels is None or len(self._positional()) <= len(columns) else [labels]
            total, values = nested(self.loss, nesting)(*columns, *beside, per_width=True, **options)
        return total, values

    def _lay_out(self, columns: Sequence[Tensor], guided: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
        """The loss's positional arguments."""
        names = self._positional()
        own, others = list(columns), list(guided)
        if "teacher_BE" in names and labels is not None:
            own, labels = [torch.cat(own)], torch.cat([labels] * len(columns))
        given = []
        for name in names:
            kind = name.rpartition("_")[2]
            left = others if name.startswith("guide_") else own
            if kind in ("BD", "ND", "BKD") or left is others:
                if not left:
                    raise self._misfit(columns)
                count = 1 if kind in ("BD", "BE") else len(left)
                taken, left[:] = left[:count], left[count:]
                given.append(torch.stack(taken, 1) if kind == "BKD" else torch.cat(taken))
            elif labels is None:
                raise InputError(f"{self.name} needs labels ({name}); add a column 'label' to the data set")
            else:
                given.append(labels)
        if own:
            raise self._misfit(columns)
        return given

    def _misfit(self, columns: Sequence[Tensor]) -> InputError:
        texts = [name for name in self._positional() if name.endswith("D") and not name.startswith("guide_")]
        return InputError(
            f"{self.name} takes {', '.join(texts)}, got {len(columns)} columns of texts; "
            "select the data set's columns so that they fit"
        )

    def _positional(self) -> list[str]:
        """Names of what the loss takes by place and is not set by name."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        taken = {*self.arguments, *self.trained, *self.learned}
        return [name for name, p in self._signature.items() if p.kind in kinds and name not in taken]

    def _own(self) -> dict[str, Any]:
        return {**self.trained, **self.learned}

    def _own_parameters(self) -> Iterable[Tensor]:
        yield from self.trained.parameters()
        yield from self.learned.parameters()

    def _for_widths(self, value: Any, nesting: Nesting) -> Any:
        """An argument with a value per width, for the widths of this step."""
        if nesting is self.nesting:
            return value
        places = [self.nesting.widths.index(width) for width in nesting.widths]
        if isinstance(value, Tensor):
            return value[places] if value.ndim == 1 and len(value) == len(self.nesting) else value
        numbers = isinstance(value, (list, tuple)) and all(isinstance(x, (int, float)) for x in value)
        return [value[n] for n in places] if numbers and len(value) == len(self.nesting) else value

    def _check_arguments(self, arguments: Mapping[str, Any], guide: nn.Module | None) -> None:
        allowed = self._signature.keys() - OURS
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._signature.values())
        for name in arguments:
            if name in OURS or not (open_ended or name in allowed):
                by_name = [n for n, p in self._signature.items() if p.kind is p.KEYWORD_ONLY and n not in OURS]
                raise InputError(f"the loss has no argument {name!r} to set; allowed: {', '.join(by_name) or 'none'}")
        if "head" in self._signature and not isinstance(arguments.get("head"), nn.Module):
            raise InputError("this loss trains a classifier too; give head=NestedHead(nesting, num_classes)")
        wanted = any(name.startswith("guide_") and name.endswith("E") for name in self._signature)
        if wanted != (guide is not None):
            raise InputError("give guide=MODEL to nested_guided_info_nce, and to no other loss")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, (int, float, str, list, tuple, dict, type(None))) else str(value)
