PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-slow lint docs clean

demo: $(INSTALLED)  ## Install, then distil the bundled digits and write a report
	$(BIN)/pipeline run distill digits --ipc 10 --out runs/demo

test: $(INSTALLED)  ## Install, then run the tests
	@# Files in the order of their names: those with few tests, which would be last, take longest.
	$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder

test-slow: $(INSTALLED)  ## The scientific runs of several minutes
	$(BIN)/pytest -m slow

lint: $(INSTALLED)  ## Style, types and structure
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_structure.py

docs: $(INSTALLED)  ## The site, below site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) runs site

# constraints.txt holds the versions that were tested together.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)
