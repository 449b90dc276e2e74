"""Losses by name: each one trains, its arguments are checked, and what it learns beside the model is kept."""

import json

import numpy as np
import pytest
import torch

import matryo as mt
from matryo import losses
from matryo.core.errors import DamagedError, InputError
from matryo.training import DataConfig, StaticConfig, TrainConfig, load_head, train
from matryo.training.data import Teacher, read_sets
from matryo.training.objectives import RECIPES, check_arguments

WIDTHS = [8, 16, 32]
RUNS = {
    "info_nce": ("pairs", {"loss_args": {"learn": "temperature", "symmetric": True}}),
    "quantised_info_nce": ("pairs", {"loss_args": {"codes": {"float32": 1.0, "binary": 0.5}}}),
    "guided_info_nce": ("pairs", {"teacher": "toy", "loss_args": {"margin": 0.05}}),
    "sigmoid": ("pairs", {"loss_args": {"learn": ["scale", "bias"], "scale": [5, 10, 20]}}),
    "triplet": ("triplets", {"loss_args": {"margin": 0.3}}),
    "cosent": ("scored", {}),
    "angle": ("scored", {"loss_args": {"scale": 10}}),
    "online_contrastive": ("scored", {"loss_args": {"metric": "euclidean"}}),
    "cross_entropy": ("labelled", {"loss_args": {"label_smoothing": 0.1}}),
    "multi_similarity": ("labelled", {"loss_args": {"beta": 20}}),
    "supcon": ("labelled", {}),
    "distill": ("texts", {"teacher": "toy", "loss_args": {"kind": "similarity"}}),
    "margin_mse": ("triplets", {"teacher": "toy", "loss_args": {"scale": 100}}),
    "kl": ("lists", {"teacher": "toy"}),
}


def test_every_loss_is_tried():
    assert RUNS.keys() == RECIPES.keys()
    functions = {name for name in losses.__all__ if name.startswith("nested_")}
    assert {recipe.function for recipe in RECIPES.values()} == functions


@pytest.mark.parametrize("name", RUNS)
def test_every_loss_trains_and_logs_every_width(config, row_files, name):
    kind, options = RUNS[name]
    seen = []
    # The last of 200 rows are a batch of 2, which may hold one score twice.
    made = config(pairs=row_files[kind], loss=name, batch_size=22, epochs=6, save_steps=None, **options)
    model = train(made, report=seen.append)
    logged = [step for step in seen if step.losses]
    assert all(sorted(step.losses) == WIDTHS for step in logged)
    assert {step.data for step in logged} == ({"float32", "binary"} if name == "quantised_info_nce" else {None})
    first, last = (np.mean(list(step.losses.values())) for step in (logged[0], logged[-1]))
    assert np.isfinite(last)
    assert last < first or name == "distill"
    assert model.card.training["config"]["loss"] == name
    assert name.replace("_", " ") in (made.out / "README.md").read_text().replace("_", " ")
    learned = model.card.training.get("learned", {})
    for values in learned.values():
        assert set(values) == {"info_nce": {"temperature"}, "sigmoid": {"scale", "bias"}}[name]
    assert bool(learned) == (name in ("info_nce", "sigmoid"))


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_its_classes_are_kept_and_classify(config, row_files, tied):
    rows = [json.loads(line) for line in row_files["labelled"].read_text().splitlines()]
    made = config(
        pairs=row_files["labelled"], loss="cross_entropy", loss_args={"tied": tied}, epochs=20, head_learning_rate=0.05
    )
    model = train(made)
    head, classes = load_head(made.out)
    assert classes == ["games", "libs", "net"]
    logits = head(torch.from_numpy(model.encoder.vectors([row["text"] for row in rows], 64, False)))
    expected = torch.tensor([classes.index(row["label"]) for row in rows])
    assert logits.shape == (3, 120, 3)
    for width, each in zip(WIDTHS, logits, strict=True):
        assert (each.argmax(1) == expected).float().mean() > 0.9, width
    (made.out / "head.safetensors").write_bytes(b"1234567890")
    with pytest.raises(DamagedError, match=r"head\.safetensors cannot be read"):
        load_head(made.out)


def test_classes_that_are_numbers_are_in_the_order_of_numbers(config, tmp_path):
    rows = tmp_path / "numbers.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {n % 11} of {n}", "label": n % 11}) + "\n" for n in range(44)))
    made = config(pairs=rows, loss="cross_entropy", max_steps=2)
    train(made)
    assert load_head(made.out)[1] == [str(n) for n in range(11)]


def test_no_head(trained, config, row_files):
    with pytest.raises(InputError, match="holds no head; train with loss cross_entropy"):
        load_head(trained)
    sets = [DataConfig(path=row_files["labelled"], loss="cross_entropy", name=name) for name in ("one", "two")]
    made = config(pairs=None, data=sets, max_steps=2)
    train(made)
    assert load_head(made.out, "two")[1] == ["games", "libs", "net"]
    with pytest.raises(InputError, match="holds heads of one, two; name one of them, got None"):
        load_head(made.out)


