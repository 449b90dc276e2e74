"""The verbs one after the other on tiny data, as a user would type them."""

import json
import re
import shutil

import pytest

from matryo.cli import run


@pytest.fixture
def cli(capsys):
    """Run a command line in this process: (exit status, standard output, standard error)."""

    def go(*arguments):
        status = run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return go


def test_from_pairs_to_answers(cli, python, pairs_file, dev_folder, tmp_path, debian_rows):
    yaml = tmp_path / "small.yaml"
    yaml.write_text("static: {vocabulary: 500}\nbatch_size: 40\nepochs: 2\n")
    model, index = tmp_path / "model", tmp_path / "docs.matryo"
    ran = python(
        "-m",
        "matryo",
        "train",
        pairs_file,
        "--config",
        yaml,
        "--dim",
        32,
        "--dev",
        dev_folder,
        "--out",
        model,
        "--json",
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["widths"] == [8, 16, 32]
    assert "step 10/10 loss 8:" in ran.stderr
    assert "dev 8:" in ran.stderr
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "\r" not in ran.stdout + ran.stderr

    page, out = tmp_path / "report.html", tmp_path / "report.json"
    line = ["eval", model, dev_folder, "--baselines", "random", "--resamples", 50, "--report", page, "--out", out]
    status, said, _ = cli(*line, "--json")
    assert status == 0
    assert json.loads(said) == json.loads(out.read_text())
    assert "<svg" in page.read_text()
    status, said, _ = cli("eval", model, dev_folder, "--widths", "8,32", "--baselines", "none", "--resamples", 50)
    assert status == 0
    assert "nDCG@10" in said

    status, said, _ = cli(
        "index", "build", dev_folder, "--model", model, "--out", index, "--metadata", "section", "--json"
    )
    assert status == 0
    assert json.loads(said)["items"] == 120

    question = " ".join(debian_rows[0]["positive"].split())
    status, said, err = cli("search", index, question, "-k", 3)
    assert status == 0
    assert said.splitlines()[1].split()[1] == "d0"
    assert len(said.splitlines()) == 4
    assert " ms for 1 queries" in err
    plan = "8:int8 keep 60 > 32:float32"
    line = ["search", index, question, "mail", "--plan", plan, "--where", '{"section": "libs"}', "--explain"]
    status, said, _ = cli(*line, "--json", "-k", 5)
    assert status == 0
    found = json.loads(said)
    assert [len(query["hits"]) for query in found["queries"]] == [5, 5]
    assert {hit["metadata"]["section"] for query in found["queries"] for hit in query["hits"]} == {"libs"}
    assert found["explanation"]
    status, _, err = cli(*line)
    assert status == 0
    assert re.search(r"^\S.*: [1-9]\d* considered, [1-9]\d* kept, \d+\.\d\d ms$", err, re.MULTILINE)

    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "new", "document": "a brand new package", "section": "net"}) + "\n")
    status, said, _ = cli("index", "add", index, more, "--metadata", "section", "--json")
    assert status == 0
    assert json.loads(said)["items"] == 121
    assert cli("index", "delete", index, "d0", "d1", "nobody") == (0, "deleted 2 of 3\n", "")
    assert cli("index", "compact", index) == (0, "dropped 2 dead rows\n", "")
    assert cli("index", "check", index)[0] == 0
    assert json.loads(cli("index", "stats", index, "--json")[1])["items"] == 119
    status, said, _ = cli("search", index, "a brand new package", "-k", 1)
    assert said.splitlines()[1].split()[1] == "new"

    moved = shutil.move(model, tmp_path / "moved")
    status, said, err = cli("search", index, "mail")
    assert status == 2
    assert err.count("\n") == 1
    assert cli("search", index, "mail", "--model", moved)[0] == 0


def test_index_of_ready_vectors(cli, dev_folder, tmp_path):
    import numpy as np

    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((120, 16)).astype(np.float32))
    index = tmp_path / "v.matryo"
    assert cli("index", "build", dev_folder, "--vectors", tmp_path / "v.npy", "--out", index)[0] == 0
    status, _, err = cli("search", index, "mail")
    assert status == 2
    assert "names no model" in err


def test_eval_trains_the_twin_and_the_models_of_one_width(cli, trained, dev_folder, tmp_path):
    model = shutil.copytree(trained, tmp_path / "model")
    line = ["eval", model, dev_folder, "--baselines", "none", "--resamples", 20, "--codes", "float32", "--json"]
    status, said, err = cli(*line, "--twin", "train", "--separate", "train", "--separate", "8=toy")
    assert (status, said) == (2, ""), "the model named for a width wins, and this one is of another width"
    assert "the separate model for width 8 gives vectors of 64 dimensions" in err
    assert sorted(path.name for path in (tmp_path / "model-alone").iterdir()) == ["16", "32"]
    assert "width 32 alone: step 10/10 dev 0." in err

    status, said, err = cli(*line, "--twin", "train", "--separate", "train", "--separate-out", tmp_path / "model-alone")
    assert status == 0, err
    assert "width 8 alone" in err
    assert "width 16 alone" not in err, "what is there is used again"
    rows = [(r["model"], r["width"], r["trained"]) for r in json.loads(said)["rows"] if r["metric"] == "nDCG@10"]
    assert rows[3:] == [
        *(("un-nested, cut", 8, False), ("un-nested, cut", 16, False), ("un-nested, cut", 32, True)),
        *(("trained at one width", width, True) for width in (8, 16, 32)),
    ]


