# Every target makes .venv in the project's root if it is missing; nothing else needs to be installed by hand.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Small networks on small images: a second thread brings next to nothing, and beside a busy process one that spins or
# sleeps costs 1.5 to 4 times the step (`python -m tests.integration.threads`).
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# A marker for each set of extras that a target installs, into one and the same environment.
INSTALLED := $(VENV)/.installed-dev

.PHONY: help install quickstart quickstart-detection lint docs test test-slow test-wheel test-compat test-kill test-asan
.PHONY: test-mutants test-clients gpu format clean

help:
	@echo "make quickstart   install, train RevBiFPN on real digits, print accuracy and memory (CPU, minutes)"
	@echo "make quickstart-detection   the same for a detector: Faster R-CNN finds the digits in scenes"
	@echo "make test         lint, types and the quick tests;  make test-slow: the long ones"
	@echo "make docs         the documentation as a site, in output/site: warnings are errors, nothing is fetched"
	@echo "make test-wheel   a wheel in an environment of its own: import, profile, train, detect"
	@echo "make test-compat  the quick tests on other versions: make test-compat PYTHON=python3.13 TORCH=2.9"
	@echo "make test-kill    50 runs killed at random moments, and compared with one that was let be"
	@echo "make test-asan    the C++ kernel under AddressSanitizer (g++), at three widths, with VNNI and without"
	@echo "make test-mutants small faults put into copies of the sources: the share that the quick tests see"
	@echo "make test-clients   other people's software on our networks (extra [clients], an environment of its own)"
	@echo "make gpu          everything that only a GPU shows, in 8 minutes: docs/gpu.md"
	@echo "make format       rewrite the sources as ruff wants them"

install: $(INSTALLED)

# Some extras hold others: WITHIN_x are those that x brings.
WITHIN_dev := quickstart detection deploy docs
WITHIN_detection := quickstart
$(VENV)/.installed-%: pyproject.toml setup.py .ci/constraints.txt
	@test -n "$(PYTHON)" || { echo "python3 (3.10 to 3.13) was not found on PATH: install it, or run make PYTHON=/path/to/python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[$*]"
	@touch $@ $(patsubst %,$(VENV)/.installed-%,$(WITHIN_$*))

quickstart: $(VENV)/.installed-quickstart
	@$(ONE_THREAD) $(BIN)/python -m classification.quickstart

quickstart-detection: $(VENV)/.installed-detection
	@$(ONE_THREAD) $(BIN)/python -m detection.quickstart

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# One process per core, one thread each: threads of several processes on one core cost more than they bring.
# One that dies ends the run: xdist starts another, and may then wait for ever.
test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 2 --max-worker-restart 0 --dist loadfile

# A fresh environment, 5 GB; BORROW=1 takes the packages of .venv instead, in a minute.
test-wheel: $(INSTALLED)
	$(BIN)/python -m tests.integration.wheel --folder output/wheel $(if $(BORROW),--borrow)

# One environment per pair of versions, 5 GB each. torchvision names its torch exactly, so pip takes the one that fits.
TORCH ?= 2.9
COMPAT := .compat/$(notdir $(PYTHON))-torch$(TORCH)
test-compat:
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH).*" --editable ".[dev]"
	$(COMPAT)/bin/python -m pytest -m "not slow"

test-kill: $(INSTALLED)
	$(BIN)/python -m tests.integration.kill --kills 50 --folder output/kills

# Tensors lie in memory that the sanitizer watches: a read or write past one ends the run. Leaks are Python's affair.
# The kernel is built before the tests: without one they would be skipped, and prove nothing.
LIBRARY = $(shell g++ -print-file-name=$(1))
# TBB (in OpenVINO) opens libraries in a way that the sanitizer ends the process for, unless it is told of it.
test-asan: $(INSTALLED)
	export REVNETS_CXX=g++ REVNETS_CACHE=$(CURDIR)/output/asan ASAN_OPTIONS=detect_leaks=0 TBB_ENABLE_SANITIZERS=1; \
	export LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libstdc++.so)"; \
	for width in "" -mno-avx512vnni -mno-avx512f -mno-avx; do \
		export REVNETS_CXXFLAGS="-fsanitize=address -O1 -g1 $$width"; \
		$(BIN)/python -c "from revnets.kernels.build import byte_target, kernel_target; print('the kernel for', kernel_target(), 'and', byte_target())" && \
		$(BIN)/python -m pytest -m "not slow" tests/kernels tests/deploy || exit; \
	done

# ONLY names areas or faults, JOBS how many copies are tried at once: make test-mutants ONLY=mm JOBS=2
test-mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants $(addprefix --only ,$(ONLY)) $(addprefix --jobs ,$(JOBS))

# In an environment of its own, so that no client's wishes change what `make test` runs with.
CLIENTS := .compat/clients
test-clients:
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[clients]" pytest pillow
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(CLIENTS)/bin/python -m pytest tests/clients

# On a machine that is lent for minutes nothing can be installed: its own python3 does, where there is no .venv.
GPU_OUTPUT ?= output/gpu
MINUTES ?= 8
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m revnets.cli gpu-report --output $(GPU_OUTPUT) --minutes $(MINUTES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .compat output .pytest_cache .mypy_cache .ruff_cache .hypothesis