def test_head_that_is_resumed_ends_with_the_same_bits(config, row_files, interrupted):
    options = {"pairs": row_files["labelled"], "loss": "cross_entropy", "epochs": 4}
    made = interrupted(**options)
    train(made, resume=True)
    train(config("whole", **options))
    for file in ("model.safetensors", "head.safetensors"):
        assert (made.out / file).read_bytes() == (config("whole").out / file).read_bytes()


def test_a_teacher_in_mixed_precision_says_nearly_the_same(row_files, small_bert):
    (rows,) = read_sets([DataConfig(path=row_files["texts"], loss="distill", teacher=str(small_bert))])
    exact, mixed = Teacher(rows).vectors, Teacher(rows, bfloat16=True).vectors
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0.02)
    assert torch.nn.functional.cosine_similarity(mixed, exact).min() > 0.999


def test_teacher_of_vectors_is_a_teacher_by_name(config, row_files, tmp_path):
    texts = [json.loads(line)["text"] for line in row_files["texts"].read_text().splitlines()]
    np.save(tmp_path / "teacher.npy", mt.load("toy").encoder.vectors(texts, 64, False))
    options = {"pairs": row_files["texts"], "loss": "distill", "static": StaticConfig(width=64, vocabulary=500)}
    for name, teacher in (("model", "toy"), ("vectors", str(tmp_path / "teacher.npy"))):
        train(config(name, teacher=teacher, **options))
    one, two = (config(name).out / "model.safetensors" for name in ("model", "vectors"))
    assert one.read_bytes() == two.read_bytes()
    np.save(tmp_path / "short.npy", np.ones((3, 64), np.float32))
    with pytest.raises(InputError, match=r"short\.npy has 3 vectors, but .* has 200 rows of 1 texts"):
        train(config("short", teacher=str(tmp_path / "short.npy"), **options))


def test_several_data_sets_each_with_its_loss(config, row_files):
    sets = [
        DataConfig(path=row_files["pairs"]),
        DataConfig(path=row_files["scored"], loss="cosent", weight=0.5, name="sts"),
        DataConfig(path=row_files["labelled"], loss="supcon"),
    ]
    seen = []
    model = train(config(pairs=None, data=sets), report=seen.append)
    assert [s.step for s in seen if not s.losses and not s.scores] == list(range(1, 27))
    logged = [s for s in seen if s.losses]
    assert {s.data for s in logged} == {"pairs", "sts", "labelled"}
    assert all(sorted(s.losses) == WIDTHS for s in logged)
    assert {name: rows["rows"] for name, rows in model.card.training["data"].items()} == {
        "pairs": 200,
        "sts": 200,
        "labelled": 120,
    }
    seen.clear()
    train(config("even", pairs=None, data=sets, mixing="round_robin", epochs=1), report=seen.append)
    assert [s.step for s in seen if not s.losses and not s.scores] == list(range(1, 10)), "3 batches of each"


@pytest.mark.parametrize("mixing", ["proportional", "round_robin"])
def test_several_data_sets_resume_to_the_same_bits(config, row_files, interrupted, mixing):
    sets = [DataConfig(path=row_files["pairs"], weight=2.0), DataConfig(path=row_files["scored"], loss="angle")]
    options = {"pairs": None, "data": sets, "mixing": mixing, "epochs": 1, "no_duplicates": True, "sample_widths": 2}
    made = interrupted(**options)
    train(made, resume=True)
    train(config("whole", **options))
    one, two = (folder / "model.safetensors" for folder in (made.out, config("whole").out))
    assert one.read_bytes() == two.read_bytes()


def test_weight_multiplies_the_loss(config, row_files):
    """Adam does not see a constant factor, so a heavy data set alone is the light one; beside another it is not."""
    pairs, scored = row_files["pairs"], row_files["scored"]

    def table(out, weight, *more):
        return train(config(out, pairs=None, data=[DataConfig(path=pairs, weight=weight), *more])).encoder.table

    other = DataConfig(path=scored, loss="cosent")
    alone = np.abs(table("light", 1.0) - table("heavy", 100.0)).mean()
    beside = np.abs(table("light-2", 1.0, other) - table("heavy-2", 100.0, other)).mean()
    assert alone < 1e-3 < 1e-2 < beside


def test_sampled_widths_train_some_and_log_what_they_trained(config):
    seen = []
    train(config(sample_widths=2, epochs=4, save_steps=None), report=seen.append)
    assert sorted({width for step in seen for width in step.losses}) == WIDTHS
    train(config("all", sample_widths=3, epochs=1))
    train(config("plain", epochs=1))
    one, two = ((config(name).out / "model.safetensors").read_bytes() for name in ("all", "plain"))
    assert one == two, "keeping every width is not sampling"
    with pytest.raises(InputError, match=r"keep must be an integer in 2\.\.3"):
        train(config("many", sample_widths=4))


def refused(name, arguments, said):
    with pytest.raises(InputError, match=said) as caught:
        check_arguments(name, arguments)
    assert "\n" not in str(caught.value)


