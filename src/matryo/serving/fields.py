"""Requests, read strictly: what is not known is refused, nothing is converted, and no message repeats what was sent."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from matryo.serving.errors import ApiError, invalid

Fields = dict[str, Any]

WIDTHS = ("dimensions", "output_dimension", "dimensionality", "truncate_dim")
"""Names of the width: OpenAI's, and what Voyage, Google and sentence-transformers call it."""
DTYPES = ("float", "int8", "uint8", "binary", "ubinary")
PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

EMBEDDINGS = frozenset(
    {"model", "input", "encoding_format", "user", "depth", "output_dtype", "input_type", "prompt_name", "truncate"}
).union(WIDTHS)


@dataclass(frozen=True)
class Allowed:
    """What this server's model and settings allow."""

    names: tuple[str, ...]
    width: int
    widths: tuple[int, ...] | None
    """The only widths to serve, or None for any of 1..width."""
    depths: tuple[int, ...] | None
    """Layers that may be asked for: all of them, and what else the model was trained at. None: it has no layers."""
    prompts: tuple[str, ...]
    max_inputs: int
    vocabulary: int | None
    """Token ids below this are taken as input; None: no token ids."""


@dataclass(frozen=True)
class EmbeddingsRequest:
    """A request for embeddings that is right in everything but the length of its inputs."""

    model: str
    texts: list[str] | None
    ids: list[list[int]] | None
    """Token ids in the place of texts."""
    width: int
    dtype: str
    base64: bool
    prompt: str | None
    cut: bool
    """Cut inputs that are too long, where it would otherwise be an error."""
    depth: int | None = None
    """Layers to run; None for all of them."""


def read_json(body: bytes) -> Fields:
    """The JSON object of a body. NaN, lone surrogates and other things that are not JSON are refused while parsing."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise invalid(None, f"The body is not valid JSON in UTF-8 ({where}).", "invalid_json") from error
    if not isinstance(found, dict):
        raise invalid(None, f"The body must be a JSON object, got {kind(found)}.", "invalid_json")
    return found


def refuse_unknown(fields: Fields, known: frozenset[str]) -> None:
    """Raise on a field that this server would silently ignore."""
    for name in fields.keys() - known:
        shown = name if PLAIN_NAME.fullmatch(name) else None
        what = f"Unknown field '{shown}'" if shown else "A field with an unusual name is unknown"
        raise invalid(shown, f"{what}; this endpoint takes {', '.join(sorted(known))}.", "unknown_field")


def read_embeddings(fields: Fields, allowed: Allowed) -> EmbeddingsRequest:
    """Check everything in a request for embeddings that can be checked without the tokeniser.

    Raises:
        ApiError: 404 for a model that is not served here, else 400 with the field in `param`.
    """
    refuse_unknown(fields, EMBEDDINGS)
    model = read_model(fields, allowed)
    if "input" not in fields:
        raise invalid("input", "The field 'input' is required: a text, or a list of texts.", "missing_field")
    texts, ids = _inputs(fields["input"], allowed)
    text(fields, "user", None)
    encoding = one_of(fields, "encoding_format", ("float", "base64"))
    dtype = one_of(fields, "output_dtype", DTYPES)
    width = read_width(fields, allowed)
    if "binary" in dtype and width % 8:
        near = max(8, width // 8 * 8)
        raise invalid("output_dtype", f"Binary codes need a width that is a multiple of 8, got {width}; try {near}.")
    depth = _depth(fields, allowed)
    cut = one_of(fields, "truncate", ("none", "end")) == "end"
    base64, prompt = encoding == "base64", _prompt(fields, allowed)
    return EmbeddingsRequest(model, texts, ids, width, dtype, base64, prompt, cut, depth)


def read_model(fields: Fields, allowed: Allowed) -> str:
    """The model's name, which must be one that is served; any other is a 404."""
    if fields.get("model") is None:
        raise invalid("model", f"The field 'model' is required, for example '{allowed.names[0]}'.", "missing_field")
    name = text(fields, "model", None)
    if name not in allowed.names:
        served = ", ".join(repr(one) for one in allowed.names)
        raise ApiError(404, f"No such model here; this server has {served}.", code="model_not_found", param="model")
    return str(name)


def read_width(fields: Fields, allowed: Allowed) -> int:
    """The width asked for by whichever of its names, or the full width. Two that disagree are refused."""
    given = {name: fields[name] for name in WIDTHS if fields.get(name) is not None}
    if not given:
        return allowed.width
    for name, value in given.items():
        integer(name, value, 1, allowed.width)
    if len(set(given.values())) > 1:
        raise invalid(
            next(iter(given)), f"{' and '.join(given)} are names of one thing and disagree; give one.", "conflict"
        )
    name, width = next(iter(given.items()))
    if allowed.widths is not None and width not in allowed.widths:
        listed = ", ".join(map(str, allowed.widths))
        raise invalid(name, f"This server serves trained widths only: {listed}; got {width}.")
    return int(width)


