# From a bare checkout with python3, pip and make (cc for the fast kernel): `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# An install without the C kernel succeeds too, and pip does not show why: which one there is now.
TELL := $(BIN)/python -c "from gradclip.kernels import cpu; print('kernel:', cpu.kernel(), cpu.why_numpy() or '')"
SOURCES := pyproject.toml setup.py $(wildcard src/gradclip/kernels/cpu/*.c src/gradclip/kernels/cpu/*.h)

.PHONY: help demo test test-quick test-long lint bench wheels clean

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

lint: .venv/test ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/test ## time gradclip against others; appends to bench/results.csv, draws docs/bench.png
	$(BIN)/gradclip bench --csv bench/results.csv
	$(BIN)/python bench/draw.py

wheels: .venv/wheels ## build the wheels of all platforms and the sdist into dist/, and check them
	$(BIN)/python wheels/build.py

clean: ## remove what make has made
	rm -rf .venv build dist src/*.egg-info src/gradclip/kernels/cpu/*.so demo.png jax_digits.png spikes.png torch_characters.png torch_sharded.png

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

.venv/wheels: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[wheels]'
	touch $@
