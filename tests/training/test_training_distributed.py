"""Two and four processes on this machine (gloo) against one process on the whole batch; see several_processes.py."""

import json
import multiprocessing

import pytest
import several_processes
import torch
import torch.multiprocessing

import matryo as mt
from matryo.losses import gather_with_gradient, gathered_info_nce, nested_info_nce, row_share
from matryo.training.distributed import check_agreement

TOLERANCE = 1e-12
"""Of a parameter's float64 gradient, relative to the largest entry: only the order of sums differs."""


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """What every process found, after one start of all of them."""
    folder = tmp_path_factory.mktemp("processes")
    # The server imports once and forks; a process started anew would import torch and transformers for itself.
    multiprocessing.set_forkserver_preload(["several_processes", "matryo.training"])
    world = request.param
    torch.multiprocessing.start_processes(
        several_processes.main, (world, str(folder)), nprocs=world, start_method="forkserver"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


CASES = [name for name, _ in several_processes.checks(2) if name not in ("cargo", "agreement", "refusals")]


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_every_parameter_is_that_of_one_process(results, name):
    for found in results:
        assert found[name]["gradient"] <= TOLERANCE
        assert found[name].get("loss", 0) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("InfoNCE")])
def test_one_gather_and_one_reduce_a_step(results, name):
    for found in results:
        counts = dict(found[name]["counts"])
        assert counts.pop("ddp") == 1
        reduces = sum(n for kind, n in counts.items() if "reduce" in kind)
        gathers = sum(n for kind, n in counts.items() if "gather" in kind)
        assert reduces == 1
        assert gathers == (2 if "no capacity" in name else 1)
        assert sum(counts.values()) == reduces + gathers


@pytest.mark.parametrize("name", ["accumulation, plain", "accumulation, cached"])
def test_accumulated_batches_are_reduced_once(results, name):
    assert [found[name]["ddp"] for found in results] == [1] * len(results)


def test_cargo_arrives_bit_for_bit(results):
    for found in results:
        assert found["cargo"] == dict.fromkeys(found["cargo"], True)


def test_disagreement_is_named_on_every_process(results):
    last = len(results) - 1
    for found in results:
        said = found["agreement"]
        assert said["same"] == ""
        assert said["value"] == (
            f"processes disagree on the configuration: process {last} differs from process 0 "
            "(config.seed is 2 there and 1 on process 0); start every process with the same configuration and data"
        )
        assert 'process 1 differs from process 0 (pairs is null there and {"rows": 9} on process 0)' in said["missing"]
        assert "process 1 differs from process 0;" in said["digest"]


def test_bad_input_is_named(results):
    for found in results:
        said = found["refusals"]
        assert said["capacity"] == "3 rows do not fit a capacity of 2; give the batch size per process"
        assert said["columns"] == "columns must all be (B, D) with one B, got [(3, 4), (2, 4)]"
        assert said["none"].endswith("got []")
        assert said["labels"] == "labels must be (3,), one a row, got (2,)"
        assert "static_graph" in said["static graph"]


def test_one_process_needs_no_group():
    nesting = mt.Nesting([2, 4])
    a, p, n = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    group = torch.tensor([0, 1, 1, -1, 2])
    every = gather_with_gradient([a, p], labels=group, capacity=9)
    assert every.columns[0] is a
    assert every.columns[1] is p
    assert every.labels is group
    assert every.share == row_share(5) == 1
    assert every.targets.tolist() == [0, 1, 2, 3, 4]
    got = gathered_info_nce([a, p, n], nesting=nesting, group=group, symmetric=True)
    assert torch.equal(got, nested_info_nce(a, torch.cat([p, n]), nesting=nesting, group=group, symmetric=True))
    check_agreement({"seed": 1})


def test_info_nce_needs_two_columns():
    with pytest.raises(ValueError, match="anchors and one of positives, got 1 columns"):
        gathered_info_nce([torch.ones(2, 4)], nesting=mt.Nesting([4]))
