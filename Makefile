# glottoscope: what a person types. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The benchmarks' own environment, with the peers; make bench BENCH_FLAGS='--only sae --threads 1' (--help shows all)
BENCH := .venv-bench
BENCH_FLAGS ?=
# Runs that `make test-kill` kills, and where the seed of its random moments (printed) comes from: another each time
KILLS ?= 20
SEED ?=
# COMET's own environment: unbabel-comet needs transformers < 5 and numpy < 2
COMET := .venv-comet
# Processes of make test
TEST_JOBS ?= 2
# Another package index for torch, where one is wanted: make setup TORCH_INDEX=URL
TORCH_INDEX ?=
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help setup setup-dev demo demo-full test test-browser test-comet test-kill test-ray bench bench-quick lint docs clean

help:
	@echo "make setup      make the .venv and install glottoscope"
	@echo "make demo       run the embedded study and print where the report is (about 2 minutes on 2 cores, after installation)"
	@echo "make demo-full  the same with three sizes and the negative control (about 10 minutes)"
	@echo "make test       run the tests"
	@echo "make test-browser  test the report and the browser's pages in the system's Chromium (playwright drives it; none is downloaded)"
	@echo "make test-comet  make COMET's own environment in $(COMET) and test scoring with the real package (about 4 minutes)"
	@echo "make test-kill  kill runs of a small study at random moments and compare what they end with (KILLS=20, SEED=...)"
	@echo "make test-ray   install Ray into $(VENV) and test a cluster of two nodes on this machine (about 3 minutes, loopback only)"
	@echo "make bench      install the peers into $(BENCH) and run the benchmarks beside them (about an hour on 2 cores)"
	@echo "make bench-quick  the same at small shapes (minutes), to see that all of it works"
	@echo "make lint       ruff and pyright"
	@echo "make docs       write docs/configuration.md and docs/tables.md from the code"

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# Where venv lacks ensurepip (Debian without python3-venv), virtualenv brings its own pip.
$(BIN)/python $(BENCH)/bin/python: %/bin/python:
	@$(PYTHON) -m venv $* 2>/dev/null || { \
	  echo "python -m venv does not work here: using virtualenv"; rm -rf $*; \
	  $(PYTHON) -m pip install --quiet --target $*-bootstrap virtualenv && \
	  PYTHONPATH=$*-bootstrap $(PYTHON) -m virtualenv --quiet $* && rm -rf $*-bootstrap; }

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing glottoscope and what it needs into $(VENV) ..."
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests and lint need ..."
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	@touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	@echo "installing what drives a browser ..."
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[browser]'
	@touch $@

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	@echo "installing Ray ..."
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[ray]'
	@touch $@

demo: setup
	@$(BIN)/glottoscope demo

demo-full: setup
	@$(BIN)/glottoscope demo --full

# Files are shared out over processes; make test TEST_JOBS=0 runs all in one.
test: setup-dev
	$(BIN)/python -m pytest tests -n $(TEST_JOBS) --dist loadfile

# Reports and sites are made without a browser; to test them, the system's is driven here.
test-browser: find-browser $(VENV)/.installed-browser
	$(BIN)/python -m pytest tests/browser

.PHONY: find-browser
find-browser:
	@for name in chromium chromium-browser google-chrome-stable google-chrome; do \
	  command -v $$name >/dev/null && exit 0; done; \
	  echo "no Chromium found; on Debian: apt install chromium fonts-noto-cjk" >&2; exit 1

# The environment is made by what `glottoscope comet setup` calls, so that what a user gets is what is tested.
test-comet: setup-dev
	@$(BIN)/python -c "from pathlib import Path; from glottoscope.intervention import comet; \
	  comet.setup(Path('$(COMET)'), extra_index='$(TORCH_INDEX)' or None)"
	GLOTTOSCOPE_COMET=$(CURDIR)/$(COMET) $(BIN)/python -m pytest tests/comet

# KILLS random moments of a run; SEED repeats those of another time.
test-kill: export KILLS := $(KILLS)
test-kill: export SEED := $(SEED)
test-kill: setup-dev
	$(BIN)/python -m pytest tests/kill -s

# A real cluster: two raylets as processes of this machine, all of them on 127.0.0.1.
test-ray: $(VENV)/.installed-ray
	$(BIN)/python -m pytest tests/ray

# Peers come without their dependencies: what they need is in peers.txt, and torch stays as it is.
$(BENCH)/.installed: $(BENCH)/bin/python pyproject.toml constraints.txt benchmarks/peers.txt
	@echo "installing glottoscope and the peers into $(BENCH) ..."
	@$(BENCH)/bin/python -m pip install $(PIP_FLAGS) -e .
	@$(BENCH)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r benchmarks/peers.txt
	@touch $@

bench: $(BENCH)/.installed
	@$(BENCH)/bin/python benchmarks/bench.py $(BENCH_FLAGS)

bench-quick: $(BENCH)/.installed
	@$(BENCH)/bin/python benchmarks/bench.py --quick $(BENCH_FLAGS)

lint: setup-dev $(VENV)/.installed-browser
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright

docs: setup
	$(BIN)/python -m glottoscope.study.reference docs

clean:
	rm -rf $(VENV) $(VENV)-bootstrap $(BENCH) $(BENCH)-bootstrap $(COMET) build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
