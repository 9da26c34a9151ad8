# make demo — set everything up and run the whole line;  make test — set everything up and pass the tests.
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   where torch comes from (CPU wheels; …/cu130 for CUDA)
#   ARGS="--exit"                                      passed on to `tinyvlm demo`
#   PYTHON=python3.12                                  which Python (3.11–3.13) makes the environment
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH_INDEX ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint types unit weights clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "TinyVLM wants Python 3.11 to 3.13, this is %d.%d; set PYTHON=" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray,demo,dev]'
	touch $@

demo: $(READY)
	$(BIN)/tinyvlm demo $(ARGS)

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest $(ARGS)

weights: $(READY)
	$(BIN)/python -m tinyvlm.toy.train_weights --out tinyvlm/toy/weights

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
