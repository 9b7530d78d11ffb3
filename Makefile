# smoltrain's tasks; `make` alone lists them. PYTHON and VENV can be set, and TORCH: further arguments of pip install,
# such as --index-url with the index of a CPU or CUDA build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train dpo demo sweep launch dashboard real tiny test torture lint bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.done ## make .venv and install everything; quick the second time

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[dev]" $(TORCH) -c constraints.txt
	@touch $@

train: setup ## SFT on the embedded model and data (ARGS="seed=1 …" adds overrides)
	$(BIN)/smoltrain $(ARGS)

dpo: setup ## DPO on the embedded model and data
	$(BIN)/smoltrain trainer=dpo $(ARGS)

demo: setup ## SFT, then DPO from that SFT run
	$(BIN)/smoltrain name=demo $(ARGS)
	$(BIN)/smoltrain name=demo trainer=dpo model.from_run=demo $(ARGS)

sweep: setup ## four runs: both trainers, two seeds
	$(BIN)/smoltrain -m trainer=sft,dpo seed=1,2 $(ARGS)

launch: setup ## choose interactively
	@$(BIN)/smoltrain launch

dashboard: setup ## the curves of all runs, in a browser
	@$(BIN)/smoltrain dashboard

DATA ?= ../shared/data
REAL := name=real data=local data.test_rows=50 evaluation.max_rows=0 threads=2 trainer.args.max_steps=100 \
	trainer.args.per_device_train_batch_size=2 trainer.args.per_device_eval_batch_size=4
real: setup ## 100 steps each on real rows: GSM8K, Alpaca, a preference set (DATA=folder)
	$(BIN)/smoltrain $(REAL) data.path=$(DATA)/gsm8k_train.jsonl $(ARGS)
	$(BIN)/smoltrain $(REAL) data.path=$(DATA)/alpaca_en_demo.json $(ARGS)
	$(BIN)/smoltrain $(REAL) data.path=$(DATA)/dpo_en_demo.json trainer=dpo $(ARGS)

tiny: setup ## make the embedded model again, from nothing (20 minutes on 2 cores)
	$(BIN)/python -m smoltrain.tiny.pretrain

test: setup ## the test suite
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal

torture: setup ## the long forms of the tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist worksteal -m torture

lint: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## measure; medians and spread
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/preparation.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/scaling.py

clean: ## remove what was built, keep the runs
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .ruff_cache .mypy_cache
