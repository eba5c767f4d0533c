# Every target installs what it needs into $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# Kernels are compiled with the pinned Triton and with the one of the GPU target.
OLDER_TRITON = $(VENV)/triton-3.6
ifeq ($(shell uname -s),Linux)
COMPILED = $(OLDER_TRITON)/.installed
endif

.PHONY: train test lint bench results clean

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDER_TRITON)/.installed: $(VENV)/.installed
	$(RUN) -m pip install --quiet --no-deps --target $(OLDER_TRITON) triton==3.6.0
	touch $@

train: $(VENV)/.installed
	$(RUN) -m dragkit.train --phase 2

test: $(VENV)/.installed $(COMPILED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q -n auto
ifdef COMPILED
	TRITON_INTERPRET=1 $(RUN) -m pytest -q -n auto -m triton tests/ops
	$(RUN) -m dragkit_kernels.aot --triton-path $(OLDER_TRITON)
endif

lint: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.installed
	$(RUN) -m pytest bench --benchmark-only -q

results: $(VENV)/.installed
	$(RUN) -m dragkit.experiment experiments/few_labels.yaml --output docs/few_labels.md
	$(RUN) -m dragkit.experiment experiments/arms.yaml --output docs/arms.md

clean:
	rm -rf $(VENV) build dist *.egg-info
