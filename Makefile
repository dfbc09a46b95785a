# SPDX-License-Identifier: Apache-2.0
# Every target works on a machine that has make and Python 3.10 or newer (with venv), and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests at a time, each on one thread. A file stays in one process: its fixtures are made once.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile
DEMO := outputs/demo
MINUTES ?= 30

.PHONY: help env demo test test-slow test-browser fuzz style quality build clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       segment a photo with the checkpoint that ships, write $(DEMO)/overlay.png"
	@echo "make test       the default tests"
	@echo "make test-slow  the tests that take a minute or more each"
	@echo "make test-browser  the demo in Chromium (skipped without one), screenshots in outputs/space"
	@echo "make fuzz       generated inputs, others each time, for MINUTES=30"
	@echo "make style      format and fix what ruff can fix"
	@echo "make quality    check style, lint and the rules of transformers for model files; changes nothing"
	@echo "make build      wheel and source distribution in dist/"
	@echo "make clean      remove what the other targets made, the environment too"

env: $(READY)

$(READY): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@echo "Making $(VENV) with the pinned versions in constraints.txt (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
	@touch $@

# The photo is by Rachel Michetti (CC0); scikit-image ships it in its wheel. Boxes: cup, coffee, spoon.
demo: $(READY)
	@photo=$$($(BIN)/python -c 'import os, skimage.data; print(os.path.join(skimage.data.data_dir, "coffee.png"))') \
		&& $(BIN)/efficientsam segment "$$photo" -o $(DEMO) \
			--box 173,17,410,305 --box 205,96,368,193 --box 325,237,410,327
	@test -s $(DEMO)/overlay.png
	@echo "The picture is $(CURDIR)/$(DEMO)/overlay.png"

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(READY)
	HYPOTHESIS_PROFILE=slow $(BIN)/python -m pytest $(PARALLEL) -m "slow or property"

# Ends with the first failure, or with the first round that is over after MINUTES.
fuzz: $(READY)
	@end=$$(( $$(date +%s) + 60 * $(MINUTES) )); rounds=0; \
	while [ $$(date +%s) -lt $$end ]; do \
		HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest $(PARALLEL) -q -m property || exit 1; \
		rounds=$$((rounds + 1)); \
	done; \
	echo "$$rounds rounds of 2,000 examples of each property: nothing found"

test-browser: $(READY)
	$(BIN)/python -m pytest -m browser

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/lint_models.py

build: $(READY)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
