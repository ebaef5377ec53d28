# make lab    set up a virtual environment, fetch model and data, open the course
# make test   the same set-up, then every check there is
#
# TORCH=...   a requirement to install before the rest, for a torch build of your choice,
#             for example  make lab TORCH="torch==2.13.0"
# VENV=...    another place for the virtual environment
PYTHON ?= python3
TORCH ?=
VENV ?= .venv
LAB_OPTIONS ?=
BIN = $(VENV)/bin

.PHONY: lab test assets check unit nbval notebooks pages slides anki cards exercises bench evidence browser format

lab: $(VENV)/lab.stamp assets
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" $(LAB_OPTIONS) notebooks/00_start_here.ipynb

# What keeps one core busy is done side by side; the tests keep two.
test:
	$(MAKE) -j2 $(VENV)/test.stamp browser
	$(MAKE) -j2 check unit
	$(MAKE) nbval

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minipeft needs Python 3.11 or newer; name one with  make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/lab.stamp: pyproject.toml | $(VENV)/pyvenv.cfg
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install -e ".[course]"
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/pyvenv.cfg
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install -e ".[test]"
	@touch $@ $(VENV)/lab.stamp

assets:
	$(BIN)/python -m minipeft.assets

# In CI a Debian machine gets its Chromium here. Elsewhere the browser test uses the one that is
# installed, or skips and says so.
browser:
	@if [ "$$CI" = true ] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then \
	  apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver; fi

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two test processes, each with half of the cores: small models keep one core busy, not two.
# Kernels start in a process that has imported torch already.
IN_PAIRS = OMP_NUM_THREADS=$$($(BIN)/python -c "import os; print(max(1, os.cpu_count() // 2))") \
  $(BIN)/python -m pytest -p tests.warm_kernels -n 2

unit: $(VENV)/test.stamp assets
	$(IN_PAIRS) --dist worksteal tests

nbval: $(VENV)/test.stamp assets
	$(IN_PAIRS) --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=900 \
	  --durations=0 notebooks solutions

# Run every notebook and keep its outputs; commit what comes out.
notebooks: $(VENV)/test.stamp assets
	$(BIN)/python tools/run_notebooks.py

# The notebooks as HTML for a browser without a network: build/pages/index.html.
pages: $(VENV)/test.stamp
	$(BIN)/python tools/make_pages.py

# Slides of each lesson, for a browser without a network: build/slides/index.html.
slides: $(VENV)/test.stamp
	$(BIN)/python tools/make_slides.py

# Flashcards of the interview bank: decks for Anki, and pages to print. build/interview/
anki: $(VENV)/test.stamp
	$(BIN)/python tools/make_cards.py anki

cards: $(VENV)/test.stamp
	$(BIN)/python tools/make_cards.py print

exercises: $(VENV)/test.stamp
	$(BIN)/python tools/make_exercises.py

bench: $(VENV)/test.stamp assets
	$(BIN)/python benchmarks/step.py

# The training runs that are missing in benchmarks/results/evidence.csv, for this device.
# Days on two CPU cores, hours on a GPU; WORKERS=10 shares it between ten processes.
WORKERS ?= 1
evidence: $(VENV)/test.stamp assets
	$(BIN)/python benchmarks/evidence.py --workers $(WORKERS)

format: $(VENV)/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
