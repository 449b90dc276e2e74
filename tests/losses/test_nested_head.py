"""NestedHead as a module, and what nested_cross_entropy refuses."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import matryo as mt
from matryo.losses import NestedHead, nested_cross_entropy

NESTING = mt.Nesting([4, 8, 16])
FEATURES = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 4])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_one_width_and_of_all(tied, normalize):
    head = NestedHead(NESTING, 5, tied=tied, normalize=normalize)
    every = head(FEATURES)
    assert every.shape == (3, 6, 5)
    values = nested_cross_entropy(FEATURES, LABELS, head, nesting=NESTING, per_width=True)[1]
    assert not values.requires_grad
    for level, width in enumerate(NESTING.widths):
        one = head(FEATURES, width=width)
        linear = head.linears[0 if tied else level]
        prefix = mt.truncate(FEATURES, width) if normalize else FEATURES[:, :width]
        torch.testing.assert_close(one, F.linear(prefix, linear.weight[:, :width], linear.bias))
        torch.testing.assert_close(every[level], one)
        torch.testing.assert_close(values[level], F.cross_entropy(one, LABELS))


def test_a_tied_head_has_the_parameters_of_one_head():
    count = {tied: sum(p.numel() for p in NestedHead(NESTING, 5, tied=tied).parameters()) for tied in (False, True)}
    assert count == {True: 5 * 16 + 5, False: 5 * (4 + 8 + 16) + 3 * 5}


@pytest.mark.parametrize("tied", [False, True])
def test_the_state_loads_back(tied, tmp_path):
    from safetensors.torch import load_file, save_file

    head, other = (NestedHead(NESTING, 5, tied=tied) for _ in range(2))
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(head(FEATURES), other(FEATURES))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("widths", [[4, 8, 16], [8, 16], [16]])
def test_no_parameter_stays_without_a_gradient(tied, widths):
    head = NestedHead(NESTING, 5, tied=tied)
    nested_cross_entropy(FEATURES, LABELS, head, nesting=mt.Nesting(widths)).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
    if not tied:
        trained = [bool(linear.weight.grad.any()) for linear in head.linears]
        assert trained == [width in widths for width in NESTING.widths]


def test_a_head_left_out_hides_no_nan():
    head = NestedHead(NESTING, 5)
    with torch.no_grad():
        head.linears[0].weight.fill_(torch.nan)
    assert torch.isfinite(nested_cross_entropy(FEATURES, LABELS, head, nesting=mt.Nesting([8, 16])))


class Classifier(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.body = torch.nn.Linear(16, 16)
        self.head = NestedHead(NESTING, 5, tied=tied)

    def forward(self, x, labels, nesting):
        return nested_cross_entropy(self.body(x), labels, self.head, nesting=nesting)


@pytest.mark.parametrize("tied", [False, True])
def test_data_parallel_with_sampled_widths_misses_no_parameter(tied, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = Classifier(tied)
        wrapped = DistributedDataParallel(model)
        for widths in ([16], [4, 16], [4, 8, 16]):
            # Reducing over unused parameters would raise at the next forward.
            wrapped(FEATURES, LABELS, mt.Nesting(widths)).backward()
            assert all(p.grad is not None for p in model.parameters())
            model.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_training_lowers_the_loss_at_every_width(tied):
    torch.manual_seed(0)
    labels = torch.arange(120) % 5
    features = torch.randn(5, 16)[labels] + 0.3 * torch.randn(120, 16)
    head = NestedHead(NESTING, 5, tied=tied)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    start = nested_cross_entropy(features, labels, head, nesting=NESTING, per_width=True)[1]
    for _ in range(60):
        optimizer.zero_grad()
        loss, values = nested_cross_entropy(features, labels, head, nesting=NESTING, per_width=True)
        loss.backward()
        optimizer.step()
    assert bool((values < 0.6 * start).all())
    assert float((head(features, width=16).argmax(1) == labels).float().mean()) > 0.95


def call(labels=LABELS, features=FEATURES, nesting=NESTING, **options):
    return nested_cross_entropy(features, labels, NestedHead(NESTING, 5), nesting=nesting, **options)


def with_nan(row, column):
    features = FEATURES.clone()
    features[row, column] = torch.nan
    return features


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: call(torch.tensor([0, 1, 2, 0, 1, 5])), r"labels must lie in 0\.\.4 for this head, got 5"),
        (lambda: call(torch.tensor([0, 1, -100, 0, 1, 4])), r"0\.\.4 for this head, got -100"),
        (lambda: call(LABELS.float()), r"labels must be integers, got torch.float32; convert"),
        (lambda: call(LABELS > 1), "labels must be integers, got torch.bool"),
        (lambda: call(LABELS[:4]), r"labels must be \(6,\), one for each row, got \(4,\)"),
        (lambda: call(LABELS[:, None]), r"got \(6, 1\)"),
        (lambda: call(nesting=mt.Nesting([2, 16])), r"no width 2: its widths are \[4, 8, 16\].*asks for \[2, 16\]"),
        (lambda: call(nesting=mt.Nesting([4, 8])), "ends at width 8 but the vectors have 16"),
        (lambda: call(features=FEATURES[:, :8]), "ends at width 16 but the vectors have 8"),
        (lambda: call(features=FEATURES.long()), r"features must be a \(B, 16\) floating tensor"),
        (lambda: call(features=FEATURES[0]), r"got \(16,\)"),
        (lambda: call(LABELS[:0], FEATURES[:0]), "at least one row, got none"),
        (lambda: call(label_smoothing=1.5), r"label_smoothing must lie in 0\.\.1, got 1.5"),
        (lambda: call(features=with_nan(3, 5)), "loss at width 8 is nan: row 3 of features holds NaN or Inf"),
        (
            lambda: call(features=FEATURES * 1e38),
            "is (inf|nan) though every input is finite: the numbers are too large",
        ),
        (lambda: NestedHead(NESTING, 0), "num_classes must be an integer of at least 1, got 0"),
        (lambda: NestedHead(NESTING, 5)(FEATURES, width=5), r"no width 5; its widths are \[4, 8, 16\]"),
        (lambda: NestedHead(NESTING, 5)(FEATURES[:, :8]), "ends at width 16 but the vectors have 8"),
    ],
)
def test_bad_input_is_named(run, says):
    with pytest.raises(ValueError, match=says):
        run()


@pytest.mark.parametrize("tied", [False, True])
def test_a_bad_weight_is_named_by_class(tied):
    head = NestedHead(NESTING, 5, tied=tied)
    with torch.no_grad():
        head.linears[-1].weight[3, 10] = torch.inf
    with pytest.raises(ValueError, match="width 16 is nan: row 3 of the head's weight at width 16 holds"):
        nested_cross_entropy(FEATURES, LABELS, head, nesting=NESTING)
