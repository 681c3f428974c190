# The README's two commands are `make train` and `make test`; each sets up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := test
ARGS ?=

.PHONY: setup train test test-slow lint wheel docs format test-oracle bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "torsion needs Python 3.11 to 3.13 and $(PYTHON) is %d.%d; use make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

train: setup
	$(BIN)/torsion train configs/quickstart.gin $(ARGS)

# A file's tests run in one process, which makes its fixtures and compiled programs once.
# The pages are tested in Chromium; where there is none, their tests say how to get it.
# Those that start pods or train for long, marked slow, are run by test-slow.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m 'not slow and not oracle' $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Compares live with torch and transformers, in an environment of their own.
test-oracle: .venv-oracle/.ready
	.venv-oracle/bin/pytest -m oracle tests/oracle $(ARGS)

.venv-oracle/.ready: pyproject.toml constraints.txt constraints-oracle.txt
	$(PYTHON) -m venv .venv-oracle
	.venv-oracle/bin/pip install --quiet --disable-pip-version-check -c constraints-oracle.txt torch
	.venv-oracle/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-oracle.txt -e '.[test,oracle]'
	@touch $@

wheel: setup
	rm -rf dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

# MkDocs reads the sources and imports none of them, so its environment holds nothing else.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "the documentation is in build/site/index.html"

.venv-docs/.ready: constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

bench: setup
	$(BIN)/python tests/bench/step.py
	$(BIN)/python tests/bench/trainer.py

clean:
	rm -rf .venv .venv-oracle .venv-docs .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
