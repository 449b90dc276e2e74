"""Nested losses as sentence-transformers modules: equal to theirs where theirs exist, and to the tensor losses."""

import json
import warnings

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sentence_transformer.readers import InputExample
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import matryo as mt
from matryo import losses as ours
from matryo.core.errors import InputError
from matryo.training.modules import NestedLoss
from matryo.training.static import train_tokenizer

WIDTHS = [8, 16, 24, 32]
NESTING = mt.Nesting(WIDTHS)


@pytest.fixture(scope="module")
def texts(debian_rows):
    return [[row[name] for row in debian_rows[:12]] for name in ("anchor", "positive")] + [
        [row["positive"] for row in debian_rows[20:32]]
    ]


@pytest.fixture
def model(texts):
    torch.manual_seed(0)
    return SentenceTransformer(
        modules=[StaticEmbedding(train_tokenizer([x for column in texts for x in column], 400), embedding_dim=32)],
        device="cpu",
    )


@pytest.fixture(scope="module")
def transformer(minilm):
    return SentenceTransformer(str(minilm), device="cpu")


def features(model, columns):
    return [model.preprocess(column) for column in columns]


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("columns", [2, 3])
def test_equals_matryoshka_loss_around_multiple_negatives(model, texts, columns):
    given = texts[:columns]
    theirs = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), WIDTHS)
    expected = theirs(features(model, given), None)
    slope = gradient(model, expected)
    loss = NestedLoss(model, ours.nested_info_nce, WIDTHS[::-1])
    found = loss(features(model, given), None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(model, found), slope, rtol=1e-4, atol=1e-6)
    assert loss.values.shape == (4,)
    assert loss.values.sum().item() == pytest.approx(found.item(), rel=1e-5)


def test_gradient_caching_changes_nothing(transformer, texts):
    nesting = mt.Nesting([32, 128, 384], [1.0, 0.5, 2.0])
    whole = NestedLoss(transformer, ours.nested_info_nce, nesting)(features(transformer, texts[:2]))
    slope = gradient(transformer, whole)
    cached = NestedLoss(transformer, ours.nested_info_nce, nesting, mini_batch_size=5)
    value = cached(features(transformer, texts[:2]))
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradient(transformer, value), slope, rtol=1e-3, atol=1e-5)


