# make demo, make test: each alone, from nothing but Python 3.10+ and a C++ compiler.
#
#   PYTHON=python3.12             the Python that .venv is made with
#   TORCH_INDEX=URL               the package index to take torch from when .venv is made (its CPU or CUDA build);
#                                 unset: pip's default
#   PYALIGN_CUDA_ARCHS="80;90"    CUDA targets; unset: the GPU in this machine, if there is one and nvcc is too
#   PYTEST_ARGS, BENCH_ARGS       passed to pytest
#   PAPER_ARGS                    passed to python -m bench.paper

PYTHON ?= python3
TORCH_INDEX ?=
export PYALIGN_CUDA_ARCHS ?= native

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCK := .ci/requirements.txt
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test build bench paper lint types format lock clean

demo: build .venv/.demo
	$(BIN)/python bench/demo.py

test: build
	$(BIN)/python -m pytest $(PYTEST_ARGS)

build: .venv/.project
	$(BIN)/python setup.py --quiet build_ext --inplace

bench: build
	$(BIN)/python -m pytest bench $(BENCH_ARGS)

paper: build
	$(BIN)/python -m bench.paper $(PAPER_ARGS)

lint: .venv/.packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

types: build
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: .venv/.packages
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The exact versions that development and CI use; torch pins its own CUDA packages.
lock: .venv/.packages
	$(PIP) install uv
	echo torch==2.13.0 | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --extra dev \
		--no-header --no-annotate pyproject.toml - | grep -vE '^(nvidia|cuda)-' > $(LOCK)

clean:
	rm -rf .venv build dist *.egg-info pyalign/_C*.so

.venv/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"pyalign needs Python 3.10+: {sys.version}")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/.packages: $(LOCK) .venv/.python
	$(if $(TORCH_INDEX),$(PIP) install --quiet --no-deps --index-url $(TORCH_INDEX) --constraint $(LOCK) torch)
	$(PIP) install --quiet --requirement $(LOCK)
	touch $@

.venv/.project: .venv/.packages pyproject.toml setup.py
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Without its own requirements, which would compile llama.cpp.
.venv/.demo: .ci/demo.txt .venv/.packages
	$(PIP) install --quiet --no-deps --requirement .ci/demo.txt
	touch $@
