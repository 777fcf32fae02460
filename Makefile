# make demo   the whole recipe on the embedded model; opens nothing, writes runs/demo/report.html
# make test   the tests (make test-slow adds those that take minutes or many gigabytes)
# make lint   ruff and pyright
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint browser

demo: $(STAMP)
	$(BIN)/attention-surgery demo --output runs/demo

test: $(STAMP) browser
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/pyright

# torch first and pinned: unpinned, pip takes the newest build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# The preference study's page is driven in a real browser; its tests skip, loudly, without one.
browser:
	@command -v chromium > /dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null) \
		|| echo "NO BROWSER: the study's page will not be tested"
