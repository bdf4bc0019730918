# Everything a person does here. `make` alone lists it.
PYTHON ?= python3
VENV   ?= .venv
# The backend on Linux: cpu, or cuda13 for an NVIDIA GPU. macOS needs none: Metal comes with mlx.
EXTRA  ?= $(if $(filter Linux,$(shell uname -s)),cpu)

PY      := $(VENV)/bin/python
PACKAGE := .$(if $(EXTRA),[$(EXTRA)])
EXAMPLE := examples/harry_potter
OUT     := $(EXAMPLE)/out
MODEL   := $(EXAMPLE)/SmolLM2-135M-Instruct.Q4_1.gguf
HELD_OUT := $(wildcard $(EXAMPLE)/data/*_test.jsonl $(EXAMPLE)/reverse_prompts.*)
# Two tests at a time (more cores: up to four), each file in one process, so that what a file trains is trained once.
# The order is that of the folders: the long files come first, the short ones of tests/unit fill up the end.
WORKERS ?= logical
PYTEST   = OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
           --hypothesis-profile $(PROFILE)
# Examples of each property: 20 (quick); 200 in CI, which .ci/run and GitHub say by setting CI.
PROFILE ?= $(if $(CI),ci,quick)
PYTEST_ARGS ?=
WORDS ?=

.DEFAULT_GOAL := help
# Each step is a stamp that the next one looks at.
.NOTPARALLEL:
.PHONY: help install blas model demo demo-paper tofu bench test coverage mutants lint format clean

help: ## list what can be done
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- set-up, done once: a stamp file remembers each step ----

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(PY)
	@echo "installing mlx, mlx-lm and what they need into $(VENV): some minutes ..."
	$(PY) -m pip install --quiet --disable-pip-version-check -e '$(PACKAGE)'
	@touch $@

# Dependency groups came with pip 25.1. One resolution for package and tools: this counts as .installed too.
$(VENV)/.dev: pyproject.toml | $(PY)
	@echo "installing mlx, mlx-lm, pytest and what they need into $(VENV): some minutes ..."
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(PY) -m pip install --quiet -e '$(PACKAGE)' --group dev
	@touch $(VENV)/.installed $@

install: $(VENV)/.installed blas ## environment in .venv, and a real BLAS on Linux

# MLX's Linux wheels bundle the reference BLAS; duet_mlx puts OpenBLAS before it where there is one.
MISSING_BLAS := note: OpenBLAS is missing, so matrix products on the CPU are about 40 times slower: apt-get install libopenblas0-pthread
blas: | $(VENV)/.installed
ifeq ($(shell uname -s)$(EXTRA),Linuxcpu)
	@has() { $(PY) -c 'import sys, duet_mlx; sys.exit(duet_mlx.BLAS is None)'; }; \
	if ! has && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing libopenblas0-pthread ..."; \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y libopenblas0-pthread; } >/dev/null 2>&1; \
	fi; has || echo "$(MISSING_BLAS)"
endif

$(MODEL): | $(VENV)/.installed
	@$(PY) $(EXAMPLE)/get_model.py --link $@ >/dev/null
model: $(MODEL) ## fetch the demo's model

# ---- the demo ----
# train_once.py keeps an adapter of these very settings and questions, goes on with one that was cut off, and sets
# any other aside. The evaluation is repeated if something it reads is newer than its results.

train    = $(PY) $(EXAMPLE)/train_once.py -c $(EXAMPLE)/config.yaml
evaluate = $(PY) -m duet_mlx.evaluate -c $(EXAMPLE)/evaluate.yaml --adapter-path $(@D)/adapters --out $(@D) --overwrite

# The paper's teacher reads a context that names the topic, ours one that refuses everything (config.yaml says why).
# Half our steps, of 3 + 9 questions: both together take long enough.
paper_context = --context specific --topic "Harry Potter"
paper_steps   = --iters 600 --batch-size 12
# The row of the paper's recipe: as trained here, or else the figures that the repository keeps.
PAPER    := $(firstword $(wildcard $(OUT)/paper/results.json $(EXAMPLE)/paper_results.json))
MEASURED := $(HELD_OUT) $(EXAMPLE)/evaluate.yaml $(addprefix duet_mlx/,evaluate.py metrics.py scores.py)

demo: install model ## environment, model, unlearning, evaluation: prints the table, writes examples/harry_potter/out/
	$(train)
	@$(MAKE) --no-print-directory $(OUT)/results.json
	@$(PY) -m duet_mlx.report $(OUT)/results.json

demo-paper: install model ## the same with the paper's recipe, into out/paper/; `make demo` then shows it beside ours
	$(train) --recipe paper $(paper_context) $(paper_steps) --adapter-path $(OUT)/paper/adapters
	@$(MAKE) --no-print-directory $(OUT)/paper/results.json
	@$(PY) -m duet_mlx.report $(OUT)/paper/results.json

# The two targets above have trained them; `make -n` wants a rule all the same.
$(OUT)/adapters/adapters.safetensors $(OUT)/paper/adapters/adapters.safetensors: ;
$(OUT)/results.json: $(OUT)/adapters/adapters.safetensors $(MEASURED) $(PAPER)
	$(evaluate) $(if $(PAPER),--beside paper=$(PAPER)) > /dev/null
$(OUT)/paper/results.json: $(OUT)/paper/adapters/adapters.safetensors $(MEASURED)
	$(evaluate) $(paper_context) > /dev/null

tofu: install model ## teach a model TOFU's authors, then unlearn some of them (resumable; about an hour on two CPU cores)
	$(PY) examples/tofu/implant.py

bench: $(VENV)/.dev blas model ## this project against a plain mlx-lm loop: ratios, in about ten minutes
	$(PY) -m benchmarks

# ---- development ----

test: $(VENV)/.dev blas model ## the whole suite: 20 examples a property, 200 with CI=1
	$(PYTEST) $(PYTEST_ARGS)

coverage: $(VENV)/.dev blas model ## the suite with branch coverage
	$(PYTEST) --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

mutants: $(VENV)/.dev blas ## seed faults one at a time (WORDS='adam rope': those alone), each must fail a test
	$(PY) -m tests.mutants $(WORDS)

lint: $(VENV)/.dev ## ruff and mypy, as CI runs them
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## forget environment and caches; adapters and results of the demo stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