def test_arguments_are_read_off_the_signature():
    assert check_arguments("info_nce", {"temperature": "0.1"}) == {"temperature": 0.1}
    assert check_arguments("info_nce", {"temperature": [1, 2]}) == {"temperature": [1.0, 2.0]}
    assert check_arguments("info_nce", {"learn": "temperature"}) == {"learn": ("temperature",)}
    refused(
        "info_nce", {"warmth": 1}, "loss 'info_nce' has no argument 'warmth'; allowed: temperature, symmetric, learn"
    )
    refused("info_nce", {"temperature": "hot"}, "temperature should be a valid number.*got 'hot'")
    refused("info_nce", {"nesting": [8]}, "has no argument 'nesting'")
    refused("triplet", {"metric": "manhattan"}, "metric should be 'cosine' or 'euclidean', got 'manhattan'")
    refused("cross_entropy", {"tied": "maybe"}, "tied should be a valid boolean.*got 'maybe'")
    refused("sigmoid", {"learn": ["margin"]}, "loss 'sigmoid' cannot learn 'margin'; it can learn scale, bias")
    refused("hinge", {}, "unknown loss 'hinge'; use one of info_nce, ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"loss": "cosent", "temperature": 0.1}, "loss 'cosent' has no argument 'temperature'; allowed: scale, learn"),
        ({"loss": "cosent", "symmetric": True}, "has no argument 'symmetric'"),
        ({"temperature": 0.1, "loss_args": {"temperature": 0.1}}, "temperature is given twice"),
        ({"loss": "distill"}, "loss 'distill' needs a teacher"),
        ({"teacher": "toy"}, "loss 'info_nce' learns from no teacher; drop it"),
        ({"pairs": None}, "pairs: Field required, or data for several files"),
        ({"data": [{"path": "a.jsonl"}]}, "pairs is short for one data set"),
        ({"pairs": None, "data": [{"path": "a.jsonl"}], "loss": "cosent"}, "each data set names its own loss"),
        ({"pairs": None, "data": [{"path": "a.jsonl", "weight": 0}]}, "weight.*greater than 0"),
        ({"pairs": None, "data": [{"path": "a.jsonl", "name": "a b"}]}, "name"),
        ({"pairs": None, "data": [{"path": "a.jsonl", "loss_args": {"x": 1}}]}, "no argument 'x'"),
        ({"loss": "cosent", "no_duplicates": True}, "no_duplicates is for losses whose negatives are the rest of"),
        ({"patience": 2}, "patience needs a dev set"),
        ({"patience": 2, "dev": "d", "best": "last"}, "patience needs a dev set to measure on and a width"),
        ({"lora": 4}, "lora adapts a transformer; name one as base"),
        ({"mixing": "random"}, "mixing: .*'proportional' or 'round_robin'"),
    ],
)
def test_combinations_that_die_at_construction(tmp_path, options, said):
    with pytest.raises(InputError, match=said) as caught:
        TrainConfig(**{"pairs": "pairs.jsonl", "out": tmp_path / "model", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "pairs", "loss": "triplet"}, "takes exactly one negative a row, got 0"),
        ({"kind": "lists", "loss": "triplet"}, "takes exactly one negative a row, got 2"),
        ({"kind": "pairs", "loss": "kl", "teacher": "toy"}, "compares at least two candidates a row"),
        ({"kind": "pairs", "loss": "cross_entropy"}, "line 1: no column 'text'; it has 'anchor', 'positive'"),
        ({"kind": "texts", "loss": "cross_entropy"}, "line 1: column 'label' is missing; name the row's class"),
        ({"kind": "pairs", "loss": "cosent"}, "line 1: 'score' must be a number, got None"),
        (
            {"kind": "labelled", "loss": "supcon", "batch_size": 5},
            "two of each at a time; it needs an even batch_size of at least 4, got 5",
        ),
        ({"kind": "pairs", "mini_batch_size": 8}, "mini_batch_size saves activations, and a static encoder has none"),
        ({"kind": "pairs", "loss_args": {"temperature": [0.1, 0.2]}}, "temperature: 2 values for 3 widths"),
        ({"kind": "scored", "loss": "cosent", "loss_args": {"scale": -1, "learn": "scale"}}, "scale must be above 0"),
    ],
)
def test_rows_that_do_not_fit_the_loss(config, row_files, options, said):
    kind = options.pop("kind")
    with pytest.raises(InputError, match=said):
        train(config(pairs=row_files[kind], **options))
    assert not config().out.exists()


@pytest.mark.parametrize("name", ["train", "type", "forward", "keys"])
def test_any_name_of_a_pairs_file(name, config, pairs_file, tmp_path):
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(pairs_file.read_bytes())
    assert train(config(pairs=path, epochs=1, max_steps=1)).nesting.D == 32


def test_data_sets_of_one_name(config, row_files):
    same = [DataConfig(path=row_files["pairs"]), DataConfig(path=row_files["pairs"])]
    model = train(config(pairs=None, data=same, max_steps=2))
    assert list(model.card.training["data"]) == ["pairs", "pairs_2"]
    named = [one.model_copy(update={"name": "mine"}) for one in same]
    with pytest.raises(InputError, match="two data sets are named 'mine'"):
        train(config("named", pairs=None, data=named))
