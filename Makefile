# make demo: a whole run on rendered parts.  make test: the tests.  Both set up .venv on first use.
# make docs: the documentation site.  CONTRIBUTING.md has the other targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# Hundreds of tests run kizu in a process of its own: without bytecode each would compile all of it again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(or $(WORKERS),3) --dist loadfile --no-loadscope-reorder
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
NOTEBOOKS := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONWARNINGS=ignore:IProgress $(BIN)/python -m nbconvert --to notebook --execute

.PHONY: demo test test-all test-oldest test-newest coverage lint format bench docs docs-serve notebooks clean

demo: $(READY)
	$(BIN)/kizu demo

test: $(READY)
	$(PYTEST)

test-all: $(DOCS_READY) lint
	$(PYTEST) -m ""

# The lowest versions that pyproject.toml promises, and the newest that there are, each in an environment of its own.
test-oldest: RESOLUTION := lowest-direct
test-oldest: WARNINGS := --override-ini filterwarnings=default
test-newest: RESOLUTION := highest
test-oldest test-newest: test-%: $(READY)
	$(BIN)/uv venv --quiet --seed --allow-existing --python $(BIN)/python .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --upgrade --resolution $(RESOLUTION) --editable '.[train,dev]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --numprocesses $(or $(WORKERS),3) --dist loadfile --no-loadscope-reorder $(WARNINGS) $(TESTS)

coverage: $(READY)
	$(PYTEST) --cov --cov-report=term --cov-report=html:.coverage-html

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/accuracy.py --quick

docs: $(DOCS_READY)
	$(MKDOCS) build --strict
	@echo "The site is in site/; make docs-serve shows it, with its search."

docs-serve: $(DOCS_READY)
	$(MKDOCS) serve

notebooks: $(DOCS_READY)
	$(NOTEBOOKS) --inplace examples/*.ipynb

clean:
	rm -rf .venv .venv-oldest .venv-newest .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* demo results site

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kizu needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[train,dev]'
	touch $(READY)

$(DOCS_READY): $(READY)
	$(INSTALL) '.[train,dev,docs]'
	touch $(DOCS_READY)
