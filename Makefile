# Every target sets up .venv by itself: the locked packages and this project, installed again only when they change.
PYTHON ?= python3
OUTER_PATH := $(PATH)
INSTALL := -m pip install --quiet --disable-pip-version-check

# On Linux the package index has torch for CUDA, gigabytes of it. Where there is no NVIDIA driver this index has the same
# version for CPUs. Any other one serves too, for ROCm say; empty: the package index alone.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,https://download.pytorch.org/whl/cpu)
TORCH = $(shell sed -n '/^torch==/p' requirements.lock)
# An index out of reach costs two tries, and pip takes what the others have.
INSTALL_TORCH = $(if $(TORCH_INDEX),$(INSTALL) --no-deps --timeout 15 --retries 1 --extra-index-url $(TORCH_INDEX),$(INSTALL)) $(TORCH)

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help .venv repro flow preset test deps lint docs ci-report lock clean

help: ## show the targets
	@sed -n 's/^\([a-z.-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F '\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

.venv: .venv/.installed ## the locked packages and this project, in .venv; TORCH_INDEX=URL: torch from there

.venv/.installed: requirements.lock pyproject.toml
	@PATH="$(OUTER_PATH)" $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: $(PYTHON) must be Python 3.11 or newer; try: make PYTHON=python3.11' >&2; exit 1; }
	@echo "Setting up .venv with the packages of requirements.lock (some minutes the first time)"
	@PATH="$(OUTER_PATH)" $(PYTHON) -m venv .venv
	@.venv/bin/python $(INSTALL_TORCH)
	@.venv/bin/python $(INSTALL) --requirement requirements.lock
	@.venv/bin/python $(INSTALL) --no-deps --no-build-isolation --editable .
	@printf '%s\n' '#!/bin/sh' '# The stages call `python`: with this folder first on the PATH they get this one, activated or not.' \
		'export PATH="$(CURDIR)/.venv/bin:$${PATH:-/usr/bin:/bin}"' \
		'exec "$(CURDIR)/.venv/bin/python" -P -m dvc "$$@"' > .venv/bin/dvc
	@touch $@

repro: .venv/.installed ## the compressed model and its report, from params.yaml; runs only what changed
	@python -m pipeline.config.params # DVC removes a stage's output before the stage can refuse a value
	dvc repro

flow: .venv/.installed ## the same under Prefect, with its UI
	python -m pipeline.flow

preset: .venv/.installed ## NAME=dobi-svd: the values of a published method into params.yaml, see presets/
	$(if $(NAME),,$(error name a preset, make preset NAME=dobi-svd; there are: $(sort $(notdir $(basename $(wildcard presets/*.yaml))))))
	@python -m pipeline.config.preset $(NAME)

test: .venv/.installed ## the whole test suite, one file per core at a time
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

deps: .venv/.installed ## the code that each stage executes, into dvc.yaml
	@python -m pipeline.deps

lint: .venv/.installed ## style, types, and the code that dvc.yaml names
	ruff check
	ruff format --check
	mypy
	@python -m pipeline.deps --check

docs: .venv/.installed ## the documentation, in site/; a broken link or reference is an error
	mkdocs build --strict --site-dir site

ci-report: .venv/.installed ## BASE=REV: ci-report.md, this commit compared with REV
	$(if $(BASE),,$(error name the commit to compare with: make ci-report BASE=REV))
	python -m pipeline.report.ci_report --base "$(BASE)" --out ci-report.md

lock: ## requirements.lock anew, from the newest versions that pyproject.toml allows
	rm -rf .venv-lock
	PATH="$(OUTER_PATH)" $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(INSTALL_TORCH)
	.venv-lock/bin/python $(INSTALL) '.[pipeline,dask,test,docs]' $(TORCH) async-timeout
	sed -n '/^#/p' requirements.lock > requirements.lock.new
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude spectrim --disable-pip-version-check \
		| sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(nvidia|cuda|triton)' >> requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock build

clean: ## remove what tests and builds leave; artifacts, caches and .venv stay
	rm -rf build dist site ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis ci-report.md
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
