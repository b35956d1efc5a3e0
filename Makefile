# make run    the main job on the built-in images (sets up .venv first)
# make test   lint, types, tests (sets up .venv first)
# pip heeds the environment: with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu it takes torch's CPU build.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test

run: $(READY)
	$(BIN)/python -m compress recipe=shift_quant

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -x -q -n auto

# Once, and again when what is to be installed has changed. An environment that was left half made is made anew.
$(READY): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,openvino]'
	touch $@
