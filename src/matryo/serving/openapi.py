"""The OpenAPI document of a server: what it takes and sends, with this model's widths and this server's limits."""

from typing import Any

import matryo
from matryo.serving.door import Answer, as_json
from matryo.serving.errors import KINDS
from matryo.serving.fields import DTYPES, WIDTHS
from matryo.serving.search import MOST_HITS
from matryo.serving.service import Call, Service

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
WHOLE: Schema = {"type": "integer", "minimum": 0}
SCHEMAS = ("Embeddings", "Search", "Models", "Model", "Index")
USAGE: Schema = {"type": "object", "required": ["prompt_tokens", "total_tokens"]} | {
    "properties": {"prompt_tokens": WHOLE, "total_tokens": WHOLE}
}


async def openapi(service: Service, call: Call) -> Answer:
    """The document."""
    return as_json(document(service))


def document(service: Service) -> dict[str, Any]:
    """OpenAPI 3.1 for one server."""
    named = {name: {"$ref": f"#/components/schemas/{name}"} for name in SCHEMAS}
    paths = {
        "/v1/embeddings": {"post": _operation("Encode texts", named["Embeddings"], _embeddings_request(service))},
        "/v1/search": {"post": _operation("Search the index", named["Search"], _search_request(service))},
        "/v1/models": {"get": _operation("What is served", named["Models"])},
        "/v1/models/{model}": {"get": _operation("One model", named["Model"], path="model")},
        "/v1/index": {"get": _operation("What is searched", named["Index"])},
        "/health": {"get": _operation("Whether the process is alive", {"type": "object"}, open_to_all=True)},
        "/ready": {"get": _operation("Whether it can encode", {"type": "object"}, open_to_all=True)},
    }
    if service.settings.writable:
        usage = {"object": {"const": "items"}, "written": WHOLE, "usage": USAGE}
        paths["/v1/items"] = {"post": _operation("Write items", _object(usage), _items_request(service))}
        asked = _object({"ids": _several(TEXT, service)}, closed=True)
        gone = _object({"object": {"const": "items"}, "deleted": WHOLE})
        paths["/v1/items/delete"] = {"post": _operation("Delete items", gone, asked)}
    metrics = _operation("Prometheus metrics", {})
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": metrics}
    if service.searcher is None:
        del paths["/v1/search"], paths["/v1/index"]
    schemas = {
        "Error": _error(),
        "Embeddings": _embeddings_answer(),
        "Search": _search_answer(),
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": named["Model"]}}),
        "Model": _model(),
        "Index": _index(),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Matryo", "version": matryo.__version__, "description": __doc__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if service.keys is not None else [],
    }


def _operation(
    summary: str, answer: Schema, request: Schema | None = None, path: str | None = None, open_to_all: bool = False
) -> dict[str, Any]:
    failed = {"description": "Refused", "content": _json({"$ref": "#/components/schemas/Error"})}
    statuses = sorted(KINDS) if request else [401, 403, 404, 405, 500, 503]
    responses: dict[str, Any] = {"200": {"description": "Done", "content": _json(answer)}}
    responses |= {str(status): failed for status in statuses}
    found: dict[str, Any] = {"summary": summary, "responses": responses}
    if request:
        found["requestBody"] = {"required": True, "content": _json(request)}
    if path:
        found["parameters"] = [{"name": path, "in": "path", "required": True, "schema": TEXT}]
    return found | ({"security": []} if open_to_all else {})


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = (), closed: bool = False) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties} | (
        {"additionalProperties": False} if closed else {}
    )


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _several(schema: Schema, service: Service) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": service.allowed.max_inputs}


def _items_request(service: Service) -> Schema:
    scalar: Schema = {"type": ["string", "number", "boolean", "null"]}
    metadata: Schema = {"type": "object", "additionalProperties": scalar}
    item = _object({"id": TEXT, "text": TEXT, "metadata": _maybe(metadata)}, ("metadata",), closed=True)
    return _object({"items": _several(item, service)}, closed=True)


def _embeddings_request(service: Service) -> Schema:
    allowed = service.allowed
    texts: Schema = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": allowed.max_inputs}
    kinds: list[Schema] = [TEXT, texts]
    if allowed.vocabulary is not None:
        ids: Schema = {"type": "array", "minItems": 1} | {
            "items": {"type": "integer", "minimum": 0, "maximum": allowed.vocabulary - 1}
        }
        kinds += [ids, {"type": "array", "items": ids, "minItems": 1, "maxItems": allowed.max_inputs}]
    types: Schema = {"type": "string", "enum": sorted({"query", "document", *allowed.prompts})}
    properties: dict[str, Any] = {
        "model": {"type": "string", "enum": list(allowed.names)},
        "input": {"anyOf": kinds},
        **{name: _maybe(_width(service)) for name in WIDTHS},
        "encoding_format": _maybe({"type": "string", "enum": ["float", "base64"], "default": "float"}),
        "output_dtype": _maybe({"type": "string", "enum": list(DTYPES), "default": "float"}),
        "input_type": _maybe(types),
        "prompt_name": _maybe(types),
        "truncate": _maybe({"type": "string", "enum": ["none", "end"], "default": "none"}),
        "depth": _maybe({"type": "integer", "enum": list(allowed.depths)}) if allowed.depths else {"type": "null"},
        "user": _maybe({"type": "string"}),
    }
    return _object(properties, tuple(name for name in properties if name not in ("model", "input")), closed=True)


