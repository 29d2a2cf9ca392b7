# make run: everything from nothing to the demo; make test: everything that must hold. Python 3.11 and a package index are all they assume.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: run test lint benchmark clean
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

# The main job on the demo model: calibrate, plan, factor, export, reload, measure.
run: $(VENV)/.run
	$(BIN)/moesvd compress assets/demo-moe --ratio 0.4 --output out/demo-40 --overwrite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

benchmark: $(VENV)/.run
	$(BIN)/moesvd benchmark quality
	$(BIN)/moesvd benchmark decompose

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build out
