# make quickstart: install, and train on real digits with two processes. make test: the whole test suite.
# make chaos: 200 faults thrown at small runs (half an hour).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test chaos lint fmt

quickstart: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 train.py

chaos: $(VENV)/installed
	$(BIN)/python tests/chaos/chaos.py

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .

fmt: $(VENV)/installed
	$(BIN)/ruff check --fix .

# The stamp is newer than setup.cfg once everything that setup.cfg names is installed.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "resnet_dist needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[report,test]'
	touch $@
