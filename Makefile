# Every target installs what it needs into $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test lint bench results clean

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: $(VENV)/.installed
	$(RUN) -m dragkit.train --phase 2

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	TRITON_INTERPRET=1 $(RUN) -m pytest -q tests/triton_ops
	$(RUN) -m pytest -q

lint: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.installed
	$(RUN) -m pytest bench --benchmark-only -q

results: $(VENV)/.installed
	$(RUN) scripts/results.py

clean:
	rm -rf $(VENV) build dist *.egg-info