def _depth(fields: Fields, allowed: Allowed) -> int | None:
    """The layers asked for, or None for all of them."""
    value = fields.get("depth")
    if value is None:
        return None
    if allowed.depths is None:
        raise invalid("depth", "This model has no layers to choose from; leave 'depth' out.")
    if type(value) is int and value in allowed.depths:
        return None if value == allowed.depths[-1] else value
    if len(allowed.depths) == 1:
        whole = allowed.depths[0]
        raise invalid("depth", f"This model was trained at its full depth only: 'depth' must be {whole}, or left out.")
    raise invalid("depth", f"'depth' must be one of {', '.join(map(str, allowed.depths))}.")


def _prompt(fields: Fields, allowed: Allowed) -> str | None:
    """The prompt an input type asks for. A model without prompts encodes queries and documents alike."""
    given = {name: text(fields, name, None) for name in ("input_type", "prompt_name")}
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return None
    if len(set(asked.values())) > 1:
        raise invalid(
            "input_type", "input_type and prompt_name are names of one thing and disagree; give one.", "conflict"
        )
    name, value = next(iter(asked.items()))
    if value not in allowed.prompts and value not in ("query", "document"):
        known = ", ".join(sorted({*allowed.prompts, "query", "document"}))
        raise invalid(name, f"'{name}' must be one of {known}.")
    return value


def _inputs(value: object, allowed: Allowed) -> tuple[list[str] | None, list[list[int]] | None]:
    """Texts, or token ids where they are allowed."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise invalid("input", f"'input' must be a text or a list of texts, got {kind(value)}.")
    if not value:
        raise invalid("input", "'input' is an empty list; give at least one text.")
    if all(type(one) is int for one in value):
        value = [value]
    if len(value) > allowed.max_inputs:
        raise invalid(
            "input", f"'input' has {len(value)} entries; at most {allowed.max_inputs} are allowed.", "too_many_inputs"
        )
    if isinstance(value[0], list):
        return None, _token_ids(value, allowed)
    return check_texts(value, "input"), None


def check_texts(values: Sequence[object], param: str) -> list[str]:
    """Texts of which none is blank; the first wrong one is named by position."""
    texts: list[str] = []
    for n, one in enumerate(values):
        if not isinstance(one, str):
            raise invalid(f"{param}[{n}]", f"'{param}[{n}]' must be a text, got {kind(one)}.")
        if not one or one.isspace():
            raise invalid(f"{param}[{n}]", f"'{param}[{n}]' is empty; every input needs some text.", "empty_input")
        texts.append(one)
    return texts


def _token_ids(values: list[Any], allowed: Allowed) -> list[list[int]]:
    if allowed.vocabulary is None:
        raise invalid(
            "input",
            "Token ids are not accepted: ids of another tokeniser would give meaningless vectors. Send texts; in "
            "LangChain's OpenAIEmbeddings that is check_embedding_ctx_length=False.",
            "token_input_refused",
        )
    for n, ids in enumerate(values):
        where = f"input[{n}]"
        if not isinstance(ids, list):
            raise invalid(where, f"'{where}' must be a list of token ids like the first entry, got {kind(ids)}.")
        if not ids:
            raise invalid(where, f"'{where}' is empty; every input needs at least one token.", "empty_input")
        if not all(type(one) is int and 0 <= one < allowed.vocabulary for one in ids):
            raise invalid(where, f"'{where}' must hold integers in 0..{allowed.vocabulary - 1}, this model's tokens.")
    return values


def integer(name: str, value: object, low: int, high: int | None) -> int:
    """A true integer within bounds: no bool, no text, no float."""
    bounds = f"an integer in {low}..{high}" if high is not None else f"an integer of at least {low}"
    if type(value) is not int:
        raise invalid(name, f"'{name}' must be {bounds}, got {kind(value)}.")
    if value < low or (high is not None and value > high):
        raise invalid(name, f"'{name}' must be {bounds}, got {value}.")
    return value


def text(fields: Fields, name: str, default: str | None) -> str | None:
    """A text, or the default where the field is absent or null."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise invalid(name, f"'{name}' must be a text, got {kind(value)}.")
    return value


def one_of(fields: Fields, name: str, choices: tuple[str, ...]) -> str:
    """One of a few texts; the first where the field is absent or null."""
    value = fields.get(name)
    if value is None:
        return choices[0]
    if value not in choices or not isinstance(value, str):
        raise invalid(name, f"'{name}' must be one of {', '.join(choices)}.")
    return value


def kind(value: object) -> str:
    """What JSON calls it."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
