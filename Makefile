# Every target does its own set-up: a virtual environment in $(VENV), installed once and again when the
# requirements change. Nothing is installed outside it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Notebooks are rendered with their outputs here; in small, for a test of them, where SDEGEN_FAST is set.
RENDERED  := notebooks/$(if $(SDEGEN_FAST),fast,rendered)
NOTEBOOKS := $(patsubst notebooks/%.py,$(RENDERED)/%.html,$(wildcard notebooks/[0-9]*.py))
KERNEL    := $(VENV)/.ready-notebooks

.PHONY: help install demo notebooks picture test lint types check clean
.DEFAULT_GOAL := help

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing sdegen and what it needs into $(VENV) (once, a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[test,lint,metrics]'
	@touch $(READY)

install: $(READY) ## install into .venv

demo: $(READY) ## the main job on scikit-learn's digits: train, sample, score; writes runs/demo/report.html
	@$(BIN)/sdegen demo

notebooks: $(NOTEBOOKS) ## run the notebooks; writes notebooks/rendered/*.html (SDEGEN_FAST=1: notebooks/fast, in small)

$(KERNEL): $(READY)
	@echo "installing what runs notebooks ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[notebooks]'
	@touch $(KERNEL)

$(RENDERED)/%.html: notebooks/%.py $(KERNEL) $(wildcard notebooks/page/*) $(shell find sdegen solvers -name '*.py')
	@echo "$< ..."
	@mkdir -p $(RENDERED)
	@$(BIN)/jupytext --quiet --to ipynb --output $(RENDERED)/$*.ipynb $<
	@$(BIN)/jupyter-nbconvert --log-level ERROR --ExecutePreprocessor.startup_timeout=300 \
		--ExecutePreprocessor.extra_arguments=--log-level=ERROR --execute --to notebook --inplace $(RENDERED)/$*.ipynb
	@$(BIN)/jupyter-nbconvert --config notebooks/page/config.py --to html $(RENDERED)/$*.ipynb

test: $(READY) ## all tests and doctests
	@$(BIN)/python -m pytest -n auto

lint: $(READY) ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## pyright, strict on solvers
	@$(BIN)/pyright

picture: $(READY) ## the README's picture, drawn from the demo's run
	@$(BIN)/python -m sdegen.report runs/demo --picture docs/images/demo.png

check: lint types test ## lint, types and tests

clean: ## remove the environment, the runs and the rendered notebooks
	rm -rf $(VENV) runs notebooks/rendered notebooks/fast
