"""Model folders that are hostile, damaged or of another format."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import matryo as mt
from matryo.core.errors import DamagedError, FormatError, InputError, MatryoError

PLANTED = "open(__file__ + '.ran', 'w').close()\nclass Module:\n    pass\n"

AUDIT = """
import json, sys
seen = []
def watch(event, args):
    if event == "pickle.find_class" or (event == "import" and args[0].startswith("planted")):
        seen.append(f"{event} {args[0]}")
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
import matryo
from matryo.core.errors import InputError
found = {}
for folder in sys.argv[2:]:
    seen.clear()
    try:
        matryo.load(folder)
        error = None
    except InputError as refused:
        error = str(refused)
    found[folder] = {"error": error, "seen": list(seen), "torch": "torch" in sys.modules}
import pickle, planted_witness
pickle.loads(pickle.dumps(ValueError))
found["witness"] = list(seen)
print(json.dumps(found))
"""


class Payload:
    def __reduce__(self):
        return (eval, ("__import__('planted_pickle')",))


def edit(path: Path, change: Callable[[object], object]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def named(folder: Path, name: str, module: str) -> None:
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": module, "type": name}]))


@pytest.fixture
def hostile(trained, minilm, tmp_path):
    """name -> folder of a model that would run somebody's code, and what the refusal says."""
    made: dict[str, tuple[Path, str]] = {}

    def one(name: str, base: Path, said: str) -> Path:
        folder = shutil.copytree(base, tmp_path / name)
        made[name] = (folder, said)
        return folder

    for module in ("planted", "planted_pickle", "planted_witness"):
        (tmp_path / f"{module}.py").write_text(PLANTED)

    named(one("foreign", trained, "names the class 'planted.Module'"), "planted.Module", "")
    near = one("near", trained, "names the class 'sentence_transformersplanted.Module'")
    named(near, "sentence_transformersplanted.Module", "")
    remote = one("remote", minilm, "asks for remote code")
    edit(remote / "config.json", lambda c: c | {"auto_map": {"AutoModel": "planted.Module"}})
    shutil.copy(tmp_path / "planted.py", remote / "planted.py")
    pickled = one("pickled", trained, "pickled weights are never loaded")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    dense = one("dense", minilm, "pickled weights are never loaded")
    edit(dense / "modules.json", lambda m: [*m, {**m[-1], "idx": 3, "name": "3", "path": "3_Dense"}])
    (dense / "3_Dense").mkdir()
    (dense / "3_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    outside = one("outside", trained, "names a module outside its folder")
    edit(outside / "modules.json", lambda m: [{**m[0], "path": "../small"}])
    return tmp_path, made


def test_hostile_folders_are_refused_before_anything_of_theirs_runs(hostile, python):
    place, made = hostile
    ran = python("-c", AUDIT, place, *(folder for folder, _ in made.values()))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    for folder, said in made.values():
        answer = found[str(folder)]
        assert said in answer["error"]
        assert answer["seen"] == []
        assert not answer["torch"]
    # The hook itself works: it notices an import and an unpickling of ours.
    assert found["witness"][-2:] == ["import planted_witness", "pickle.find_class builtins"]
    assert {path.name for path in place.glob("*.ran")} == {"planted_witness.py.ran"}


def test_class_named_deeper_inside_is_refused_too(minilm, python, tmp_path):
    """A router names classes of its own, in a file that only sentence-transformers reads."""
    folder = shutil.copytree(minilm, tmp_path / "router")
    (tmp_path / "planted.py").write_text(PLANTED)
    named(folder, "sentence_transformers.base.modules.router.Router", "")
    types = {"query_0": "planted.Module"}
    config = {"types": types, "structure": {"query": ["query_0"]}, "parameters": {}}
    (folder / "router_config.json").write_text(json.dumps(config))
    (tmp_path / "planted_witness.py").write_text("")
    ran = python("-c", AUDIT, tmp_path, folder)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)[str(folder)]
    assert "planted.Module" in answer["error"]
    assert "import planted" not in answer["seen"]
    assert not (tmp_path / "planted.py.ran").exists()


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def test_other_format_version_is_a_format_error(copy):
    edit(copy / "matryo.json", lambda c: c | {"format": 2})
    with pytest.raises(FormatError, match="format 2; this release reads format 1"):
        mt.load(copy)


