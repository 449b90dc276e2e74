"""The page in a real Chromium: typed in, slid, clicked, read by axe, watched for errors and foreign requests."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import matryo as mt
from matryo.classify.page import save_page
from matryo.core.prefix import truncate
from matryo.encoders.folder import fingerprint, read_card

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; install it with 'apt-get install -y chromium'")
SHOTS = Path(__file__).parents[2] / "runs" / "page"
"""Where screenshots are kept; git ignores it."""
QUERY = "puzzle game for the terminal"
PLAN = "16:binary keep 40 > 32:float32"
WATCH = "window.broken = []; addEventListener('securitypolicyviolation', (e) => broken.push(e.violatedDirective))"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def index(trained, debian_rows, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("browser") / "docs.matryo", mt.load(trained)
    texts = [row["positive"] for row in debian_rows]
    made_by = {"name": "small"} | fingerprint(str(trained))
    with mt.Index.create(folder, width=32, plan=PLAN, model=made_by) as index:
        index.upsert([f"d{n}" for n in range(len(texts))], model.encode(texts), texts, [{"section": "misc"}] * 300)
    return folder


@pytest.fixture(scope="module")
def found_plans(trained, debian_rows):
    """What the planner finds on these vectors, quickly."""
    model = mt.load(trained)
    rows = model.encode([row["positive"] for row in debian_rows])
    asked = model.encode([row["anchor"] for row in debian_rows[:100]])
    return mt.plan(rows, asked, k=3, recall=0.5, budget=3600, widths=[16])


@pytest.fixture(scope="module")
def url(serve, trained, index, found_plans, tmp_path_factory):
    plans = found_plans.save(tmp_path_factory.mktemp("plans") / "plans.json")
    return serve(trained, "--index", index, "--plans", plans, "--no-access-log").url


@pytest.fixture
def visit(browser):
    """`visit(url)`: a page that must end without a console error, a broken policy or a request beyond its origin."""
    opened, wrong = [], []

    def go(url, **options):
        origin = url.split("#")[0].rstrip("/")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.add_init_script(WATCH)
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(origin) else wrong.append(request.url))
        opened.append((context, page))
        page.goto(url)
        return page

    go.wrong = wrong
    yield go
    for context, page in opened:
        wrong += page.evaluate("window.broken ?? []")
        context.close()
    assert wrong == []


def searched(page, query=QUERY):
    page.fill("#query", query)
    page.wait_for_selector("#narrow li")
    return page


def expect(page, selector):
    """Retrying assertions of Playwright; `wait_for_function` would need eval, which the page's policy forbids."""
    from playwright.sync_api import expect

    return expect(page.locator(selector))


def ids(page, which):
    return page.eval_on_selector_all(f"#{which} li", "rows => rows.map((row) => row.dataset.id)")


