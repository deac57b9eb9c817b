# Two commands from a bare clone with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A CPU build of torch suffices here, and pip takes the one that the constraints name.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow test-all gpu lint clean

demo: $(VENV)/.installed
	$(BIN)/genkit generate prompts/demo.txt -o runs/demo --num-images 2 --keep 1

# The quick choice of every grid; `test-slow` runs the rest, `test-all` both.
test: $(VENV)/.test-installed
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.test-installed
	$(PYTEST) -m slow

test-all: $(VENV)/.test-installed
	$(PYTEST)

# What wants a GPU, tests first, then the tables; with the Python that has torch for it.
gpu:
	$(PYTHON) benchmarks/card.py

lint: $(VENV)/.test-installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "genkit needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	touch $@

# timm without torchvision, which the tests stand in for: with it transformers prepares pictures otherwise than by Pillow.
$(VENV)/.test-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	$(INSTALL) --no-deps timm
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
