# make report   run every notebook and print the path of the report's index
# make test     style and tests
# make test-browser   the atlas, the report and JupyterLab in a real browser
# make bench    measure how fast clustering, extraction and inference are
# make lab      open JupyterLab on the notebooks
# make format   put code and notebooks in the house style
# make clean    remove the environment and everything that was made
#
# Needs only Python 3.11 to 3.13 and make. ARGS goes to the command, for example
#   make report ARGS="--preset full --model deit_tiny_patch16_224"

VENV := .venv
ARGS :=
OUT := reports
PARALLEL := --numprocesses auto --durations 10
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# Python compiles what it imports: most files of torch's never are.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Threads that spin while they wait take the cores of those that work.
export OMP_WAIT_POLICY := PASSIVE
# What was imported once is compiled for all processes to come.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup report test test-browser bench lab format clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=$$(for name in python3.13 python3.12 python3.11 python3 python; do \
	    if $$name -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	    then echo $$name; break; fi; done); \
	if [ -z "$$python" ]; then \
	    echo "Needs Python 3.11, 3.12 or 3.13, and none of them was found. Install one, then repeat." >&2; \
	    exit 1; fi; \
	if [ ! -x $(BIN)/python ]; then \
	    echo "Setting up $(VENV) with $$($$python --version); this takes a few minutes once."; \
	    $$python -m venv $(VENV); fi
	@$(INSTALL) --only-binary pymetis -e '.[dev,graph]' || { \
	    echo "Without METIS here: graphs of neurons are divided by their eigenvectors."; \
	    $(INSTALL) -e '.[dev]'; }
	@touch $@

report: $(STAMP)
	@$(BIN)/moee report --out $(OUT) $(ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-browser: $(STAMP)
	@chromium=$$(tests/browser/set_up.sh $(VENV)) && \
	    MOEE_CHROMIUM=$$chromium OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest tests/browser $(PARALLEL) $(ARGS)

bench: $(STAMP)
	@env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/speed.py --out $(OUT)/speed $(ARGS)

lab: $(STAMP)
	@$(BIN)/moee lab $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache *.egg-info
