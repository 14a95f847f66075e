# Every target does its own set-up: a virtual environment in $(VENV), installed once and again when the
# requirements change. Nothing is installed outside it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help install demo picture test lint types check clean
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

test: $(READY) ## all tests and doctests
	@$(BIN)/python -m pytest -n auto

lint: $(READY) ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## pyright, strict on solvers
	@$(BIN)/pyright

picture: $(READY) ## the README's picture, drawn from the demo's run
	@$(BIN)/python -m sdegen.report runs/demo --picture docs/images/demo.png

check: lint types test ## lint, types and tests

clean: ## remove the environment and the runs
	rm -rf $(VENV) runs
