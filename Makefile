# The two commands of the README, and what CI calls: make demo, make test, make check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow check format

setup: .venv/ready

# The marker is written last, so an installation that was interrupted is done again.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("noisy-lambda needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: setup
	$(BIN)/noisy-lambda run jobs/noisy_student.yaml

test: setup  # two processes, see tests/conftest.py
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow --timeout 3600

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
