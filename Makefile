# Two commands set a fresh machine up: `make plan` (environment + the main job) and `make test`.
# Without make: python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/diffplan plan sample:provider --out plan-out
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
OUT    ?= plan-out

.PHONY: plan test dashboard lint clean
plan: $(VENV)/.core
	$(BIN)/diffplan plan sample:provider --out $(OUT)

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

dashboard: $(VENV)/.dash
	$(BIN)/diffplan dashboard

$(VENV)/.core: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "diffplan needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dash: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dash]'
	touch $@

# torch is named with its version so that a CPU build is found where one is offered; see "Without a GPU" in the README.
$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' '$(TRITON)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[engine,dash,test]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
