# From a bare checkout with python3, pip and make (cc for the fast kernel): `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# An install without the C kernel succeeds too, and pip does not show why: which one there is now.
TELL := $(BIN)/python -c "from gradclip.kernels import cpu; print('kernel:', cpu.kernel(), cpu.why_numpy() or '')"
SOURCES := pyproject.toml setup.py $(wildcard src/gradclip/kernels/cpu/*.c src/gradclip/kernels/cpu/*.h)

.PHONY: help demo test test-quick test-long matrix lint bench docs wheels clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo ## train a small network with and without clipping; draws demo.png
	$(BIN)/gradclip demo --out demo.png

test: .venv/test ## every property, with every framework: some minutes
	GRADCLIP_REQUIRE_ALL=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

test-quick: .venv/test ## the tests that together take under a minute
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not long"

test-long: .venv/test ## what `make test` leaves out: long counts, all mutations, many ranks
	GRADCLIP_REQUIRE_ALL=1 $(BIN)/python -m pytest -n auto --dist worksteal -m long

matrix: ## each framework's tests with its lowest and its newest version; CELL=torch-2.8 runs one
	$(PYTHON) tests/matrix.py $(CELL)

lint: .venv/test ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/test ## time gradclip against others; appends to bench/results.csv, draws docs/bench.png
	$(BIN)/gradclip bench --csv bench/results.csv
	$(BIN)/python bench/draw.py

docs: .venv/docs ## build the site in docs/_build/html, of which all links but external ones are checked
	$(BIN)/sphinx-build --builder html --fail-on-warning --keep-going --nitpicky --fresh-env --quiet docs docs/_build/html
	$(BIN)/python docs/check.py docs/_build/html

wheels: .venv/wheels ## build the wheels of all platforms and the sdist into dist/, and check them
	$(BIN)/python wheels/build.py

clean: ## remove what make has made
	rm -rf .venv .matrix build dist docs/_build src/*.egg-info src/gradclip/kernels/cpu/*.so demo.png jax_digits.png spikes.png torch_characters.png torch_sharded.png

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[cli]'
	@$(TELL)
	touch $@

# This version of torch, first and alone, is a CPU build; what follows then keeps it.
.venv/test: .venv/bin/python $(SOURCES)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[test]'
	@$(TELL)
	touch $@ .venv/demo

# The reference imports the package with every framework.
.venv/docs: .venv/test
	$(PIP) --editable '.[docs]'
	touch $@

.venv/wheels: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[wheels]'
	touch $@
