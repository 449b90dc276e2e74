# Every target sets itself up: a virtual environment in .venv with pinned versions (constraints.txt).
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

setup: .venv/.done ## make .venv with everything pinned

demo: setup ## train, measure, index and search the bundled Debian descriptions; writes runs/demo/report.html
	$(BIN)/matryo demo --out runs/demo

browser: ## Chromium for the tests of the page, where apt-get is and may be used; they are skipped without
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y chromium; } || \
		echo "no chromium: 'apt-get install -y chromium' as root lets the tests of the page run"

test: setup browser ## the default tests, some minutes
	$(BIN)/python -m pytest

test-demo: setup ## the demo end to end, and the quality it promises; a minute or two
	$(BIN)/python -m pytest -m slow tests/test_demo.py

test-experiments: setup ## the scripts behind docs/results.md run, at a size that shows no more; two minutes
	$(BIN)/python -m pytest -m slow tests/test_experiments.py

test-slow: setup browser ## every test, the long ones too
	$(BIN)/python -m pytest -m 'slow or not slow'

test-milvus: setup ## the tests against a real Milvus, whose package it installs (58 MB); some minutes
	$(BIN)/pip install -q -c constraints.txt -e '.[milvus-server]'
	$(BIN)/python -m pytest -m 'slow or not slow' tests/engines/test_milvus.py tests/engines/test_milvus_server.py

check: setup ## lint, format, types, rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/help_pages.py --check

docs: setup ## write the generated command line pages again
	$(BIN)/python tools/help_pages.py

bench-smoke: setup ## every benchmark at a size that only shows it runs
	$(BIN)/python benchmarks/loss/run.py --smoke
	$(BIN)/python benchmarks/head/run.py --smoke
	$(BIN)/python benchmarks/train_static/run.py --smoke
	$(BIN)/python benchmarks/funnel/run.py --smoke
	$(BIN)/python benchmarks/evaluation/run.py --size smoke
	$(BIN)/python benchmarks/cached/run.py --smoke
	$(BIN)/python benchmarks/mining/run.py --smoke
	$(BIN)/python benchmarks/startup/run.py --smoke
	$(BIN)/python benchmarks/minilm/step.py --smoke
	$(BIN)/python benchmarks/minilm/lengths.py --smoke
	$(BIN)/python benchmarks/quantised/run.py --smoke
	$(BIN)/python benchmarks/search/run.py speed --smoke
	$(BIN)/python benchmarks/search/run.py rivals --smoke
	$(BIN)/python benchmarks/search/run.py growth --smoke
	$(BIN)/python benchmarks/search/run.py filters --smoke
	$(BIN)/python benchmarks/search/bandwidth.py --smoke
	$(BIN)/python benchmarks/search/size.py --smoke
	$(BIN)/python benchmarks/search/promise.py --smoke
	$(BIN)/python benchmarks/search/predict.py --smoke
	$(BIN)/python -W ignore benchmarks/engines/postgres.py --smoke
	$(BIN)/python benchmarks/engines/qdrant.py --smoke
	$(BIN)/python benchmarks/bulk/run.py --smoke
	$(BIN)/python benchmarks/images/throughput.py --steps 7
	$(BIN)/python benchmarks/serving/run.py --smoke
	$(BIN)/python benchmarks/serving/int8.py --smoke
	$(BIN)/python benchmarks/serving/page.py --smoke

bench: setup ## every benchmark at its full size; about half an hour on two cores
	$(BIN)/python benchmarks/loss/run.py
	$(BIN)/python benchmarks/head/run.py
	$(BIN)/python benchmarks/train_static/run.py
	$(BIN)/python benchmarks/funnel/run.py
	$(BIN)/python benchmarks/evaluation/run.py
	$(BIN)/python benchmarks/cached/run.py
	$(BIN)/python benchmarks/mining/run.py
	$(BIN)/python benchmarks/startup/run.py
	$(BIN)/python benchmarks/minilm/step.py
	$(BIN)/python benchmarks/minilm/lengths.py

.PHONY: help setup demo browser test test-demo test-slow test-milvus check docs bench bench-smoke test-experiments
