# The commands of this project. Each makes its own virtual environment on a machine with only Python >= 3.10, pip and make.
#
#   make demo               train iMAML on the embedded Glyphs characters, a table and a picture at the end (minutes)
#   make demo DATA=<dir>    the same on Omniglot: <dir> holds images_background.zip and images_evaluation.zip, or their extracted folders
#   make test               all tests         make test ARGS="-k conjugate -x"
#   make check              formatting, lint, types and the tests of the core, under 3 minutes on 2 cores: before every commit
#                           (make core: the tests alone)
#   .ci/versions            the core on other versions of Python and torch
#   make test-thorough      more than 10,000 random problems with known answers, the figures as a table, and seeded faults (5 to 12 minutes)
#                           ARGS="--minutes 3", ARGS="--family root --seed 7"; tables in runs/thorough/
#   make paper-cpu          the paper's figures and tables, reduced for a CPU (at most 25 minutes on 2 cores); results in runs/paper/
#                           DATA=<dir>  a folder with omniglot/ and mini_imagenet/; without it, Glyphs take their place
#                           REFRESH=1   into examples/paper/results/ and docs/paper.md
#   make lint               formatting, lint, types
#   make docs               the site, with the API reference, into site/: every warning and dead link is an error
#   make notebooks          the gallery as Jupyter notebooks, in notebooks/ (jupytext, installed into the environment)
#   make bench              the benchmarks of examples/benchmarks/
#   make clean              remove the environment
#
# Settings: PYTHON=<interpreter>   VENV=<folder>   WORKERS=<test processes>   ARGS=<passed on to the command>
#   VENV_FLAGS=--system-site-packages        use a torch that is already installed
#   PIP_FLAGS="--extra-index-url <index>"    take torch from another index, such as PyTorch's own CPU builds (a smaller download on Linux)

SHELL   := /bin/bash
VENV    ?= .venv
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt
DATA    ?=
REFRESH ?=
ARGS    ?=

# The first interpreter that the pinned versions serve (3.10-3.13), else any newer one.
find_python = for top in 14 99; do for p in python3 python python3.13 python3.12 python3.11 python3.10 python3.14; do \
	"$$p" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, $$top))" >/dev/null 2>&1 && { echo "$$p"; exit; }; done; done
PYTHON  ?= $(shell $(find_python))

BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg

PAPER := $(if $(REFRESH),examples/paper/results,runs/paper)
PAGE  := $(if $(REFRESH),docs/paper.md,runs/paper/paper.md)
INTO  := --output-dir "$(PAPER)"
REAL  := $(if $(DATA),--data-dir "$(DATA)")

.PHONY: help demo test check core test-thorough paper-cpu lint format docs notebooks bench clean
help:
	@sed -n '1,/PIP_FLAGS/s/^# \{0,1\}//p' Makefile

# The environment is made anew when the pinned versions change; each command adds only the extras it needs.
$(VENV)/made: $(CONSTRAINTS)
	@if [ -z "$(PYTHON)" ]; then echo "No Python >= 3.10 was found. Install one, or name it: make $(MAKECMDGOALS) PYTHON=<interpreter>"; exit 1; fi
	@echo "== environment $(VENV) with $$($(PYTHON) --version)"
	@if [ -e "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ]; then echo "VENV=$(VENV) exists and is no virtual environment"; exit 1; fi
	rm -rf "$(VENV)"
	"$(PYTHON)" -m venv $(VENV_FLAGS) "$(VENV)" || { echo "The venv module does not work here (Debian, Ubuntu: install python3-venv)."; rm -rf "$(VENV)"; exit 1; }
	@touch $@

$(VENV)/with-%: $(VENV)/made pyproject.toml
	@echo "== installing implicitlayer[$*] at the versions of $(CONSTRAINTS) (the first time this downloads torch)"
	"$(BIN)/python" -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) $(PIP_FLAGS) -e ".[$*]"
	@touch $@

demo: $(VENV)/with-examples
	"$(BIN)/python" examples/demo.py $(if $(DATA),--data-dir "$(DATA)") $(ARGS)

test: $(VENV)/with-dev
	$(RUN) "$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Without the files that take longest: under three minutes on two cores. make test runs them.
SLOW := implicit/test_batch_norm.py implicit/test_garbage.py implicit/test_properties.py implicit/test_transform_table.py \
	implicit/test_qp_plain_path.py implicit/test_qp_sparse.py linear/test_conformance.py linear/test_conjugate_gradient_figures.py
CORE := tests/implicit tests/linear $(wildcard tests/test_reliability*.py) tests/test_structure.py tests/test_torch_names.py \
	$(SLOW:%=--ignore=tests/%)
check: lint core

core: $(VENV)/with-dev
	$(RUN) "$(BIN)/python" -m pytest -q -n $(WORKERS) --dist worksteal $(CORE) $(ARGS)

test-thorough: $(VENV)/with-dev
	$(RUN) "$(BIN)/python" -m tests.thorough $(ARGS)
	$(RUN) "$(BIN)/python" -m pytest -m thorough -n $(WORKERS) --dist worksteal -v tests/mutation

# Threads that wait sleep: by default they spin, and beside other work a step then takes up to ten times as long.
paper-cpu: export OMP_WAIT_POLICY = PASSIVE
paper-cpu: export MPLBACKEND = Agg
paper-cpu: $(VENV)/with-examples
	"$(BIN)/python" examples/paper/fig2a.py $(INTO)
	"$(BIN)/python" examples/paper/table1.py $(INTO)
	"$(BIN)/python" examples/paper/fig2b.py $(INTO) $(REAL)
	"$(BIN)/python" examples/paper/table2.py $(INTO) $(REAL)
	"$(BIN)/python" examples/paper/table3.py $(INTO) $(REAL)
	"$(BIN)/python" examples/paper/report.py --results "$(PAPER)" --output "$(PAGE)"

lint: $(VENV)/with-dev
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"

format: $(VENV)/with-dev
	"$(BIN)/ruff" format .
	"$(BIN)/ruff" check --fix .

docs: $(VENV)/with-docs
	"$(BIN)/mkdocs" build --strict

notebooks: $(VENV)/with-examples
	"$(BIN)/python" -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) jupytext
	mkdir -p notebooks
	for script in examples/gallery/[!_]*.py; do "$(BIN)/python" -m jupytext --to ipynb -o "notebooks/$$(basename "$$script" .py).ipynb" "$$script" || exit 1; done

bench: $(VENV)/with-examples
	@"$(BIN)/python" -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) $(PIP_FLAGS) -e ".[bench]" \
		|| echo "== TorchOpt could not be installed here; it is left out of the comparison"
	for script in examples/benchmarks/[!_]*.py; do "$(BIN)/python" "$$script" $(ARGS) || exit 1; done

clean:
	[ ! -e "$(VENV)/pyvenv.cfg" ] || rm -rf "$(VENV)"