SCORES = torch.rand(12, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(12) % 3
TAUGHT = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
LISTS = torch.randn(12, 2, generator=torch.Generator().manual_seed(3))

CASES = {
    "nested_info_nce": (3, None, {"symmetric": True}),
    "nested_quantised_info_nce": (2, None, {"temperature": 0.1}),
    "nested_sigmoid": (2, None, {"scale": 5.0}),
    "nested_triplet": (3, None, {"margin": 0.3}),
    "nested_cosent": (2, SCORES, {}),
    "nested_angle": (2, SCORES, {}),
    "nested_online_contrastive": (2, CLASSES % 2, {}),
    "nested_multi_similarity": (1, CLASSES, {}),
    "nested_supcon": (1, CLASSES, {}),
    "nested_distill": (1, TAUGHT, {"kind": "similarity"}),
    "nested_margin_mse": (3, SCORES, {}),
    "nested_kl": (3, LISTS, {"teacher_temperature": 2.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_loss_gets_its_columns_and_labels(model, texts, name):
    count, labels, options = CASES[name]
    call = getattr(ours, name)
    x = [model(f)["sentence_embedding"] for f in features(model, texts[:count])]
    if name in ("nested_info_nce", "nested_quantised_info_nce", "nested_sigmoid"):
        x = [x[0], torch.cat(x[1:])]
    if name == "nested_kl":
        x = [x[0], torch.stack(x[1:], 1)]
    expected = call(*x, *([] if labels is None else [labels]), nesting=NESTING, **options)
    loss = NestedLoss(model, call, WIDTHS, **options)
    torch.testing.assert_close(loss(features(model, texts[:count]), labels), expected)
    json.dumps(loss.get_config_dict())


def test_several_columns_learn_from_one_teacher(model, texts):
    loss = NestedLoss(model, ours.nested_distill, WIDTHS)
    apart = [loss(features(model, [column]), TAUGHT) for column in texts[:2]]
    torch.testing.assert_close(loss(features(model, texts[:2]), TAUGHT), sum(apart) / 2)


def test_head_and_learned_temperature_are_trained(model, texts):
    head = ours.NestedHead(NESTING, 3)
    loss = NestedLoss(model, ours.nested_cross_entropy, WIDTHS, head=head)
    loss(features(model, texts[:1]), CLASSES).backward()
    assert all(p.grad is not None for p in loss.parameters())
    temperature = nn.Parameter(torch.full((4,), 0.05))
    loss = NestedLoss(model, ours.nested_info_nce, WIDTHS, temperature=temperature, keep=2)
    loss(features(model, texts[:2])).backward()
    assert temperature.grad is not None
    assert int((temperature.grad != 0).sum()) == 2
    assert any(p is temperature for p in loss.parameters())
    assert loss.get_config_dict()["temperature"] == pytest.approx([0.05] * 4)


def test_guide_masks_false_negatives_and_is_not_trained(model, texts):
    torch.manual_seed(7)
    guide = SentenceTransformer(modules=[StaticEmbedding(model[0].tokenizer, embedding_dim=16)], device="cpu")
    loss = NestedLoss(model, ours.nested_guided_info_nce, WIDTHS, guide=guide)
    x, g = ([m(f)["sentence_embedding"] for f in features(m, texts)] for m in (model, guide))
    arguments = (x[0], torch.cat(x[1:]), g[0], torch.cat(g[1:]))
    found = loss(features(model, texts))
    torch.testing.assert_close(found, ours.nested_guided_info_nce(*arguments, nesting=NESTING))
    assert found < NestedLoss(model, ours.nested_info_nce, WIDTHS)(features(model, texts))
    assert len(list(loss.parameters())) == len(list(model.parameters()))


def test_own_loss_is_nested(model, texts):
    def squares(a, b, scores):
        return F.mse_loss(F.cosine_similarity(a, b), scores)

    def plain(a, b):
        return (a - b).square().sum(1).mean()

    x = [model(f)["sentence_embedding"] for f in features(model, texts[:2])]
    found = NestedLoss(model, squares, WIDTHS)(features(model, texts[:2]), SCORES)
    torch.testing.assert_close(found, ours.nested(squares, NESTING)(*x, SCORES))
    found = NestedLoss(model, plain, WIDTHS)(features(model, texts[:2]), SCORES)
    torch.testing.assert_close(found, ours.nested(plain, NESTING)(*x))


def test_sampled_widths_are_for_training_only(model, texts):
    loss = NestedLoss(model, ours.nested_info_nce, WIDTHS, keep=2, temperature=[0.1, 0.2, 0.3, 0.4])
    whole = NestedLoss(model, ours.nested_info_nce, WIDTHS, temperature=[0.1, 0.2, 0.3, 0.4])
    given = features(model, texts[:2])
    expected = whole(given).item()
    sampler = loss.sampler
    terms = dict(zip(WIDTHS, whole.values.tolist(), strict=True))
    for step in range(4):
        drawn = sampler.draw(step)
        assert loss(given).item() == pytest.approx(sum(w * terms[d] for d, w in drawn), rel=1e-5)
    loss.eval()
    assert loss(given).item() == pytest.approx(expected)


def test_rows_of_all_processes_are_compared(model, texts, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for call, labels in ((ours.nested_info_nce, None), (ours.nested_supcon, CLASSES)):
            count = 2 if labels is None else 1
            loss = NestedLoss(wrapped, call, WIDTHS, gather_across_devices=True)
            plain = NestedLoss(model, call, WIDTHS)
            torch.testing.assert_close(
                loss(features(model, texts[:count]), labels), plain(features(model, texts[:count]), labels)
            )
        loss = NestedLoss(wrapped, ours.nested_cross_entropy, WIDTHS, head=ours.NestedHead(NESTING, 3))
        with pytest.raises(InputError, match="would drift apart between processes"):
            loss(features(model, texts[:1]), CLASSES)
    finally:
        torch.distributed.destroy_process_group()


def test_model_fit_changes_one_line(model, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [InputExample(texts=[a, b]) for a, b in zip(*texts[:2], strict=True)]
    loss = NestedLoss(model, ours.nested_info_nce, WIDTHS)
    before = loss(features(model, texts[:2])).item()
    for fit in (model.fit, model.old_fit):
        data = DataLoader(rows, batch_size=6, shuffle=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fit itself, which is old
            fit(train_objectives=[(data, loss)], epochs=4, warmup_steps=0, optimizer_params={"lr": 0.05},
                show_progress_bar=False)  # fmt: skip
        after = loss(features(model, texts[:2])).item()
        assert after < 0.8 * before
        before = after


@pytest.mark.parametrize(
    ("call", "columns", "labels", "said"),
    [
        (ours.nested_triplet, 2, None, "nested_triplet takes anchors_BD, positives_BD, negatives_BD, got 2 columns"),
        (ours.nested_supcon, 2, CLASSES, "nested_supcon takes embeddings_BD, got 2 columns"),
        (ours.nested_info_nce, 1, None, "nested_info_nce takes anchors_BD, candidates_ND, got 1 columns"),
        (ours.nested_cosent, 2, None, r"nested_cosent needs labels \(scores_B\); add a column 'label'"),
    ],
)
def test_wrong_columns_are_named(model, texts, call, columns, labels, said):
    with pytest.raises(InputError, match=said):
        NestedLoss(model, call, WIDTHS)(features(model, texts[:columns]), labels)


@pytest.mark.parametrize(
    ("call", "options", "said"),
    [
        (ours.nested_info_nce, {"scale": 20}, "no argument 'scale' to set; allowed: temperature, symmetric, chunk"),
        (ours.nested_info_nce, {"group": CLASSES}, "no argument 'group' to set"),
        (ours.nested_cross_entropy, {}, r"give head=NestedHead\(nesting, num_classes\)"),
        (ours.nested_guided_info_nce, {}, "give guide=MODEL to nested_guided_info_nce"),
        (ours.nested_info_nce, {"keep": 9}, "keep must be an integer in 2..4"),
    ],
)
def test_wrong_arguments_are_refused_at_once(model, call, options, said):
    with pytest.raises(InputError, match=said):
        NestedLoss(model, call, WIDTHS, **options)


def test_widths_beyond_the_model_are_refused(model):
    with pytest.raises(InputError, match="ends at width 64 but the vectors have 32"):
        NestedLoss(model, ours.nested_info_nce, [8, 64])
