# Two commands for a fresh machine:
#   make demo   set up .venv and run the main job on real weights
#   make test   set up .venv and run the tests

VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-slow lint types format clean

demo: $(VENV)/.run-ready
	$(VENV)/bin/sparda demo

test: $(VENV)/.test-ready
	$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.test-ready
	$(PY) -m pytest -n 2 --dist loadfile --runslow -m slow $(PYTEST_ARGS)

lint: $(VENV)/.dev-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev-ready
	$(VENV)/bin/pyrefly check

format: $(VENV)/.dev-ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

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
	touch $@ $(VENV)/.test-ready $(VENV)/.run-ready

clean:
	rm -rf $(VENV) build dist *.egg-info