def serious(browser, where, act=None, **options):
    """Serious and critical findings of axe. Its script is let past the page's policy, in a context of its own."""
    from axe_playwright_python.base import AXE_SCRIPT

    context = browser.new_context(bypass_csp=True, reduced_motion="reduce", **options)
    page = context.new_page()
    page.goto(where)
    if act is not None:
        act(page)
    page.evaluate(AXE_SCRIPT)
    found = page.evaluate("axe.run()")["violations"]
    context.close()
    return [
        (one["id"], one["nodes"][0]["target"], one["nodes"][0]["failureSummary"])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_typing_and_sliding_show_what_the_index_answers(visit, url, trained, index):
    page = searched(visit(url))
    with mt.Index.open(index, read_only=True) as opened:
        query = mt.load(trained).encode([QUERY])
        full = opened.search(query, k=50, width=32).ids[0]
        page.focus("#width")
        for key, width in (("Home", 1), ("PageUp", 8), ("ArrowRight", 9), ("End", 32), ("PageDown", 16)):
            page.keyboard.press(key)
            title = "Full width" if width == 32 else f"First {width} dimensions"
            expect(page, "#narrow-title").to_have_text(title)
            narrow = opened.search(query, k=50, width=width).ids[0]
            assert ids(page, "narrow") == narrow[:10]
            assert ids(page, "full") == full[:10]
            assert f"{width} of 32 dimensions" in page.get_attribute("#width", "aria-valuetext")
    marks = page.eval_on_selector_all("#narrow .mark", "marks => marks.map((mark) => mark.textContent)")
    for n, (one, mark) in enumerate(zip(narrow[:10], marks, strict=True)):
        before = full.index(one) if one in full else None
        if before is None or before >= 10:
            assert mark.startswith("+ new"), mark
        elif before == n:
            assert mark == "= same place"
        else:
            assert mark == (f"▲ {before - n} higher" if before > n else f"▼ {n - before} lower")
    same = len(set(narrow[:10]) & set(full[:10]))
    ways = page.inner_text("#ways")
    assert f"{same} of 10" in ways
    assert PLAN in ways
    cells = page.eval_on_selector_all("#ways td:nth-child(2)", "cells => cells.map((cell) => cell.textContent)")
    assert cells == ["64", "8", "128"]  # 16 bits lie in a word of 64
    expect(page, "#said").to_contain_text(f"{same} of the first 10 at 16")
    assert page.evaluate("performance.getEntriesByName('slide-to-result').length") >= 5
    page.fill("#query", "")
    page.wait_for_selector("#found", state="hidden")


def test_the_mouse_slides_and_the_lists_follow(visit, url):
    page = searched(visit(url))
    box = page.locator("#width").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    width = page.inner_text("#width-out")
    assert int(width) < 8
    expect(page, "#narrow-title").to_have_text(f"First {width} dimensions")
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.keyboard.press("PageUp")
    expect(page, "#narrow-title").to_have_text("First 8 dimensions")
    page.screenshot(path=SHOTS / "search.png", full_page=True)


def test_tabs_by_keyboard_quality_and_pairs(visit, url, trained, found_plans):
    page = visit(url, color_scheme="dark")
    page.wait_for_selector("#searching:not([hidden])")
    page.focus("#tab-search")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-quality"
    assert page.get_attribute("#tab-quality", "aria-selected") == "true"
    page.wait_for_selector("#quality svg")
    shown = page.inner_text("#quality")
    for score in read_card(trained).scores:
        assert f"{score['value']:.3f}" in shown
    for row in found_plans.frontier:
        assert str(row.planned) in shown
    page.screenshot(path=SHOTS / "quality-dark.png", full_page=True)
    page.keyboard.press("End")
    page.wait_for_selector("#pair-table td")
    assert page.url.endswith("#pairs")
    page.get_by_label("Pair 1, first text").fill("a game")
    page.get_by_label("Pair 1, second text").fill("library for images")
    a, b = mt.load(trained).encode(["a game", "library for images"])
    wanted = [f"{float(truncate(a, w) @ truncate(b, w)):.3f}" for w in (8, 16, 32)]
    expect(page, "#pair-table tbody td:nth-child(2)").to_have_text(wanted)
    page.click("#add-pair")
    assert page.evaluate("document.activeElement.ariaLabel") == "Pair 4, first text"
    page.get_by_label("Remove pair 4").click()
    assert page.locator(".pair").count() == 3
    page.screenshot(path=SHOTS / "pairs-dark.png", full_page=True)


def test_with_keys_it_asks_and_keeps_the_key_in_memory(visit, serve, trained, python, tmp_path):
    made = python("-m", "matryo", "key", tmp_path / "keys.json", "--name", "web").stdout.strip()
    page = visit(serve(trained, "--api-keys", tmp_path / "keys.json", "--no-access-log").url)
    page.wait_for_selector("#key:not([hidden])")
    page.fill("#key-text", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#alert:not([hidden])")
    page.fill("#key-text", made)
    page.keyboard.press("Enter")
    page.wait_for_selector("#no-index:not([hidden])")
    assert "matryo serve" in page.inner_text("#how-to")
    page.click("#tab-pairs")
    page.wait_for_selector("#pair-table td")
    page.click("#tab-quality")
    page.wait_for_selector("#quality svg")
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    refused = [said for said in visit.wrong if "401" not in said and "404" not in said]
    visit.wrong[:] = refused  # Chromium itself logs answers of 401 and 404


def test_a_model_with_depths_has_a_second_slider(visit, serve, two_depths, debian_rows, tmp_path):
    """What the page shows of two layers is what two layers find."""
    model = mt.load(two_depths, "cpu")
    texts = [row["positive"] for row in debian_rows[:100]]
    made_by = {"name": "depths"} | fingerprint(str(two_depths))
    with mt.Index.create(tmp_path / "docs.matryo", width=32, plan="32:float32", model=made_by) as index:
        index.upsert([f"d{n}" for n in range(100)], model.encode(texts))
        found = {d: index.search(model.encode([QUERY], depth=d), k=100) for d in (2, 4)}
    scores = {depth: dict(zip(hits.ids[0], hits.scores[0], strict=True)) for depth, hits in found.items()}

    def best(depth, keys) -> bool:
        """Whether these are the five best at a depth, in order; what differs by rounding may change places."""
        mine = [scores[depth][key] for key in keys[:5]]
        return len(mine) == 5 and np.allclose(mine, found[depth].scores[0][:5], atol=1e-5)

    assert not best(2, found[4].ids[0])
    one = serve(two_depths, "--index", tmp_path / "docs.matryo", "--no-access-log")
    page = searched(visit(one.url))

    def shown(depth) -> None:
        for _ in range(400):
            if best(depth, ids(page, "full")):
                return
            page.wait_for_timeout(50)
        raise AssertionError(ids(page, "full"))

    shown(4)
    page.focus("#depth")
    page.keyboard.press("ArrowLeft")
    shown(2)
    assert page.get_attribute("#depth", "aria-valuetext") == "2 layers of 4"
    one.stop()


def test_axe_finds_nothing_serious_on_the_page(browser, url):
    phone = {"viewport": {"width": 390, "height": 844}}
    assert serious(browser, url, searched) == []
    assert serious(browser, url, searched, color_scheme="dark", **phone) == []
    for tab in ("quality", "pairs"):
        for scheme in ("light", "dark"):
            wait = lambda page, tab=tab: page.wait_for_selector(f"#{tab} td")  # noqa: E731
            assert serious(browser, f"{url}/#{tab}", wait, color_scheme=scheme) == []


def cascade(path):
    """The page of a classifier of three noisy classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    vectors = (rng.standard_normal((3, 8))[labels] + rng.standard_normal((300, 8))).astype(np.float32)
    made = mt.AdaptiveClassifier.fit(vectors[:200], labels[:200], (vectors[200:], labels[200:]), widths=[2, 4, 8])
    seen = (vectors[200:], labels[200:])
    return save_page(path, made, made.measure(*seen), made.curve(*seen), made.alone(*seen), 100)


def test_axe_finds_nothing_serious_in_the_reports(browser, trained, dev_folder, found_plans, tmp_path):
    report = mt.evaluate(mt.load(trained), dev_folder, codes=["float32", "binary"], resamples=20)
    pages = {"plans": found_plans.save(tmp_path / "plans.html"), "report": report.save(tmp_path / "report.html")}
    pages["cascade"] = cascade(tmp_path / "cascade.html")
    for name, path in pages.items():
        where = path.as_uri()
        for scheme, width in (("light", 1280), ("dark", 390)):
            assert serious(browser, where, color_scheme=scheme, viewport={"width": width, "height": 800}) == [], name
