"""Runs in each of several processes: every check returns numbers that test_training_distributed.py judges.

The truth is the gradient of one process on the whole batch, computed here without any collective.
"""

import json
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.modules import Router
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import matryo as mt
from matryo.losses import gather_with_gradient, gathered_info_nce, nested, nested_info_nce, row_share
from matryo.training.caching import cached_embeddings
from matryo.training.distributed import check_agreement
from matryo.training.modules import NestedLoss
from matryo.training.processes import reduce_gradients

CAPACITY = 6
SIXTEEN = mt.Nesting([1, 2, 4, 8, 12, 16], [1.0, 0.5, 2.0, 1.0, 0.0, 3.0])
TEMPERATURES = [0.2 + n / 10 for n in range(6)]


class Encoder(nn.Module):
    """(B, 5) features to (B, 16), float64, the same in every process."""

    def __init__(self, seed=0):
        super().__init__()
        make = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 16)).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=make, dtype=torch.float64) / 2

    def forward(self, features):
        return {"sentence_embedding": self.layers(features["x"])}


class Towers(Router):
    """Queries and documents have encoders of their own, which is what sentence-transformers calls a Router."""

    def __init__(self):
        nn.Module.__init__(self)
        self.query, self.document = Encoder(1), Encoder(2)

    def forward(self, features):
        return self.query(features) if features["task"] == "query" else self.document(features)


class Share:
    """Who holds which rows of the whole batch."""

    def __init__(self, sizes, columns=2):
        make = torch.Generator().manual_seed(7)
        self.columns = [{"x": torch.randn(sum(sizes), 5, generator=make, dtype=torch.float64)} for _ in range(columns)]
        start = sum(sizes[: dist.get_rank()])
        self.rows = slice(start, start + sizes[dist.get_rank()])
        self.labels = torch.randint(0, 4, (sum(sizes),), generator=make)

    def own(self, columns=None):
        mine = [{"x": f["x"][self.rows]} for f in self.columns]
        return mine if columns is None else [f | extra for f, extra in zip(mine, columns, strict=True)]


def sizes_of(world, even):
    return [5] * world if even else [5] * (world - 1) + [2]


def embed(model, features, mini=None):
    if mini:
        return cached_embeddings(model, features, mini_batch_size=mini)
    return [model(f)["sentence_embedding"] for f in features]


def worst(got, expected):
    """Largest difference of any parameter's gradient, over that parameter's largest gradient."""
    return max(
        float((a.grad - b.grad).abs().max() / b.grad.abs().max().clamp(min=1e-12))
        for a, b in zip(got, expected, strict=True)
    )


