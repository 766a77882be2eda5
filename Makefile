PYTHON ?= python3
PROMPT ?= Explain photosynthesis in one sentence.
# As it was typed: neither make nor the shell looks into it.
PROMPT_TEXT := $(value PROMPT)
export PROMPT_TEXT
VENV := .venv
BIN := $(VENV)/bin
PACKAGING := pyproject.toml constraints.txt .ci/venv
export PYTHON

# Tests start hundreds of processes: what one has compiled the others need not compile again.
test test-slow test-gpu: export PYTHONDONTWRITEBYTECODE =

.PHONY: help venv demo site test test-slow test-gpu test-package check clean

help:
	@echo "make demo          answer a prompt with a small language model (PROMPT='...')"
	@echo "make test          run the tests"
	@echo "make test-slow     run the tests that take minutes"
	@echo "make test-gpu      run the tests that need an NVIDIA GPU"
	@echo "make test-package  build a wheel, install it with [llm] into a new environment, use it"
	@echo "make check         lint, format, types, ceilings"
	@echo "make site          the docs as a site, in build/site"
	@echo "make venv          only set up $(VENV) for the above"
	@echo "make clean         remove what tests and builds left, but not $(VENV)"

venv: $(VENV)/.dev-installed

$(VENV)/.dev-installed: $(PACKAGING)
	@.ci/venv $(VENV) dev
	@touch $(VENV)/.llm-installed $@

$(VENV)/.llm-installed: $(PACKAGING)
	@.ci/venv $(VENV) llm
	@touch $@

$(VENV)/.docs-installed: $(PACKAGING)
	@.ci/venv $(VENV) docs
	@touch $@

site: $(VENV)/.docs-installed
	@$(BIN)/python .site/gather.py build/site-pages
	@$(BIN)/mkdocs build --strict --quiet -f .site/mkdocs.yml
	@echo build/site/index.html

demo: $(VENV)/.llm-installed
	@model="$$($(BIN)/python examples/make/fetch_model.py)" && \
	$(BIN)/layer-streamer generate "$$model" --prompt "$$PROMPT_TEXT"

test: venv
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: venv
	@$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: venv
	@$(BIN)/python -m pytest -m gpu

test-package:
	@.ci/clean-install "$(PYTHON)"

check: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python .ci/ceilings.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find layer_streamer tuner examples tests docs .ci -name __pycache__ -type d -prune -exec rm -rf {} +
