import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

import matryo as mt
from matryo.core.errors import InputError, MissingExtraError
from matryo.core.records import ScoredPairs
from matryo.evaluation import Section


@pytest.fixture
def report(model, retrieval):
    return mt.evaluate(model, retrieval, widths=[4, 8, 20], codes=["int8", "binary"], resamples=50)


class Page(HTMLParser):
    """Collects tags, ids and references, and checks that tags close in order."""

    VOID = frozenset(["meta", "br", "link", "img", "path", "use", "rect", "circle", "line"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._look(attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._look(attributes)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def _look(self, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "action"):
                self.references.append(value)


def test_the_page_is_one_valid_file_that_fetches_nothing(report, tmp_path):
    section = Section(
        "Side by <side>", ("query", "answer"), [("<script>alert(1)</script>", "a & b")], "as <em>text</em>"
    )
    text = report.save(tmp_path / "report.html", extra=[section]).read_text()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert {r[1:] for r in page.references} <= set(page.ids)
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?https?:", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "as &lt;em&gt;text&lt;/em&gt;" in text
    assert page.tags.count("svg") == 3
    assert text.count('role="img"') == text.count("</desc>") == 3
    assert "prefers-color-scheme: dark" in text
    # In the page every colour of a chart is a variable, so that it turns with the scheme.
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}
    for row in report.select():
        assert f"{row.value:.4f}" in text


def test_the_page_says_how_to_repeat_it(model, retrieval, tmp_path):
    report = mt.evaluate(model, retrieval, widths=[8], seed=17, resamples=20, command="matryo eval m toy --seed 17")
    text = report.save(tmp_path / "x.html").read_text()
    for said in (
        "matryo eval m toy --seed 17",
        np.__version__,
        "40 queries",
        "80 documents",
        "20 resamples",
        "PCA: fitted on the 80 document vectors",
    ):
        assert said in text
    assert report.save(tmp_path / "y.html").read_text() == text


def test_hostile_names_stay_text(model, pairs, tmp_path):
    model.name = '<img src=x onerror="a$x_{$()">&'
    task = ScoredPairs("<b>$x_1$</b>", pairs.first, pairs.second, pairs.scores)
    report = mt.evaluate(model, task, widths=[8], resamples=10)
    page = Page(report.save(tmp_path / "x.html").read_text())
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert model.name in report.table()


def test_json_holds_everything_and_no_nan(report, tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    small = json.loads(report.to_json(), parse_constant=refuse)
    assert small["format"] == 1
    assert small["counts"] == {"queries": 40, "documents": 80, "judged pairs": 40}
    assert len(small["rows"]) == len(report.rows)
    assert "per_query" not in small
    whole = json.loads(report.save(tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert whole["items"][:2] == ["q0", "q1"]
    for row in whole["rows"]:
        assert np.mean(whole["per_query"][row["label"]][row["metric"]]) == pytest.approx(row["value"])


def test_the_table_shows_every_row(report, tmp_path, monkeypatch):
    text = report.table()
    assert "20 untrained" in text
    assert "words on toy (40 queries, 80 documents, 40 judged pairs)" in text
    assert "…" not in text
    for row in report.select():
        assert f"[{row.low:.4f}, {row.high:.4f}]" in text
    assert "MRR@10" in report.table("MRR@10")
    assert report.save(tmp_path / "x.txt").read_text() == text + "\n"
    monkeypatch.setitem(sys.modules, "rich", None)
    plain = report.table()
    assert plain.count("\n") >= len(report.select())
    assert "20 untrained" in plain


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_a_file_of_its_own(report, tmp_path, ending):
    path = report.figure(tmp_path / f"quality.{ending}")
    first = path.read_bytes()
    assert first[:4] == (b"\x89PNG" if ending == "png" else b"<?xm")
    assert report.figure(path).read_bytes() == first


def test_a_model_that_finds_nothing_has_no_share(retrieval, tmp_path):
    q = np.zeros((40, 8), np.float32)
    d = np.zeros((80, 8), np.float32)
    q[:, 0], d[:, 0] = 1, 1
    d[:40, 0] = -1
    report = mt.evaluate((q, d), retrieval, widths=[4], metric="MRR@1", baselines=(), resamples=10)
    assert np.isnan(report.rows[0].share)
    assert json.loads(report.to_json())["rows"][0]["share"] is None
    report.save(tmp_path / "x.html")
    assert "–" in report.table()


def test_bad_requests(report, tmp_path):
    with pytest.raises(InputError, match=r"saved as \.html, \.json or \.txt"):
        report.save(tmp_path / "x.pdf")
    with pytest.raises(InputError, match=r"saved as \.png or \.svg"):
        report.figure(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="was not recorded; use one of nDCG@10"):
        report.table("P@3")
    with pytest.raises(InputError, match="no row 'nobody 8'; labels look like"):
        report.paired("nobody 8", "words 8")
    assert "words" in repr(report)


def test_a_missing_package_names_the_extra(report, tmp_path, monkeypatch):
    for module in ("matryo.evaluation.page", "matryo.evaluation.charts"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'matryo\[eval\]'"):
        report.save(tmp_path / "x.html")
    with pytest.raises(MissingExtraError, match=r"matryo\[eval\]"):
        report.figure(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
