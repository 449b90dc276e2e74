"""`POST /v1/embeddings`: OpenAI's contract, with a true width knob, codes, prompts and cutting beyond it."""

import base64
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryo.serving.door import Answer, as_json
from matryo.serving.engines import Tokens
from matryo.serving.fields import read_embeddings, read_json
from matryo.serving.service import Call, Service

Float32s = NDArray[np.float32]


async def embeddings(service: Service, call: Call) -> Answer:
    """Encode texts. The answer's rows are in the order of the request and have length 1 at every width."""
    asked = read_embeddings(read_json(call.body), service.allowed)
    if asked.texts is None:
        inputs = [Tokens(ids, None) for ids in asked.ids or ()]
    else:
        call.texts = asked.texts
        inputs = await service.tokens(asked.texts, asked.prompt)
    if asked.depth is not None:
        call.depth = asked.depth
        inputs = [replace(one, depth=asked.depth) for one in inputs]
    rows = await service.encode(call, service.fitted(inputs, asked.cut, "input"), asked.width, "input")
    began = time.monotonic()
    codes, scales = coded(rows, asked.dtype)
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": n, "embedding": in_base64(code) if asked.base64 else code}
        for n, code in enumerate(codes)
    ]
    if scales is not None:
        for entry, scale in zip(data, scales.tolist(), strict=True):
            entry["scale"] = scale
    usage = {"prompt_tokens": call.tokens, "total_tokens": call.tokens}
    answer = as_json({"object": "list", "data": data, "model": asked.model, "usage": usage})
    call.timing["write"] = time.monotonic() - began
    return answer


def coded(rows_ND: Float32s, dtype: str) -> tuple[NDArray[Any], Float32s | None]:
    """Unit rows as the numbers that are sent, and for int8 and uint8 what each row's numbers are to be multiplied by.

    int8: code = round(x / scale), scale = the row's largest magnitude / 127. One scale a row leaves cosines between
    decoded rows what they are between codes. uint8 is int8 + 128. ubinary packs signs, 1 for above 0, first dimension
    in the highest bit; binary is ubinary - 128.
    """
    if dtype == "float":
        return rows_ND, None
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(rows_ND > 0, axis=1)
        return bits if dtype == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8), None
    scales = (np.abs(rows_ND).max(axis=1) / np.float32(127)).astype(np.float32)
    codes = np.rint(rows_ND / scales[:, None]).clip(-127, 127).astype(np.int16)
    return (codes.astype(np.int8) if dtype == "int8" else (codes + 128).astype(np.uint8)), scales


def in_base64(code: NDArray[Any]) -> str:
    """The bytes of one row, float32 in little-endian order whatever the machine."""
    little = code.astype("<f4") if code.dtype == np.float32 else code
    return base64.b64encode(little.tobytes()).decode()