def test_documents_without_text_are_left_out_and_counted(cli, tmp_path):
    rows = [{"_id": "a", "title": "", "text": ""}, {"_id": "b", "text": "mail reader"}, {"_id": "c", "text": "chess"}]
    file, index = tmp_path / "docs.jsonl", tmp_path / "docs.matryo"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, said, err = cli("index", "build", file, "--model", "toy", "--out", index, "--json")
    assert (status, json.loads(said)["items"], json.loads(said)["left_out"]) == (0, 2, ["a"])
    assert err == "left out, as they have neither title nor text: 1 documents (a)\n"
    # A document that has lost its text is not found by its old one.
    file.write_text(json.dumps({"_id": "b", "title": " ", "text": None}) + "\n" + json.dumps(rows[2]) + "\n")
    status, said, err = cli("index", "add", index, file)
    assert (status, err.count("(b)")) == (0, 1)
    assert "items: 1\n" in said
    assert cli("search", index, "mail reader")[1].count("mail reader") == 1

    # Ready vectors are found whatever the text.
    import numpy as np

    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(tmp_path / "v.npy", np.eye(3, 16, dtype=np.float32))
    status, said, err = cli(
        "index", "build", file, "--vectors", tmp_path / "v.npy", "--out", tmp_path / "v.matryo", "--json"
    )
    assert (status, json.loads(said)["items"], json.loads(said)["left_out"], err) == (0, 3, [], "")


def test_doctor(cli):
    status, said, _ = cli("doctor")
    assert status == 0
    assert said.startswith("matryo ")
    found = json.loads(cli("doctor", "--json")[1])
    assert {"matryo", "python", "cores", "extras", "threads"} <= set(found)
    assert found["extras"]["base"]["numpy"]


def test_no_arguments_shows_the_help(python):
    ran = python("-m", "matryo")
    assert ran.returncode == 2
    assert "Commands:" in ran.stderr.splitlines()


def test_reader_that_goes_away_is_no_error(python, tmp_path):
    import subprocess
    import sys

    ran = subprocess.run(
        f"{sys.executable} -m matryo doctor --json | head -c 1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "{"
    assert "Traceback" not in ran.stderr


def test_an_index_is_calibrated_from_vectors_texts_or_its_own_items(cli, dev_folder, tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    np.save(tmp_path / "v.npy", rng.standard_normal((120, 16)).astype(np.float32))
    np.save(tmp_path / "q.npy", rng.standard_normal((90, 16)).astype(np.float32))
    index = tmp_path / "v.matryo"
    plan = "8:binary keep 60 > 16:float32"
    assert cli("index", "build", dev_folder, "--vectors", tmp_path / "v.npy", "--out", index, "--plan", plan)[0] == 0
    line = ["index", "calibrate", index, "--recall", 0.8, "--confidence", 0.9]
    status, said, _ = cli(*line, "--queries", tmp_path / "q.npy", "--json")
    assert status == 0
    promise = json.loads(said)
    assert (promise["queries"], promise["k"], promise["items"], promise["source"]) == (90, 10, 120, "queries")
    assert json.loads(cli("index", "stats", index, "--json")[1])["promise"] == promise
    status, said, _ = cli(*line)
    assert status == 0
    assert "from 120 of its own items as queries on 120 items" in said
    status, _, err = cli("index", "calibrate", index, "--queries", tmp_path / "q.npy", "--recall", 0.999)
    assert status == 2
    assert "give at least" in err
    status, _, err = cli("index", "calibrate", index, "--queries", dev_folder / "queries.jsonl")
    assert status == 2
    assert "names no model" in err


def test_a_plan_is_measured_written_and_built_from(cli, tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    np.save(tmp_path / "v.npy", (rng.standard_normal((600, 16)) * np.arange(1, 17) ** -0.7).astype(np.float32))
    np.save(tmp_path / "q.npy", (rng.standard_normal((200, 16)) * np.arange(1, 17) ** -0.7).astype(np.float32))
    out, page = tmp_path / "plan.yaml", tmp_path / "page.html"
    line = ["plan", tmp_path / "v.npy", tmp_path / "q.npy", "--recall", 0.8, "--widths", "8", "--budget", "1h"]
    status, said, _ = cli(*line, "--items", "1k", "--out", out, "--report", page, "--json")
    assert status == 0
    found = json.loads(said)
    assert out.read_text().splitlines()[1] == f'plan: "{found["best"]["planned"]}"'
    assert "<svg" in page.read_text()
    index = tmp_path / "v.matryo"
    assert cli("index", "build", tmp_path / "v.npy", "--out", index, "--plan", out)[0] == 0
    assert json.loads(cli("index", "stats", index, "--json")[1])["plan"] == found["best"]["planned"]
    status, said, err = cli(*line, "--latency", "1us")
    assert status == 2
    assert "no plan is expected within 0.001 ms" in err
    assert "recall" in said
    out.write_text("nothing: here\n")
    status, _, err = cli("index", "build", tmp_path / "v.npy", "--out", tmp_path / "w", "--plan", out)
    assert (status, (tmp_path / "w").exists()) == (2, False)
    assert "holds no 'plan: ...'" in err
    assert cli(*line, "--out", tmp_path / "plan.txt")[0] == 2
