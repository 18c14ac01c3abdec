# For a machine with python3, a C++20 compiler and make:   make demo   make test
#
# Everything is installed into .venv; the native module is built there in an isolated build. Steps that are done leave a
# stamp, so that a second `make` only does what has changed.

PYTHON ?= python3
# The tests compare with PyTorch in this version. Where pip would take a build for CUDA, name another one:
#   make TORCH='torch==2.13.0+cpu --index-url URL'
TORCH ?= torch==2.13.0

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/stamp
PIP   := $(BIN)/python -m pip --disable-pip-version-check

NATIVE  := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')
SOURCES := CMakeLists.txt pyproject.toml $(NATIVE) \
           $(shell find python convert reference -name '*.py' -o -name '*.pyi' -o -name 'py.typed')
TYPED   := $(filter-out %/inspect.py, $(wildcard python/fixmin_cpp/*.py))
CXX_ALL := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl')

# Makes the steps print what they do; with `make V=` everything else stays silent.
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help setup demo test lint format bench clean distclean

help:
	@echo 'make demo       install, convert and certify the demo checkpoints, generate text'
	@echo 'make test       install and run all tests'
	@echo 'make setup      install only (into $(VENV))'
	@echo 'make lint       formatting, static checks and types'
	@echo 'make format     apply the formatting'
	@echo 'make bench      side-by-side speed on this machine (takes minutes; needs 4 GB of memory)'
	@echo 'make clean      remove what was built and generated; distclean: $(VENV) too'

# --- installation ----------------------------------------------------------------------------------------------------

setup: $(STAMP)/package

# Debian splits venv and the headers from python3: install them where we may, otherwise say how.
$(STAMP)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo 'error: $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
	    || { echo 'error: no C++ compiler; on Debian: apt-get install g++' >&2; exit 1; }
	@has='import ensurepip, os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; \
	if ! $(PYTHON) -c "$$has" 2>/dev/null; then \
	    packages="$$($(PYTHON) -c 'import sys; v = "python%d.%d" % sys.version_info[:2]; print(v + "-venv", v + "-dev")')"; \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "installing $$packages"; \
	        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages; \
	    else \
	        echo "error: $(PYTHON) lacks the venv module or its headers; on Debian: sudo apt-get install $$packages" >&2; exit 1; \
	    fi; \
	fi
	$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMP) && touch $@

$(STAMP)/torch: $(STAMP)/venv
	$(PIP) install $(TORCH)
	@touch $@

$(STAMP)/package: $(STAMP)/torch $(SOURCES)
	$(PIP) install --upgrade --upgrade-strategy only-if-needed '.[test]'
	@touch $@

$(STAMP)/dev: $(STAMP)/package
	$(PIP) install '.[dev]'
	@touch $@

# --- demo ------------------------------------------------------------------------------------------------------------

demo: out/demo/fixed.gguf out/demo/affine.gguf
	@$(BIN)/python examples/run_demo.py out/demo

# The checkpoint's own code is run to find out what it computes: the option says that this is allowed.
out/demo/%.gguf: examples/demo/%/model.safetensors examples/demo/%/config.json | $(STAMP)/package
	@mkdir -p $(@D)
	$(BIN)/fixmin convert examples/demo/$* -o $@ --outtype q8_0 --trust-remote-code

# --- checks ----------------------------------------------------------------------------------------------------------

test: $(STAMP)/package
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_ALL)
	$(BIN)/mypy --follow-imports=silent $(TYPED)
	$(BIN)/python -m pytest -q tests/python/test_stub.py

format: $(STAMP)/dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_ALL)

bench: $(STAMP)/dev
	$(BIN)/python bench/make_checkpoint.py --help

clean:
	rm -rf build dist out .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