def _search_request(service: Service) -> Schema:
    texts: Schema = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": service.allowed.max_inputs}
    width = service.allowed.width
    numbers: Schema = {"type": "array", "items": {"type": "number"}, "minItems": width, "maxItems": width}
    coded = {"type": "string", "contentEncoding": "base64"}
    properties = {
        "query": _maybe({"anyOf": [TEXT, texts]}),
        "vector": _maybe({"anyOf": [numbers, coded]}),
        "dimensions": _maybe(_width(service)),
        "model": _maybe({"type": "string", "enum": list(service.allowed.names)}),
        "k": _maybe({"type": "integer", "minimum": 1, "maximum": MOST_HITS, "default": 10}),
        "plan": _maybe({"type": "string"}),
        "where": _maybe({"type": "object"}),
        "explain": _maybe({"type": "boolean", "default": False}),
        "user": _maybe({"type": "string"}),
    }
    one_of = [
        {"required": [asked], "properties": {asked: {"not": {"type": "null"}}, other: {"type": "null"}}}
        for asked, other in (("query", "vector"), ("vector", "query"))
    ]
    return _object(properties, tuple(properties), closed=True) | {"oneOf": one_of}


def _width(service: Service) -> Schema:
    allowed = service.allowed
    width: Schema = {"type": "integer", "minimum": 1, "maximum": allowed.width}
    return width | ({"enum": list(allowed.widths)} if allowed.widths is not None else {})


def _embeddings_answer() -> Schema:
    vector = {
        "anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string", "contentEncoding": "base64"}]
    }
    entry = _object(
        {"object": {"const": "embedding"}, "index": WHOLE, "embedding": vector, "scale": {"type": "number"}}, ("scale",)
    )
    data = {"type": "array", "items": entry}
    return _object({"object": {"const": "list"}, "data": data, "model": TEXT, "usage": USAGE}, closed=True)


def _search_answer() -> Schema:
    hit = _object(
        {
            "id": TEXT,
            "score": {"type": "number"},
            "document": _maybe({"type": "string"}),
            "metadata": _maybe({"type": "object"}),
        }
    )
    entry = _object({"object": {"const": "hits"}, "index": WHOLE, "hits": {"type": "array", "items": hit}})
    number: Schema = {"type": "number"}
    each: Schema = {"type": "array", "items": WHOLE}
    stage = _object({"stage": TEXT, "considered": WHOLE, "kept": WHOLE, "milliseconds": number, "each": each})
    properties = {
        "object": {"const": "list"},
        "data": {"type": "array", "items": entry},
        "model": TEXT,
        "plan": TEXT,
        "usage": USAGE,
        "explanation": {"type": "array", "items": stage},
        "promise": _maybe({"type": "string"}),
    }
    return _object(properties, ("explanation", "promise"), closed=True)


def _model() -> Schema:
    texts: Schema = {"type": "array", "items": {"type": "string"}}
    numbers: Schema = {"type": "array", "items": {"type": "integer"}}
    return _object(
        {
            "id": TEXT,
            "object": {"const": "model"},
            "created": WHOLE,
            "owned_by": {"type": "string"},
            "embedding_size": WHOLE,
            "is_matryoshka": {"type": "boolean"},
            "matryoshka_dimensions": numbers,
            "any_width": {"type": "boolean"},
            "depths": numbers,
            "max_input_tokens": WHOLE,
            "input_types": texts,
            "backend": {"type": "string"},
            "revision": _maybe({"type": "string"}),
            "quality": {"type": "array", "items": {"type": "object"}},
            "quality_by_depth": {"type": "array", "items": {"type": "object"}},
        },
        closed=True,
    )


def _index() -> Schema:
    number: Schema = {"type": "number"}
    return _object(
        {
            "object": {"const": "index"},
            "items": WHOLE,
            "width": WHOLE,
            "plan": TEXT,
            "promise": _maybe({"type": "object"}),
            "store": TEXT,
            "bytes_per_item": {"type": "object", "additionalProperties": number},
            "plan_bytes_per_item": _maybe(number),
            "plans": _maybe({"type": "object"}),
        },
        closed=True,
    )


def _error() -> Schema:
    maybe = _maybe({"type": "string"})
    inner = {"message": TEXT, "type": {"enum": sorted(set(KINDS.values()))}, "param": maybe, "code": maybe}
    return _object({"error": _object(inner, closed=True)}, closed=True)
