# make demo: the whole job on this machine.  make test: every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast coverage lint mypy setup requirements
.DEFAULT_GOAL := demo

setup: $(STAMP)

$(STAMP): requirements.txt
	@echo "setup   installing into $(VENV) (about 5 GB, mostly PyTorch)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' \
		|| (echo "Python 3.11, 3.12 or 3.13 is needed; name it with make PYTHON=python3.11"; exit 1)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo:
	@test -f $(STAMP) && ! test requirements.txt -nt $(STAMP) && echo "setup   $(VENV) is there, reused" || $(MAKE) --no-print-directory setup
	@$(BIN)/python -m ray_distill demo $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell *.md *.toml *.py Makefile benchmarks configs docker docs pipeline ray_distill serve student teacher_cache tests
	$(MAKE) --no-print-directory mypy

# mypy does not follow `ray_distill.__path__`, so it is shown a folder where everything lies inside `ray_distill`.
mypy: $(STAMP)
	@$(BIN)/python docs/site/link_package.py build/linked
	$(BIN)/mypy

# Ray's processes have fixed times to start in, so tests with Ray run alone, after the others.
test: lint
	@failed=0; \
	$(BIN)/python -m pytest -m "not ray" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --cov --cov-report= --durations=15 || failed=1; \
	echo "branch coverage without the tests with Ray: $$($(BIN)/coverage report --format=total) %"; \
	$(BIN)/python -m pytest -m ray --durations=15 || failed=1; \
	exit $$failed

# Tests without Ray, browser, server processes and slow tests.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not (ray or browser or server or slow)" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Branch coverage of test-fast. Subprocesses are not measured.
coverage: $(STAMP)
	$(BIN)/python -m pytest -m "not (ray or browser or server or slow)" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term:skip-covered

# Pins from pyproject.toml, for Python 3.11 to 3.13 on any Linux.
requirements: $(STAMP)
	$(BIN)/python -m uv pip compile --quiet --no-emit-index-url --no-header --universal --python-version 3.11 \
		--extra demo --extra dev pyproject.toml -o requirements.txt
