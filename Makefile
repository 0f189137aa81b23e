# Two commands matter, and each does all set-up by itself in a fresh clone: `make demo` and
# `make test`. They use their own virtual environment, .venv, with the exact versions of
# constraints.txt; stamp files in it make a second run start at once. Needed beforehand: Python >=
# 3.10 with venv, a C++20 compiler, make.
#
#   make test PYTHON=python3.12          another interpreter for .venv (default python3)
#   make py-test PYTEST_ARGS="-k pager"  part of the tests
#   make demo MOE_OFFLOAD_CUDA=ON        with the CUDA kernels also where no NVIDIA driver is
#   make gpu PARTS="test roofs"          on a GPU machine: build in place, GPU tests, benchmarks
#   make gpu TIME=400                    the same in less time after the build

PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# nvcc needs as long for _cuda as g++ for the rest, and nothing can run it without an NVIDIA driver
# (the first file; the second is WSL's): there it is left out, here only, and cuda-check builds it.
MOE_OFFLOAD_CUDA ?= $(if $(wildcard /dev/nvidiactl /dev/dxg),AUTO,OFF)
# Warnings are errors here, and only here: a user's newer compiler may know new ones.
export CMAKE_ARGS := -DMOE_OFFLOAD_WERROR=ON -DMOE_OFFLOAD_CUDA=$(MOE_OFFLOAD_CUDA)
# pip takes its versions from here in every call; the constraint must be in the same call as torch.
PIP := $(VENV)/bin/python -m pip -qq install --constraint constraints.txt

CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS = setup.py CMakeLists.txt $(wildcard cmake/*.cmake) $(filter-out csrc/tests/%,$(CPP_FILES))

.PHONY: demo test lint cpp-test py-test bench gpu cuda-check install clean
.DELETE_ON_ERROR:

demo: install
	$(VENV)/bin/python -m moe_offload demo

# Two lanes on two cores: pytest behind the installation, everything else beside it. A target's
# output appears when it is done, pytest's as it comes (a line with + is not held back).
test:
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target py-test cpp-test lint

lint: install
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)
	mypy moe_offload

cpp-test: cpp-test-address cpp-test-thread cpp-test-release

# The sanitized builds with assertions on; the release tests with the objects that were installed.
CPP_BUILD = build/$@
cpp-test-address: CPP_FLAGS := -DCMAKE_BUILD_TYPE=Debug -DMOE_OFFLOAD_SANITIZE=address
cpp-test-thread: CPP_FLAGS := -DCMAKE_BUILD_TYPE=Debug -DMOE_OFFLOAD_SANITIZE=thread
cpp-test-address cpp-test-thread: CPP_FLAGS += -G Ninja $(CMAKE_ARGS) -DMOE_OFFLOAD_PYTHON=OFF
cpp-test-release: CPP_BUILD = build/cmake-$$(python -c 'import sys; print(sys.implementation.cache_tag)')
cpp-test-release: install
.PHONY: cpp-test-release cpp-test-address cpp-test-thread
cpp-test-release cpp-test-address cpp-test-thread: $(VENV)/tools.stamp | liburing
	@mkdir -p build
	@echo "C++ tests: $(@:cpp-test-%=%)"
	@cmake -S . -B $(CPP_BUILD) $(CPP_FLAGS) -DMOE_OFFLOAD_TESTS=ON > build/$@.log \
		|| { cat build/$@.log; exit 1; }
	@cmake --build $(CPP_BUILD) --target cpp_tests --parallel $(JOBS) > build/$@.log \
		|| { cat build/$@.log; exit 1; }
	@ctest --test-dir $(CPP_BUILD) --parallel $(JOBS) --output-on-failure --no-tests=error

py-test: install
	+$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

bench: install
	$(VENV)/bin/python bench/end_to_end.py

# On a machine with a GPU, with the python3 that has torch for it: no network, no virtual
# environment. PARTS chooses (see bench/gpu/run.py), TIME is the seconds for all of them, RESULTS
# says where the JSON files go.
PARTS ?=
TIME ?= 540
RESULTS ?= bench/results
gpu: CMAKE_ARGS :=
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) bench/gpu/run.py $(PARTS) --seconds $(TIME) --results $(RESULTS)

# _cuda for every architecture: it builds, imports and passes its tests; no kernel spills, and each
# has the instructions it promises. No GPU needed.
cuda-check: install
	$(VENV)/bin/python cmake/cuda_check.py

# Named by the option: asking for another one installs again.
INSTALLED = $(VENV)/installed-cuda-$(MOE_OFFLOAD_CUDA).stamp
install: $(INSTALLED)

# io_uring is optional. Its headers are installed where apt may do so without asking (root); else
# a thread pool reads the files, and `moe-offload doctor` says so.
LIBURING := apt-get install -qq -y --no-install-recommends liburing-dev
.PHONY: liburing
liburing:
	@test -e /usr/include/liburing.h || { test "$$(id -u)" = 0 && command -v apt-get && { \
		timeout 120 $(LIBURING) || { timeout 120 apt-get update -qq && timeout 120 $(LIBURING); }; \
		}; } > /dev/null 2>&1 || echo "No liburing headers (Debian: apt install liburing-dev):" \
		"building without io_uring, a thread pool reads the files."

# Editable and not isolated, so that it compiles with the pinned tools and only what changed.
$(INSTALLED): $(VENV)/tools.stamp pyproject.toml $(BUILD_INPUTS) | liburing
	@echo "Installing moe_offload and what it needs into $(VENV); torch is the large part."
	@rm -f $(VENV)/installed-*.stamp
	@$(PIP) --no-build-isolation --editable '.[hf,dev,plots]'
	@touch $@

$(VENV)/tools.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "moe_offload needs Python >= 3.10, got \`$$($(PYTHON) --version 2>&1)\`:" \
			"run make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) and the build tools."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip setuptools pybind11 cmake ninja
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f moe_offload/*.so moe_offload/triton_kernels
