# From a bare checkout: `make demo` and `make test`; `make help` lists the rest.
#
# ARGS=...          passed to `moeshm demo` or to pytest
# EXTRAS=...        pyproject.toml's extras to test with, commas between them (default: dev)
# REQUIREMENTS=...  resolved together with the extras, like torch==2.13.0
# PYTHON=...        the interpreter to make .venv with; for test-gpu, whose packages to use as they are
# CC=...            the C compiler
# JOBS=...          how many tests run at once (default: 2; 0: in one process, for -s and --pdb)

EXTRAS ?= dev
# Most tests start processes themselves.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

comma := ,
# The install is editable: only what is compiled, and pyproject.toml, ask for another.
INPUTS := pyproject.toml setup.py $(wildcard moeshm/*.pyx moeshm/*.pxd moeshm/*.h moeshm/backends/gpu/*.pyx)
INSTALLED := $(VENV)/.installed
INSTALLED_EXTRAS := $(INSTALLED)-$(subst $(comma),-,$(EXTRAS))

.PHONY: help demo venv test test-sanitized test-crashes fuzz soak test-gpu kernel-page model-page attack-page \
    lint clean
.DEFAULT_GOAL := help

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n 's/^# \([A-Z].*=\.\.\.  *.*\)/  \1/p' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Build and install in .venv, then run `moeshm demo`
	@$(BIN)/moeshm demo $(ARGS)

venv: $(INSTALLED_EXTRAS) ## Build and install in .venv, and nothing else

test: $(INSTALLED_EXTRAS) ## Build and install in .venv, then run every test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-sanitized: $(INSTALLED_EXTRAS) ## Run the ring's and a client's tests under TSan, the ring's under ASan and UBSan
	tools/sanitized_tests.sh $(BIN)/python $(ARGS)

test-crashes: $(INSTALLED_EXTRAS) ## Kill and stop clients and workers at every crash point
	tools/crash_matrix.sh $(BIN)/python $(ARGS)

fuzz: $(INSTALLED_EXTRAS) ## Fuzz what peers can write, under ASan and UBSan (EXTRAS=dev,fuzz ARGS="--minutes 3")
	tools/fuzz.sh $(BIN)/python $(ARGS)

soak: $(INSTALLED_EXTRAS) ## Load, kills and hangs at once, every result checked (ARGS="--minutes 2")
	$(BIN)/moeshm soak $(ARGS)

test-gpu: ## Run the tests that need a GPU (EXTRAS=dev,cuda13 or another, or PYTHON=...)
ifdef PYTHON
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest -m gpu $(ARGS)
else
test-gpu: $(INSTALLED_EXTRAS)
	$(BIN)/python -m pytest -m gpu $(ARGS)
endif

kernel-page: $(INSTALLED_EXTRAS) ## Bring docs/kernels.md up to date (EXTRAS=dev,compilers)
	$(BIN)/python -m tests.compile.page

model-page: $(INSTALLED_EXTRAS) ## Bring docs/model.md up to date
	$(BIN)/python -m tests.models.page

attack-page: $(INSTALLED_EXTRAS) ## Bring the attacks' table in docs/security.md up to date
	$(BIN)/python -m tests.hostile.page

lint: $(INSTALLED_EXTRAS) ## ruff, mypy, stubtest and cython-lint; changes nothing
	@failed=0; \
	$(BIN)/ruff check . || failed=1; \
	$(BIN)/ruff format --check . || failed=1; \
	tools/typecheck.sh $(BIN)/python || failed=1; \
	PATH="$(BIN):$$PATH" cython-lint moeshm || failed=1; \
	exit $$failed

clean: ## Remove everything these commands made, .venv included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find moeshm -name '*.so' -delete -o -name '*.c' -delete
	find moeshm kernels bench tests tools -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): $(INPUTS)
	@tools/install.sh $(VENV)
	@touch $@

$(INSTALLED_EXTRAS): $(INPUTS)
	@tools/install.sh $(VENV) $(EXTRAS) $(REQUIREMENTS)
	@touch $@ $(INSTALLED)
