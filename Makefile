# The commands that people, hooks and CI run alike. Everything is installed into .venv with the versions of
# constraints.txt; nothing but Python 3.11+ and pip is needed before.

PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS ?= -q --disable-pip-version-check

.PHONY: setup demo test test-slow check clean

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: setup
	@$(BIN)/python demo/solar_cells.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv demo-data demo-run .mypy_cache .ruff_cache .pytest_cache
