# Two commands for a fresh machine:
#   make demo   set up .venv and run the main job on real weights
#   make test   set up .venv and run the tests

VENV := .venv
PY := $(VENV)/bin/python
GPU_WORKERS := 15
# `make test-slow SLOW="slow and not long"`: without what is run in a smaller form too.
SLOW := slow

# What Python compiles of the sources is kept, for workers and the processes of tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-gpu lint types format docs notebooks clients clean

demo: $(VENV)/.run-ready
	$(VENV)/bin/sparda demo

# A worker that has no tests left takes them from the other.
test: $(VENV)/.test-ready
	$(PY) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.test-ready $(VENV)/.notebooks-ready $(VENV)/.lm-eval-ready \
		$(VENV)/.guidellm-ready
	$(PY) -m pytest -n 2 --dist worksteal --runslow -m "$(SLOW)" $(PYTEST_ARGS)

# Every worker would else take three quarters of the card when it starts.
test-gpu: $(VENV)/.test-ready
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PY) -m pytest -m gpu -p no:benchmark -n $(GPU_WORKERS) \
		tests/pallas_kernels tests/train tests/sparda_jax/cache \
		tests/sparda_jax/inference/test_offload.py $(PYTEST_ARGS)

lint: $(VENV)/.dev-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev-ready
	$(VENV)/bin/pyrefly check

format: $(VENV)/.dev-ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The site, in build/site; a warning is an error.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# Executed, with their outputs, into build/notebooks.
notebooks: $(VENV)/.notebooks-ready
	$(PY) scripts/run_notebooks.py notebooks/*.ipynb --out build/notebooks

$(PY):
	PYTHON="$(PYTHON)" sh scripts/make_venv.sh $(VENV)

$(VENV)/.run-ready: $(PY) pyproject.toml
	$(PY) -m pip install --quiet -e .
	touch $@

$(VENV)/.test-ready: $(PY) pyproject.toml
	$(PY) -m pip install --quiet -e ".[test,train]"
	touch $@ $(VENV)/.run-ready

$(VENV)/.dev-ready: $(PY) pyproject.toml
	$(PY) -m pip install --quiet -e ".[dev]"
	touch $@ $(addprefix $(VENV)/,.test-ready .docs-ready .notebooks-ready .run-ready)

$(VENV)/.docs-ready: $(PY) pyproject.toml
	$(PY) -m pip install --quiet -e ".[docs]"
	touch $@ $(VENV)/.run-ready

# Clients of `sparda serve`, and Ray: an environment of their own, for their many needs.
# guidellm, lm-eval with its tasks, and Ray for the slow tests that ask for them: 6 GB, as they
# bring PyTorch.
clients: $(VENV)/.clients-ready

$(VENV)/.clients-ready: $(PY) pyproject.toml
	$(PY) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --quiet -e ".[serve-clients,ray]"
	touch $@

# What an extra names, for pip where the project itself is not installed.
requirements = $$($(PY) -c \
	"import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)'])")

# lm-eval without what its own tasks and metrics need: `local-completions` needs none of it.
$(VENV)/.lm-eval-ready: $(PY) pyproject.toml
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(VENV)/lm-eval "$(call requirements,lm-eval)"
	touch $@

# guidellm has requirements that others' ranges exclude.
$(VENV)/.guidellm-ready: $(PY) pyproject.toml
	$(PY) -m venv $(VENV)/guidellm
	$(VENV)/guidellm/bin/python -m pip install --quiet --no-compile "$(call requirements,guidellm)"
	touch $@

$(VENV)/.notebooks-ready: $(PY) pyproject.toml
	$(PY) -m pip install --quiet -e ".[notebooks]"
	touch $@ $(VENV)/.run-ready

clean:
	rm -rf $(VENV) build dist *.egg-info