def test_other_order_of_steps_is_a_format_error(copy):
    edit(copy / "matryo.json", lambda c: c | {"steps": ["encode", "rotate"]})
    with pytest.raises(FormatError, match="asks for steps"):
        mt.load(copy)


DAMAGE = {
    "empty": b"",
    "not json": b"{",
    "not text": b"\xff\xfe\x00",
    "another shape": b"[1, 2]",
    "a number": b"7",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["matryo.json", "modules.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_json_is_a_typed_error(copy, name, damage):
    (copy / name).write_bytes(DAMAGE[damage])
    with pytest.raises((DamagedError, InputError)) as caught:
        mt.load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["nesting", "depths", "scores", "training", "steps"])
def test_card_without_a_key_or_with_a_wrong_kind_is_damaged(copy, key):
    whole = (copy / "matryo.json").read_text()
    edit(copy / "matryo.json", lambda c: {k: v for k, v in c.items() if k != key})
    with pytest.raises(DamagedError):
        mt.load(copy)
    (copy / "matryo.json").write_text(whole)
    if key != "training":
        edit(copy / "matryo.json", lambda c: c | {key: 5})
        with pytest.raises((DamagedError, FormatError)):
            mt.load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "matryo.safetensors"])
def test_truncated_tensors_are_damage_at_every_length(copy, name):
    whole = (copy / name).read_bytes()
    for length in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        (copy / name).write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            mt.load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "modules.json"])
def test_missing_file_is_a_typed_error(copy, name):
    (copy / name).unlink()
    with pytest.raises((DamagedError, InputError)):
        mt.load(copy)


def test_tokenizer_and_table_must_fit(copy):
    table = load_file(copy / "model.safetensors")["embedding.weight"]
    save_file({"embedding.weight": table[:-1].copy()}, copy / "model.safetensors")
    with pytest.raises(InputError, match="the table must be"):
        mt.load(copy)
    save_file({"other": table}, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"no 'embedding\.weight'"):
        mt.load(copy)


def test_nan_in_the_table_is_named_by_the_text_it_reaches(copy):
    table = load_file(copy / "model.safetensors")["embedding.weight"]
    token = mt.load(copy).encoder.tokenizer.encode("mail", add_special_tokens=False).ids[0]
    table[token, 3] = np.nan
    save_file({"embedding.weight": table}, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"NaN or Inf for inputs\[1\]"):
        mt.load(copy).encode(["zoo", "mail"])


@pytest.mark.parametrize(
    ("declared", "widths"),
    [([8, 16, 32], (8, 16, 32)), ([16, 8], (8, 16, 32)), ([8, 64], (8, 32)), ([32], (32,)), ([], None), ("8", None)],
)
def test_widths_a_foreign_folder_declares(copy, declared, widths):
    """Many leave out the full width; one folder may even declare more than there is."""
    (copy / "matryo.json").unlink()
    (copy / "config.json").write_text(json.dumps({"matryoshka_dimensions": declared}))
    nesting = mt.load(copy).nesting
    assert (nesting and nesting.widths) == widths


@pytest.mark.parametrize("declared", [[8, "a"], [0, 32], [True, 32], [None]])
def test_declared_widths_that_are_not_widths_are_a_typed_error(copy, declared):
    (copy / "matryo.json").unlink()
    (copy / "config.json").write_text(json.dumps({"matryoshka_dimensions": declared}))
    with pytest.raises(MatryoError):
        mt.load(copy)
