# `make report` is the whole kit in one command; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash
LOCK := requirements.lock

.PHONY: help setup report test check lint lab course site bench lock

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with the locked versions and the package

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ftkit needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": call make with PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

report: $(STAMP)  ## notebook 01 on real film reviews, as an HTML report
	@$(BIN)/ftkit run 01_full_fine_tuning --tier cpu --html --out runs

test: $(STAMP)  ## every test, the notebooks included, on two cores
	@status=0; \
	$(BIN)/python -m pytest -m "not alone" -n 2 --dist worksteal || status=1; \
	$(BIN)/python -m pytest -m alone || status=1; \
	exit $$status

check: lint  ## before each commit: lint, the form of the notebooks, the tests that train nothing
	@$(BIN)/python -m pytest -m "not alone and not trains" -n 2 --dist worksteal

lint: $(STAMP)  ## ruff over modules, tests, benchmarks and notebooks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lab: $(STAMP)  ## JupyterLab in notebooks/
	@$(BIN)/jupyter lab --notebook-dir notebooks

course: $(STAMP)  ## editions for students, instructors and nbgrader, in build/course
	@$(BIN)/ftkit course build build/course

site: $(STAMP)  ## lessons, glossary and reference as web pages, in build/site
	@$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/site-doctrees docs build/site
	@echo build/site/index.html

bench: $(STAMP)  ## every benchmark, one after the other; leave the machine idle
	@for script in benchmarks/{startup,fit_vs_trainer,feature_cache,prompt_scoring,continual,clip,lab_bench,kept_model,scale,classroom,notebooks}.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# torch brings the CUDA packages that fit it where pip finds its CUDA build: they are not ours to pin.
lock:  ## resolve requirements.lock anew from pyproject.toml (needs uv)
	@pins=$$(uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate --no-header \
	  --constraint <(echo torch==2.13.0) pyproject.toml) && grep -vE '^(nvidia-|cuda-|triton)' <<<"$$pins" > $(LOCK)
