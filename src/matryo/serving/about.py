"""What the server says of itself: its models, its health, its metrics."""

from typing import Any

from matryo.serving.door import Answer, as_json
from matryo.serving.errors import ApiError
from matryo.serving.service import Call, Service


async def models(service: Service, call: Call) -> Answer:
    """Every name that is served, each with what is known of the model behind it."""
    return as_json({"object": "list", "data": [described(service, name) for name in service.allowed.names]})


async def model(service: Service, call: Call) -> Answer:
    """One of them."""
    name = call.path.get("model")
    if name not in service.allowed.names:
        raise ApiError(404, "No such model here; /v1/models lists them.", code="model_not_found", param="model")
    return as_json(described(service, str(name)))


def described(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's model object, and the facts that make the width a choice: what each keeps, as measured."""
    nesting = service.card.nesting
    return {
        "id": name,
        "object": "model",
        "created": int(service.began),
        "owned_by": "matryo",
        "embedding_size": service.engine.width,
        "is_matryoshka": nesting is not None,
        "matryoshka_dimensions": list(service.trained),
        "any_width": service.allowed.widths is None,
        "depths": list(service.allowed.depths or ()),
        "max_input_tokens": service.max_input_tokens,
        "input_types": sorted({"query", "document", *service.allowed.prompts}),
        "backend": service.engine.name,
        "revision": service.choice.digest,
        "quality": list(service.card.scores),
        "quality_by_depth": list(service.card.depth_scores),
    }


async def index(service: Service, call: Call) -> Answer:
    """What is searched: how many items, by which plan, what that takes, and what the planner found where it was told.

    `plan_bytes_per_item` is of the codes that the plan holds in memory; None until the first search by it.
    """
    if service.searcher is None:
        raise ApiError(404, "This server has no index; it was started without --index.", code="no_index")
    return as_json({"object": "index", **await service.searcher.described(), "plans": service.plans})


async def health(service: Service, call: Call) -> Answer:
    """The process is alive. Says nothing of the model: see `ready`."""
    return as_json({"status": "ok"})


async def ready(service: Service, call: Call) -> Answer:
    """A real encode came out well within the last seconds, and the server is not shutting down."""
    if await service.ready():
        return as_json({"status": "ready"})
    what = "shutting_down" if service.draining else "not_ready"
    raise ApiError(503, "The server cannot encode right now.", code=what, retry_after=1)


async def metrics(service: Service, call: Call) -> Answer:
    """Prometheus' text format."""
    service.metrics.queue.set(service.batcher.waiting_tokens)
    return Answer(service.metrics.text(), media="text/plain; version=0.0.4; charset=utf-8")
