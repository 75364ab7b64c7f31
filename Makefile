# make quickstart: install, and train on real digits with two processes.
# make test-fast: unit tests (two minutes). make test: the whole suite, as in CI.
# make test-long: what takes long: 200 faults, elastic agents, inductor on networks.
# make results: run what is missing of all studies. make results-page: write docs/results.md.
# make lint: format, style and types.
# make gpu: checks and figures on one GPU, in 8 minutes; PHOTOGRAPHS=DIR names a folder of real JPEG
# files, and PYTHON=python3 takes an environment that has torch and DALI already.
# make gpu-cifar10, gpu-tiny-imagenet, gpu-throughput: trainings and a table on one GPU; DATA=PLACE is
# the published archive, or a folder that `resnet-dist data` has written. PYTHON as above.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Three workers also on two cores, since much of a test is waiting. Each takes whole files, those of
# whole processes first.
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test-fast test test-long chaos results results-page lint fmt
.PHONY: gpu gpu-cifar10 gpu-tiny-imagenet gpu-throughput

quickstart: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 train.py

test-fast: $(VENV)/installed
	$(PYTEST) tests/*.py -m "not slow and not long"

test: $(VENV)/installed
	$(PYTEST)

test-long: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --requirement benchmarks/requirements.txt
	$(BIN)/python -m pytest -m long
	$(BIN)/python tests/chaos/chaos.py

chaos: $(VENV)/installed
	$(BIN)/python tests/chaos/chaos.py

# The studies on digits, and with DATA=FOLDER those on CIFAR-10, which lies in that folder.
STUDIES = $(wildcard configs/studies/*.yaml)
DIGITS = $(wildcard configs/studies/digits_*.yaml)
CIFAR = $(filter-out $(DIGITS),$(STUDIES))
STUDY = $(BIN)/resnet-dist study --collect docs/results

results: $(VENV)/installed
	$(STUDY) $(DIGITS)
	$(if $(DATA),$(STUDY) $(CIFAR) --set data.data_dir=$(DATA))

results-page: $(VENV)/installed
	$(STUDY) $(STUDIES) --page docs/results.md

REPORT = tests/gpu/report.py $(if $(PHOTOGRAPHS),--photographs $(PHOTOGRAPHS))
ifeq ($(origin PYTHON),file)
GPU_PYTHON = $(BIN)/python
gpu gpu-cifar10 gpu-tiny-imagenet gpu-throughput: $(VENV)/installed
else
GPU_PYTHON = $(PYTHON)
endif

gpu:
	$(GPU_PYTHON) $(REPORT)

# What is published is imported first, once. Class folders are used where they are.
IS_RAW_TINY = $(wildcard $(DATA)/val/val_annotations.txt)
IS_READY = $(if $(IS_RAW_TINY),,$(wildcard $(DATA)/train))
DATA_DIR = $(if $(IS_READY),$(DATA),runs/data/$@)

define IMPORT
$(if $(DATA),,$(error DATA names no data: see the top of the Makefile))
$(if $(IS_READY),,$(GPU_PYTHON) -m resnet_dist.cli data $(1) $(DATA) $(DATA_DIR))
endef

TRAIN = -m torch.distributed.run --standalone --nproc_per_node 1 train.py

gpu-cifar10:
	$(call IMPORT,import-cifar10)
	$(GPU_PYTHON) $(TRAIN) --config configs/gpu/cifar10_resnet20.yaml --data.data_dir $(DATA_DIR)

gpu-tiny-imagenet:
	$(call IMPORT,import-tiny-imagenet)
	$(GPU_PYTHON) $(TRAIN) --config configs/gpu/tiny_imagenet_resnet18.yaml --data.data_dir $(DATA_DIR)

gpu-throughput:
	$(GPU_PYTHON) -m resnet_dist.cli benchmark --config configs/gpu/throughput.yaml \
		--models resnet18,resnet50 --precisions bf16,fp16 --windows 3 --steps 20 --out runs/gpu_throughput

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

fmt: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is newer than setup.cfg once everything that setup.cfg names is installed.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "resnet_dist needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[report,test]'
	touch $@
