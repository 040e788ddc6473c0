# Two commands: `make reproduce` runs the study, `make test` checks the code. `make help` lists the rest.
# Each makes .venv first if need be; a Python of 3.11 or newer, git, make and a package index are all it takes.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SCALE ?= laptop
# The first of these that runs and is new enough.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))

# Waiting threads sleep: on two cores spinning ones slow everything else down.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1
# Set but empty, it is no truth value to PEFT.
ifeq ($(strip $(HF_HUB_OFFLINE)),)
unexport HF_HUB_OFFLINE
endif

# Nothing is compiled while installing, so that Python must keep what it compiles when it first reads a file: otherwise
# every process would compile all libraries anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help reproduce test checks check-types check-format check-workflow figures docs freeze bench constraints environment

help: ## List the targets.
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' $(MAKEFILE_LIST) | awk -F': ' '{printf "make %-12s %s\n", $$1, $$2}'

reproduce: $(STAMP) ## Run the whole study at laptop scale (SCALE=workstation for more) and write its report.
	@echo "== inputs, pre-training, fine-tuning, evaluation, figures at $(SCALE) scale; what is done already is kept"
	@$(BIN)/snakemake --cores all --config scale=$(SCALE)
	@echo "== figures:       results/$(SCALE)/figures"
	@echo "== tables:        results/$(SCALE)/tables (scores: scores.md)"
	@echo "== one per run:   results/$(SCALE)/runs/*/result.json"
	@echo "== report:        results/$(SCALE)/report.html"

test: checks ## Check format, types and workflow, then run all tests.
	@echo "== tests, a process for each core (those that need a GPU or a local data folder say so and are skipped)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=10
	@echo "== all tests passed; measured numbers come from 'make reproduce'"

checks: $(STAMP) ## Check format, types and workflow only.
	@$(MAKE) --no-print-directory -j 2 check-types check-format check-workflow

check-types: $(STAMP)
	@echo "== mypy (strict)"
	@$(BIN)/mypy misa/optimizer misa/results

check-format: $(STAMP)
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

check-workflow: $(STAMP)
	@echo "== snakefmt and snakemake --lint"
	@$(BIN)/snakefmt --check Snakefile workflows/rules
	@$(BIN)/snakemake --lint

figures: $(STAMP) ## Draw the figures from the committed tables; trains nothing.
	@$(BIN)/snakemake --cores all --config results=cached
	@echo "== figures: paper_figures; score table: paper_figures/tables"

docs: $(STAMP) ## Build the documentation into results/site.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "== documentation: results/site/index.html"

freeze: $(STAMP) ## Copy the tables of SCALE over those in paper_figures/data.
	@$(BIN)/snakemake --cores all freeze --config scale=$(SCALE)

bench: $(STAMP) ## Time one training step of every method, in one run.
	@$(BIN)/python -m benchmarks

# Of all files few are ever imported, so none is compiled here. The pip that comes with Python 3.11 takes half as long
# again as a new one.
# The stamp is newer than both files once everything they ask for is installed.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python of 3.11 or newer found; name one: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "== installing into $(VENV) with $$($(PYTHON) --version), versions from constraints.txt (minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade 'pip>=26,<27' || true
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[all]'
	@touch $@

environment: $(STAMP) ## Make .venv and install, nothing else.

constraints: ## Write constraints.txt anew from what is installed in .venv.
	@{ echo "# Exactly what the ranges in pyproject.toml resolved to, on Linux with Python 3.11. Made by 'make constraints'"; \
	   echo "# (pip freeze). Used by make, by CI and by environment.yml. torch without the name of a build, so that a"; \
	   echo "# machine with a GPU takes its own."; \
	   $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed 's/^\(torch==[^+]*\)+.*/\1/' ; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@echo "constraints.txt: $$(grep -vc '^#' constraints.txt) packages"
