# make run: the explorer on the demo model at http://127.0.0.1:7860; make test: everything that must hold. Python 3.11 and a package index are all they assume.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: run test lint benchmark browser demo-run screenshots clean
.DELETE_ON_ERROR:

$(VENV)/.run: requirements.txt pyproject.toml
	command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11, or say make PYTHON=python3 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) install --editable '.[test]'
	touch $@

run: $(VENV)/.run
	$(BIN)/python app.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two processes of one thread each: torch's threads would wait for each other in busy loops.
test: lint browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

browser:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } \
		|| { echo "browser tests need Debian's chromium: install it as root with 'apt-get install chromium'" >&2; exit 1; }

benchmark: $(VENV)/.run
	$(BIN)/moesvd benchmark quality assets/demo-moe --windows 256 --seeds 0 1 2 --work out/benchmark --output out/benchmark
	$(BIN)/moesvd benchmark ablation assets/demo-moe --windows 256 --work out/benchmark --output out/benchmark
	$(BIN)/moesvd benchmark prediction assets/demo-moe --windows 256 --work out/benchmark --output out/benchmark
	$(BIN)/moesvd benchmark decompose --output out/benchmark
	$(BIN)/moesvd benchmark ratios assets/demo-moe --output out/benchmark

# The finished analysis that the explorer opens with.
demo-run: $(VENV)/.run
	$(BIN)/python assets/make_demo_run.py

# The pictures of the documentation, from the running explorer.
screenshots: $(VENV)/.test browser
	OMP_NUM_THREADS=1 $(BIN)/python tests/browser/screenshots.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build out
