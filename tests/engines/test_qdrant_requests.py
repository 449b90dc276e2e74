"""What is sent, word for word, as `tests/golden/qdrant-requests.json` has it; running this file writes that anew."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qdrant_client import models
from qdrant_client.conversions.conversion import RestToGrpc

from matryo import Plan
from matryo.core.errors import InputError
from matryo.engines import qdrant_requests as words
from matryo.engines.qdrant_requests import Prefix
from matryo.index.where import parse_where

GOLDEN = Path(__file__).parents[1] / "golden" / "qdrant-requests.json"
PLANS = (
    "8:float32",
    "4:int8 keep 40 > 8:float32",
    "1:float16 hnsw(M=8,ef=30) keep 50 > 8:binary keep 20 > 8:float32",
    "4:int8 hnsw(ef=100) keep 50 > 4:float32 keep 20 > 8:float32",
    "4:float32 hnsw(M=32,ef=10) keep 50",
    "8:float32 hnsw(M=16,ef=64)",
)
FILTERS = (
    {"section": "games"},
    {"year": 3, "flag": True},
    {"size": {">=": 3, "<": 9.5}, "tag": {"in": ["a", "b", 1]}},
    {"or": [{"a b": None}, {"not": {"x": {"!=": "y"}}}, {"z": {"not_in": []}}]},
)


def sent():
    """Everything that a request may hold, of vectors whose prefixes are exact in binary."""
    query = np.array([0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0], np.float32)
    query /= np.linalg.norm(query)
    found = {}
    for text in PLANS:
        plan = Plan.parse(text)
        vectors = words.read_vectors(words.lacking(plan, {words.FULL: Prefix(8)}), 8)
        found[text] = {"vectors": words.configs(vectors), "query": words.funnel(plan, query, 10, 11, None, vectors)}
    for where in FILTERS:
        plan, vectors = Plan.parse(PLANS[1]), words.read_vectors(["p4_int8"], 8)
        found[json.dumps(where)] = {"query": words.funnel(plan, query, 5, 6, parse_where(where), vectors)}
    items = words.points(
        ["a", "b"], query[None].repeat(2, 0), ["text", None], ['{"n": 1, "f": true}', None], vectors, 7
    )
    found["items"] = {"points": items, "fields": words.kinds_of(items), "note": words.note_point("{}")}
    found["lacking"] = {"filter": words.lack(["p4", "p8_int8"])}
    return found


def test_requests_are_word_for_word_what_they_were():
    assert json.loads(json.dumps(sent())) == json.loads(GOLDEN.read_text())


def test_the_client_takes_every_request_as_its_own():
    for name, parts in sent().items():
        for vector in parts.get("vectors", {}).values():
            RestToGrpc.convert_vector_params(models.VectorParams.model_validate(vector))
        for point in parts.get("points", []):
            RestToGrpc.convert_point_struct(models.PointStruct.model_validate(point))
        if "query" in parts:
            request = models.QueryRequest.model_validate(parts["query"])
            wire = RestToGrpc.convert_query_request(request, "docs")
            deepest, stages = wire, 0
            while deepest.prefetch:
                deepest, stages = deepest.prefetch[0], stages + 1
            assert deepest.HasField("filter") == name.startswith("{"), "the filter stands innermost"
            if not name.startswith("{"):
                plan = Plan.parse(name)
                exact = plan.stages[-1].scan == "flat" and str(plan.stages[-1]) == "8:float32"
                assert stages == len(plan.stages) - exact


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"name": {"<": "m"}}, "no order of texts; compare them by = != in not_in"),
        ({"size": 2**53}, r"below 2\^53, got 9007199254740992; keep larger numbers as text"),
        ({"size": {">": -(2**60)}}, "keep larger numbers as text"),
        ({"not": {"size": {"in": [1e300]}}}, "keep larger numbers as text"),
    ],
)
def test_a_filter_beyond_qdrant_is_refused(where, says):
    with pytest.raises(InputError, match=says):
        words.condition_of(parse_where(where))


@given(st.integers(1, 5000), st.sampled_from(words.CODES), st.integers(0, 100))
def test_a_name_reads_back(width, code, links):
    made = Prefix(width, code, links)
    assert Prefix.read(made.name, 9999) == made


def test_a_prefix_serves_what_can_be_read_off_it():
    stage = lambda text: Plan.parse(text).stages[0]  # noqa: E731
    assert Prefix(64, "int8").serves(stage("64:int8 keep 9"))
    assert Prefix(64, "int8").serves(stage("64:float32"))
    assert not Prefix(64, "int8", 16).serves(stage("64:int8")), "a scan of codes may not go by a graph"
    assert Prefix(64, "int8", 16).serves(stage("64:int8 hnsw(M=16,ef=9)"))
    assert not Prefix(64, "int8", 8).serves(stage("64:int8 hnsw(M=16,ef=9)"))
    assert not Prefix(64, "float16").serves(stage("64:float32"))
    assert not Prefix(64).serves(stage("32:float32"))
    with pytest.raises(InputError, match="is not the name of a prefix"):
        Prefix.read("vector", 64)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(sent(), indent=1) + "\n")
