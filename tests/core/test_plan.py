import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryo.core.errors import InputError
from matryo.core.plan import Plan, Stage

CODES = ["float32", "float16", "bfloat16", "int8", "int4", "binary", "rabitq", "pq16"]


@st.composite
def plans(draw) -> Plan:
    """Any plan that obeys the laws."""
    count = draw(st.integers(1, 4))
    widths = sorted(8 * w for w in draw(st.lists(st.integers(1, 100), min_size=count, max_size=count)))
    keeps = sorted(draw(st.lists(st.integers(1, 5000), min_size=count, max_size=count)), reverse=True)
    last = draw(st.booleans())
    scan = draw(st.sampled_from(["flat", "hnsw", "ivf"]))
    names = {"flat": (), "hnsw": ("M", "ef"), "ivf": ("cells", "probe", "at")}[scan]
    most = {"at": widths[0]}
    options = tuple((name, draw(st.integers(1, most.get(name, 999)))) for name in draw(st.permutations(names)))
    return Plan(
        tuple(
            Stage(
                width,
                draw(st.sampled_from(CODES)),
                scan if n == 0 else "flat",
                options[: draw(st.integers(0, len(options)))] if n == 0 else (),
                keeps[n] if n < count - 1 or last else None,
                draw(st.none() | st.integers(1, 20_000).map(lambda m: m / 10_000))
                if n == 0 and (count > 1 or last)
                else None,
            )
            for n, width in enumerate(widths)
        )
    )


@given(plans())
def test_the_text_reads_back(plan):
    assert Plan.parse(str(plan)) == plan
    assert str(Plan.parse(str(plan))) == str(plan)


@pytest.mark.parametrize(
    "text",
    [
        "256:binary keep 400 > 768:int8 keep 40 > 768:float32",
        "128:int8 hnsw(M=32,ef=80) keep 200 > 768:float16",
        "64:float32 ivf(cells=4096,probe=32) keep 1000 > 256:int8 keep 100 > 1024:float16",
        "256:pq32 ivf(cells=1024,probe=32,at=64) keep 200 > 768:float32",
        "128:rabitq keep 200 > 256:int4 keep 40 > 768:float32",
        "256:binary keep 1600 within 0.08 > 768:float32",
        "768:float32",
    ],
)
def test_the_documented_plans_read_back_exactly(text):
    assert str(Plan.parse(text)) == text


def test_spaces_do_not_matter():
    assert str(Plan.parse(" 8 : int8  hnsw( M = 3 )  keep 4>8:float32 ")) == "8:int8 hnsw(M=3) keep 4 > 8:float32"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line of text"),
        ("64", "stage 1"),
        ("64:int3", "unknown code 'int3'"),
        ("64:int8 tree keep 4 > 64:int8", "unknown scan 'tree'"),
        ("64:int8 hnsw(Z=3)", "hnsw takes M="),
        ("64:int8 hnsw(M=0)", "integer above 0"),
        ("64:int8 hnsw(M=3,M=4)", "given twice"),
        ("64:int8 ivf(cells=4,at=65)", "stage 1 .*cells are made at a width of at most the stage's, 64"),
        ("64:int8 > 128:int8", "stage 1 .*must say how many"),
        ("128:int8 keep 9 > 64:int8", "stage 2 .*widths never shrink"),
        ("64:int8 keep 9 > 64:int8 keep 10", "stage 2 .*keep never grows"),
        ("64:int8 keep 9 > 64:int8 hnsw", "stage 2 .*only the first stage"),
        ("20:binary", "multiple of 8"),
        ("0:int8", "at least 1"),
        ("64:int8 within 0.1 > 64:int8", "stage 1"),
        ("64:int8 keep 9 > 64:int8 keep 9 within 0.1", "stage 2 .*only a first stage that keeps rows"),
        ("64:int8 keep 9 within 3 > 64:int8", "stage 1 .*within must be 0.0001 to 2"),
        ("64:int8 keep 9 within 0 > 64:int8", "stage 1 .*within must be 0.0001 to 2"),
        ("64:int8 keep 9 within 0.1234567 > 64:int8", "in six digits at most"),
        ("64:int8 keep 0", "keep must be at least 1"),
    ],
)
def test_a_bad_plan_names_the_stage_and_a_right_plan(text, said):
    with pytest.raises(InputError, match=said) as caught:
        Plan.parse(text)
    right = next(part for part in reversed(str(caught.value).split("'")) if ":" in part)
    assert str(Plan.parse(right)) == right


def test_empty_and_wide_plans():
    with pytest.raises(InputError, match="at least one stage"):
        Plan(())
    plan = Plan.parse("256:binary keep 400 > 768:float32")
    assert plan.width == 768
    plan.check(768)
    with pytest.raises(InputError, match=r"stage 2 .*768 is outside 1..512.*512:float32"):
        plan.check(512)
