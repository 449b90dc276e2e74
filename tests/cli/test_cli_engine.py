"""The commands that take an index's folder take the URL of an engine as well."""

import json

from matryo import Index, cli


def run(capsys, *words):
    code = cli.run([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_build_search_and_keep_an_index_in_an_engine(postgres, tmp_path, capsys):
    url = postgres.url("docs")
    rows = [
        {"_id": f"d{i}", "text": f"text about {word}", "shelf": word} for i, word in enumerate(["chess", "tea"] * 30)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = "16:float16 hnsw(M=8,ef=40) keep 40 > 64:float32"
    build = ("index", "build", tmp_path / "corpus.jsonl", "--model", "toy", "--out", url)
    build += ("--metadata", "shelf", "--plan", plan)
    code, _, err = run(capsys, *build)
    assert code == 0, err
    code, _, err = run(capsys, *build)
    assert (code, "already holds an index" in err) == (2, True)
    assert run(capsys, *build, "--resume")[0] == 0
    with Index.open(url, read_only=True) as index:
        assert any(name.endswith("m8") for name in index.stats()["index_bytes"]), "the plan's graph is built"
    code, out, err = run(capsys, "search", url, "chess", "-k", 3, "--where", '{"shelf": "tea"}', "--json")
    assert code == 0, err
    hits = json.loads(out)["queries"][0]["hits"]
    assert [hit["metadata"]["shelf"] for hit in hits] == ["tea"] * 3
    assert run(capsys, "index", "delete", url, "d1")[0] == 0
    code, out, _ = run(capsys, "index", "stats", url)
    assert code == 0
    assert "items: 59" in out
    assert "in the engine" in out
    assert run(capsys, "index", "check", url)[0] == 0
    assert run(capsys, "index", "compact", url)[0] == 0


def test_build_search_and_keep_an_index_in_qdrant(tmp_path, capsys):
    url = f"qdrant+edge://{tmp_path}/docs"
    rows = [{"_id": f"d{i}", "text": f"text about {word}", "on": word} for i, word in enumerate(["chess", "tea"] * 30)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build = ("index", "build", tmp_path / "corpus.jsonl", "--model", "toy", "--out", url, "--metadata", "on")
    build += ("--plan", "16:int8 hnsw(M=8,ef=40) keep 40 > 64:float32")
    code, _, err = run(capsys, *build)
    assert code == 0, err
    code, _, err = run(capsys, *build)
    assert (code, "already holds an index" in err) == (2, True)
    assert run(capsys, *build, "--resume")[0] == 0
    code, _, err = run(capsys, *build, "--resume", "--store", "float16")
    assert (code, "was begun with store float32, not float16" in err) == (2, True)
    code, out, err = run(capsys, "search", url, "chess", "-k", 3, "--where", '{"on": "tea"}', "--json")
    assert code == 0, err
    assert [hit["metadata"]["on"] for hit in json.loads(out)["queries"][0]["hits"]] == ["tea"] * 3
    code, _, err = run(capsys, "search", url, "chess", "--plan", "8:binary keep 9 > 64:float32")
    assert (code, "index.prepare(" in err) == (2, True)
    assert run(capsys, "index", "delete", url, "d1")[0] == 0
    code, out, _ = run(capsys, "index", "stats", url)
    assert (code, "items: 59" in out, "in the engine" in out) == (0, True, True)
    assert run(capsys, "index", "check", url)[0] == 0
    assert run(capsys, "index", "compact", url)[0] == 0