@contextmanager
def counted(model=None):
    """Calls of torch.distributed's collectives inside; reductions of DDP's buckets apart."""
    names = ("all_gather", "all_gather_single", "all_gather_into_tensor", "all_gather_object", "all_to_all")
    names += ("all_reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "broadcast", "scatter")
    counts, kept = {"ddp": 0}, {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def call(name, *args, **kwargs):
        counts[name] = counts.get(name, 0) + 1
        return kept[name](*args, **kwargs)

    def bucket(state, bucket):
        counts["ddp"] += 1
        counts["all_reduce"] = counts.get("all_reduce", 0) - 1  # The hook's own call, which is on its way.
        return allreduce_hook(state, bucket)

    if model is not None:
        model.register_comm_hook(None, bucket)
    for name in kept:
        setattr(dist, name, partial(call, name))
    try:
        yield counts
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def single_info_nce(model, share, temperature, group, symmetric):
    anchors, *others = embed(model, share.columns)
    loss, widths = nested_info_nce(
        anchors,
        torch.cat(others),
        nesting=SIXTEEN,
        temperature=temperature,
        symmetric=symmetric,
        group=share.labels if group else None,
        per_width=True,
    )
    loss.backward()
    return loss.detach(), widths


def info_nce(world, *, even, mini, columns=2, group=False, symmetric=False, capacity=CAPACITY, unused=False):
    """Errors of gradients, mean loss and mean width losses; collectives of one step."""
    share = Share(sizes_of(world, even), columns)
    lone, ddp = Encoder(), DistributedDataParallel(Encoder(), find_unused_parameters=unused)
    temperatures = [nn.Parameter(torch.tensor(TEMPERATURES, dtype=torch.float64)) for _ in range(2)]
    expected, expected_widths = single_info_nce(lone, share, temperatures[0], group, symmetric)
    with counted(ddp) as counts:
        value, widths = gathered_info_nce(
            embed(ddp, share.own(), mini),
            nesting=SIXTEEN,
            temperature=temperatures[1],
            group=share.labels[share.rows] if group else None,
            symmetric=symmetric,
            capacity=capacity,
            per_width=True,
        )
        value.backward()
    reduce_gradients(temperatures[1:])
    means = torch.cat([value.detach()[None], widths])
    dist.all_reduce(means)
    error = (means / world - torch.cat([expected[None], expected_widths])).abs().max()
    return {
        "gradient": worst([*ddp.parameters(), temperatures[1]], [*lone.parameters(), temperatures[0]]),
        "loss": float(error),
        "counts": {name: n for name, n in counts.items() if n},
    }


def nested_heads(features, labels, heads):
    """Stands in for a loss with parameters that needs no other process' rows."""
    return sum(
        weight * F.cross_entropy(head(mt.truncate(features, width)), labels)
        for (width, weight), head in zip(SIXTEEN, heads, strict=True)
    )


def cross_entropy(world, *, even, mini):
    share = Share(sizes_of(world, even), columns=1)
    models = Encoder(), DistributedDataParallel(Encoder())
    torch.manual_seed(dist.get_rank())
    heads = [nn.ModuleList(nn.Linear(width, 4).double() for width in SIXTEEN.widths) for _ in range(2)]
    for parameter in heads[0].parameters():
        dist.broadcast(parameter.data, 0)
    heads[1].load_state_dict(heads[0].state_dict())
    nested_heads(embed(models[0], share.columns)[0], share.labels, heads[0]).backward()
    own = share.own()
    loss = nested_heads(embed(models[1], own, mini)[0], share.labels[share.rows], heads[1])
    (loss * row_share(len(own[0]["x"]))).backward()
    reduce_gradients(heads[1].parameters())
    return {
        "gradient": worst(
            [*models[1].parameters(), *heads[1].parameters()], [*models[0].parameters(), *heads[0].parameters()]
        )
    }


def pairs_by_label(embeddings, labels):
    """Stands in for a loss that looks at all pairs of the batch and knows no rows of its own."""
    same = labels[:, None] == labels
    return (embeddings @ embeddings.T - same.double()).square().mean()


def whole_batch(world, *, even, mini):
    share = Share(sizes_of(world, even), columns=1)
    lone, ddp = Encoder(), DistributedDataParallel(Encoder())
    loss = nested(pairs_by_label, SIXTEEN)
    loss(embed(lone, share.columns)[0], share.labels).backward()
    every = gather_with_gradient(embed(ddp, share.own(), mini), labels=share.labels[share.rows], capacity=CAPACITY)
    loss(every.columns[0], every.labels).backward()
    return {"gradient": worst(ddp.parameters(), lone.parameters())}


def module(world, *, even, mini, loss, columns):
    """The sentence-transformers module around a loss of ours, or around a user's own over the whole batch."""
    share = Share(sizes_of(world, even), columns)
    lone, ddp = Encoder(), DistributedDataParallel(Encoder())
    labels = None if loss is nested_info_nce else share.labels
    NestedLoss(lone, loss, SIXTEEN)(share.columns, labels).backward()
    gathering = NestedLoss(ddp, loss, SIXTEEN, mini_batch_size=mini, gather_across_devices=True)
    gathering(share.own(), None if labels is None else labels[share.rows]).backward()
    return {"gradient": worst(ddp.parameters(), lone.parameters())}


def accumulation(world, *, mini):
    """Two batches a step, the first under no_sync, as accelerate does it."""
    shares = [Share(sizes_of(world, even)) for even in (True, False)]
    lone, ddp = Encoder(), DistributedDataParallel(Encoder())
    temperature = torch.tensor(TEMPERATURES, dtype=torch.float64)
    for share in shares:
        single_info_nce(lone, share, temperature, False, False)
    with counted(ddp) as counts:
        for n, share in enumerate(shares):
            with ddp.no_sync() if n == 0 else nullcontext():
                gathered_info_nce(
                    embed(ddp, share.own(), mini), nesting=SIXTEEN, temperature=temperature, capacity=CAPACITY
                ).backward()
    return {"gradient": worst(ddp.parameters(), lone.parameters()), "ddp": counts["ddp"]}


def towers(world, *, frozen=None):
    """Columns with encoders of their own, either of them possibly frozen; two steps, as DDP complains at the second."""
    tasks = [{"task": "query"}, {"task": "document"}]
    share = Share(sizes_of(world, False))
    models = [Towers(), Towers()]
    for model in models:
        if frozen:
            getattr(model, frozen).requires_grad_(False)
    ddp = DistributedDataParallel(models[1])
    lone = embed(models[0], [f | extra for f, extra in zip(share.columns, tasks, strict=True)])
    (2 * nested_info_nce(*lone, nesting=SIXTEEN)).backward()
    for _ in range(2):
        gathered_info_nce(embed(ddp, share.own(tasks), 3), nesting=SIXTEEN, capacity=CAPACITY).backward()
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (ddp, models[0])]
    return {"gradient": worst(*trained)}


def exact_cargo(world):
    """Labels and half-precision rows arrive bit for bit; a half-precision gradient is added up in float32."""
    rank = dist.get_rank()
    large = torch.tensor([2**62 + 1, -(2**53) - 1, rank])
    scores = torch.tensor([0.1, 1 / 3, rank / 7], dtype=torch.float64)
    rows = torch.full((3, 3), 1 + rank / 8, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.full((3, 2), rank / 3)
    every = gather_with_gradient([rows, teacher], labels=large, capacity=5)
    floats = gather_with_gradient([teacher], labels=scores)
    everyone = torch.arange(world).repeat_interleave(3)
    every.columns[0].backward(torch.full_like(every.columns[0], 1 + rank / 128))
    wanted = sum(torch.tensor(1 + r / 128, dtype=torch.bfloat16).float() for r in range(world)).bfloat16()
    return {
        "labels": every.labels.tolist() == [x for r in range(world) for x in (2**62 + 1, -(2**53) - 1, r)],
        "scores": floats.labels.tolist() == [x for r in range(world) for x in (0.1, 1 / 3, r / 7)],
        "rows": bool((every.columns[0] == (1 + everyone / 8).bfloat16()[:, None]).all())
        and bool((every.columns[1] == everyone.float()[:, None] / 3).all()),
        "dtypes": [str(c.dtype) for c in every.columns] == ["torch.bfloat16", "torch.float32"],
        "targets": every.targets.tolist() == [3 * rank, 3 * rank + 1, 3 * rank + 2],
        "gradient": rows.grad.dtype == torch.bfloat16 and bool((rows.grad == wanted).all()),
    }


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def agreement(world):
    rank = dist.get_rank()
    config = {"config": {"widths": [2, 4], "seed": 1}, "pairs": {"rows": 9}}
    other = {"config": {"widths": [2, 4], "seed": 2 if rank == world - 1 else 1}, "pairs": {"rows": 9}}
    return {
        "same": refusal(lambda: check_agreement(config)),
        "value": refusal(lambda: check_agreement(other)),
        "missing": refusal(lambda: check_agreement(config if rank == 0 else {"config": config["config"]})),
        "digest": refusal(lambda: check_agreement("abc" if rank == 0 else "abcd")),
    }


def refusals(world):
    x = torch.ones(3, 4)
    static = DistributedDataParallel(Encoder(), static_graph=True)
    return {
        "capacity": refusal(lambda: gather_with_gradient([x], capacity=2)),
        "columns": refusal(lambda: gather_with_gradient([x, x[:2]])),
        "none": refusal(lambda: gather_with_gradient([])),
        "labels": refusal(lambda: gather_with_gradient([x], labels=torch.ones(2))),
        "static graph": refusal(lambda: embed(static, [{"x": torch.ones(2, 5).double()}], 1)),
    }


def checks(world):
    for even in (True, False):
        for mini in (None, 2):
            case = {"even": even, "mini": mini}
            name = f"{'even' if even else 'uneven'}, {'cached' if mini else 'plain'}"
            yield f"InfoNCE, {name}", partial(info_nce, **case)
            yield (
                f"InfoNCE with groups and negatives, symmetric, {name}",
                partial(info_nce, **case, columns=4, group=True, symmetric=True),
            )
            yield f"cross-entropy, {name}", partial(cross_entropy, **case)
            yield f"whole batch, {name}", partial(whole_batch, **case)
            yield f"module, {name}", partial(module, **case, loss=nested_info_nce, columns=3)
            yield f"module around a loss of the user's, {name}", partial(module, **case, loss=pairs_by_label, columns=1)
    yield "InfoNCE, no capacity", partial(info_nce, even=False, mini=2, columns=3, group=True, capacity=None)
    yield "InfoNCE, unused parameters looked for", partial(info_nce, even=False, mini=2, unused=True)
    yield "accumulation, plain", partial(accumulation, mini=None)
    yield "accumulation, cached", partial(accumulation, mini=2)
    for frozen in (None, "query", "document"):
        yield f"towers, frozen {frozen}", partial(towers, frozen=frozen)
    yield "cargo", exact_cargo
    yield "agreement", agreement
    yield "refusals", refusals


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {name: check(world) for name, check in checks(world)}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
