# make demo   PRM against AdamW on badly labelled digits, a few minutes; ends with a table and the path of a page
# make test   everything that CI checks
# make gpu    everything that wants an NVIDIA GPU, with the Python at hand
# The first two make their own virtual environment in .venv and need Python 3.10 or newer and make.

VENV := .venv
BIN := $(VENV)/bin
JOBS := $(shell nproc 2>/dev/null || echo 2)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint docs benchmark gpu clean

demo: $(VENV)/.demo
	$(BIN)/popriskmin compare digits --jobs $(JOBS)

test: lint docs
	$(BIN)/python -m pytest -n $$(($(JOBS) + 1)) --dist loadgroup --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/sphinx-build --fail-on-warning --quiet docs site

benchmark: $(VENV)/.demo
	$(BIN)/python benchmarks/step_time.py

# On a machine with an NVIDIA GPU: no network, nothing installed, under 8 minutes; writes gpu.json.
gpu:
	$(or $(PYTHON),python3) benchmarks/gpu.py

clean:
	rm -rf $(VENV) site build popriskmin.egg-info popriskmin/step/kernels/*.so

$(BIN)/python:
	tools/make-venv $(VENV)

# What the fused step is built from: installed anew when it changes.
KERNEL := setup.py popriskmin/step/kernels/cpu.c $(wildcard popriskmin/step/kernels/*.h)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt $(KERNEL)
	@echo "installing torch and the compare extra into $(VENV), once"
	$(PIP) --editable '.[compare]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "installing the test and docs extras into $(VENV), once"
	$(PIP) --editable '.[test,docs]'
	@touch $@
