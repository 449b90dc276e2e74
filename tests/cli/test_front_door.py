"""The public names, and what merely looking at the package costs."""

import json

import pytest

import matryo

PUBLIC = {
    "AdaptiveClassifier",
    "AsyncClient",
    "Client",
    "Index",
    "Nesting",
    "Plan",
    "TrainConfig",
    "adapters",
    "evaluate",
    "load",
    "losses",
    "plan",
    "train",
    "truncate",
}
HEAVY = [
    "torch",
    "transformers",
    "sentence_transformers",
    "sklearn",
    "scipy",
    "matplotlib",
    "faiss",
    "pyarrow",
    "httpx2",
    "ray",
]
VERBS = [
    ["train"],
    ["embed"],
    ["mine"],
    ["eval"],
    ["plan"],
    ["search"],
    ["export"],
    ["serve"],
    ["key"],
    ["demo"],
    ["doctor"],
]
VERBS += [["index", verb] for verb in ("build", "add", "delete", "stats", "check", "compact", "calibrate")]

LOOK = """
import contextlib, io, json, sys
import matryo, matryo.cli
found = {}
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert matryo.cli.run([*line, "--help"]) == 0
    found[" ".join(line)] = said.getvalue()
print(json.dumps({"help": found, "modules": sorted(name for name in sys.modules if "." not in name)}))
"""


def test_front_door_names_are_those_documented():
    assert set(matryo.__all__) - {"__version__"} == PUBLIC
    assert set(dir(matryo)) == set(matryo.__all__)
    for name in matryo.__all__:
        assert getattr(matryo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = matryo.nothing


def test_import_and_help_are_light_and_every_verb_has_an_example(python):
    ran = python("-c", LOOK, json.dumps([[], ["index"], *VERBS]))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert not set(HEAVY) & set(found["modules"])
    for line in VERBS:
        assert f"Example: matryo {' '.join(line)}" in " ".join(found["help"][" ".join(line)].split())
