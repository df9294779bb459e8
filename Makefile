# `make demo` and `make test` set everything up by themselves: Python 3.11 or newer, pip, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
RUN = $(VENV)/bin/

.PHONY: demo test check docs bench clean

demo: $(VENV)/.installed ## fine-tune a small model on the rows that ship with ftrun, in minutes, on a CPU
	$(RUN)ftrun

test: $(VENV)/.tested ## the whole test suite
	$(RUN)python -m pytest -n 2 --dist worksteal

check: $(VENV)/.tested ## style and types
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

docs: $(VENV)/.installed ## write the option reference again
	$(RUN)python -m ftrun.reference

bench: $(VENV)/.installed ## the measured claims
	$(RUN)python bench/startup.py
	$(RUN)python bench/data.py

clean:
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(RUN)pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@
