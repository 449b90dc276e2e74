"""The lines predictions are made of."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryo.core.errors import InputError
from matryo.planner.quantities import amount, size, span
from matryo.planner.scaling import Measured, held_out, predict


def at(items, a=0.1, b=1e-5, c=0.05, d=1e-3, rest=0.2, power=0.5, bytes_=32):
    keep = round(20 * items**power)
    scan, after = a + b * items, c + d * keep
    return Measured(items, keep, keep, scan + after + rest, 0, 0, scan, after, bytes_ * items, 4 * items, 1e-6 * items)


positive = st.floats(1e-6, 1.0)


@given(positive, positive, positive, st.floats(1e-6, 1e-2), st.floats(0.3, 0.6))
def test_a_law_of_the_model_is_found_again_at_any_size(a, b, c, d, power):
    sizes = [at(n, a, b * 1e-4, c, d, power=power) for n in (1000, 2000, 4000, 8000)]
    said, true = predict(sizes, 40_000, graph=False), at(40_000, a, b * 1e-4, c, d, power=power)
    assert said.ms == pytest.approx(true.ms, rel=0.05)
    assert said.code_bytes == pytest.approx(true.code_bytes, rel=1e-6)
    assert said.disk_bytes == pytest.approx(true.disk_bytes, rel=1e-6)
    assert said.keep == pytest.approx(true.keep, rel=0.05, abs=2)
    error = held_out(sizes, graph=False)
    assert error == pytest.approx((0, 0), abs=0.05)


@given(st.lists(st.floats(0.01, 10), min_size=4, max_size=4))
def test_whatever_was_measured_no_prediction_is_negative_or_falls_with_the_items(times):
    sizes = [
        Measured(n, 10 + i, 10 + i, 3 * t, t, t, t, t, 16 * n, 4 * n, t)
        for i, (n, t) in enumerate(zip((1000, 2000, 4000, 8000), times, strict=True))
    ]
    for graph in (False, True):
        said = [predict(sizes, n, graph) for n in (9000, 16_000, 1_000_000)]
        assert all(p.ms > 0 and p.code_bytes > 0 and p.build_s > 0 for p in said)
        assert said[0].ms <= said[1].ms + 1e-9
        assert said[1].ms <= said[2].ms + 1e-9


def test_graphs_grow_with_a_small_power():
    sizes = [
        Measured(n, 50, 50, 1, 1, 1, (n.bit_length() - 1) * 0.1, 0.1, 200 * n, 4 * n, 1) for n in (1024, 2048, 4096)
    ]
    assert 2.0 < predict(sizes, 1 << 20, graph=True).ms < 2 * 2.0
    assert predict(sizes, 1 << 20, graph=False).ms > 20


@given(st.floats(0.01, 10), st.floats(0, 0.4))
def test_a_graph_s_power_is_found_again(a, power):
    def grown(n):
        return Measured(n, 50, 50, a * n**power + 0.3, 1, 1, a * n**power, 0.1, 200 * n, 4 * n, 1)

    said = predict([grown(n) for n in (1000, 2000, 4000)], 100_000, graph=True)
    assert said.ms == pytest.approx(grown(100_000).ms, rel=1e-6)


def test_rows_take_longer_once_all_vectors_lie_there():
    """A row takes 1 us from a cache, 2 us more at 4,000 items and 3 us more at the 40,000 to come."""
    more = {1000: 0.0, 2000: 1e-3, 4000: 2e-3, 40_000: 3e-3}

    def read(n):
        true = at(n)
        slow = more[n] * true.keep
        return replace(true, ms=true.ms + slow, after_ms=true.after_ms + slow, row_ms=more[40_000] - more[n])

    sizes = [read(n) for n in (1000, 2000, 4000)]
    assert predict(sizes, 40_000, graph=False).ms == pytest.approx(read(40_000).ms, rel=0.05)
    assert predict(sizes, 4000, graph=False).ms == sizes[-1].ms
    assert held_out(sizes, graph=False) == pytest.approx((0, 0), abs=0.05)


def test_one_size_alone_is_taken_to_grow_in_proportion_and_has_no_error():
    said = predict([at(1000)], 10_000, graph=False)
    assert said.keep == pytest.approx(10 * at(1000).keep, abs=1)
    assert held_out([at(1000), at(2000)], graph=False) is None


def test_exact_search_is_predicted_from_sizes_that_had_its_codes():
    whole = [replace(at(n), code_bytes=0) for n in (1000, 4000)]
    coded = [replace(at(n, bytes_=784), item_ms=1e-5) for n in (16_000,)]
    said = predict([*whole, *coded], 80_000, graph=False)
    assert said.code_bytes == pytest.approx(784 * 80_000)


def test_where_a_further_item_was_timed_the_scan_grows_by_that():
    sizes = [replace(at(n), item_ms=3e-5) for n in (1000, 2000, 4000)]
    said = predict(sizes, 20_000, graph=False)
    plain = predict([at(n) for n in (1000, 2000, 4000)], 20_000, graph=False)
    # `at` grows by 1e-5 an item; 16,000 items more at 2e-5 more each.
    assert said.ms - plain.ms == pytest.approx(16_000 * 2e-5, rel=1e-6)
    # A longer shortlist takes longer to choose.
    longer = predict([replace(m, kept_ms=1e-4) for m in sizes], 20_000, graph=False)
    assert longer.ms - said.ms == pytest.approx((said.keep - sizes[-1].keep) * 1e-4, rel=0.01)
    # At the sizes that were measured nothing changes.
    assert predict(sizes, 4000, graph=False).ms == sizes[-1].ms


def test_amounts_are_read_as_people_write_them():
    assert amount("memory", "2GB") == 2e9
    assert amount("memory", "1.5 GiB") == 1.5 * 2**30
    assert amount("memory", 1000) == 1000
    assert amount("latency", "5ms") == 5
    assert amount("latency", "200us") == pytest.approx(0.2)
    assert amount("items", "100M") == 1e8
    assert amount("budget", "2min") == 120
    assert size(2_500_000) == "2.5 MB"
    assert [span(s) for s in (0.04, 90, 150, 7300, 10**6)] == ["0.04 s", "90 s", "2.5 min", "2 h", "278 h"]
    for bad in ("2 apples", "-1GB", "", "0", True, None, "infGB"):
        with pytest.raises(InputError, match="memory must be a number above 0, with one of the units B, KB"):
            amount("memory", bad)
