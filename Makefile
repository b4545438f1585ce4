# Each target prepares .venv by itself; it needs python3 with venv, and g++ for the C++ extension.

PYTHON ?= python3
BIN := .venv/bin
COUNT ?= 2000
INSTALLED := .venv/.installed
CXX_SOURCES = $(shell find csrc tests/simt tests/codegen -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
PYTHON_SOURCES := python triton_kernels benchmarks tests build_tools setup.py
# What judges the Triton kernels: their own tests, and those every backend has to pass.
INTERPRETED := tests/triton $(addprefix tests/test_,$(addsuffix .py,matrix generated_problems adversarial exact_properties \
	bounded_properties gradient_laws corners packed))
BUILDS := tests/packaging tests/mutants tests/simt tests/gpu tests/codegen

# Here an extension that does not compile is a failure; auto, pip's default, installs without it.
export FUSED_ATTENTION_CPU ?= 1

.DEFAULT_GOAL := help
.PHONY: help install bench test test-compiled test-interpreted test-builds mutants fuzz fuzz-compiled fuzz-interpreted codegen sanitize cross gpu lint format wheel clean

help:
	@echo 'make bench    check and time attention on this machine'
	@echo 'make test     the whole test suite'
	@echo 'make lint     ruff, mypy, clang-format'
	@echo 'make mutants  faults planted in the Triton and C++ kernels, which the tests must notice'
	@echo 'make fuzz     thousands of generated problems, COUNT=2000 of them'
	@echo 'make codegen  what the Triton and CUDA kernels compile to, for every architecture'
	@echo 'make sanitize the C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer, and between guard pages'
	@echo 'make cross    compile the C++ kernels for ARM and for macOS'
	@echo 'make gpu      prove and time everything on this machine'"'"'s NVIDIA GPU, in under 9 minutes'
	@echo 'make format   let ruff and clang-format rewrite the sources'
	@echo 'make wheel    dist/*.tar.gz, and dist/*.whl built from it'
	@echo 'make clean    remove what builds and tests left behind'

install: $(INSTALLED)

bench: $(INSTALLED)
	$(BIN)/fused-attention bench

# Faults planted in the kernels, one by one, which their tests have to notice.
mutants: $(INSTALLED)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m tests.mutants.run_kernel_mutants
	$(BIN)/python -m tests.mutants.run_cpu_mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simt.mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simt.shared
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simt.shared --dtype bfloat16

# Generated problems, beyond those of every test run: interpreted Triton on one core, the other backends on another.
fuzz: $(INSTALLED)
	$(MAKE) --jobs=2 fuzz-compiled fuzz-interpreted

fuzz-compiled: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --first 1000 --count $(COUNT)

fuzz-interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m tests.fuzz --first 1000 --count $(COUNT) --backend triton

# Every Triton kernel compiled for every architecture, under both versions of Triton that are supported, and every CUDA kernel, where there
# is an nvcc, against their ledgers.
codegen: $(INSTALLED) build/codegen/.installed
	$(BIN)/python -m tests.codegen.ledger
	$(BIN)/python -m tests.codegen.fits
	build/codegen/venv/bin/python -m tests.codegen.ledger
	build/codegen/venv/bin/python -m tests.codegen.fits
	$(BIN)/python -m tests.codegen.hopper
	build/codegen/venv/bin/python -m tests.codegen.hopper
	$(BIN)/python -m tests.codegen.cuda_ledger

build/codegen/.installed: tests/codegen/constraints-triton-3.6.txt
	test -x build/codegen/venv/bin/python || $(PYTHON) -m venv build/codegen/venv
	build/codegen/venv/bin/python -m pip install -c $< torch triton numpy
	@touch $@

# Builds of their own in build/sanitize: the installed module stays as it is.
sanitize: $(INSTALLED)
	$(BIN)/python -m tests.sanitize.run

# zig brings a clang and the headers of every system.
cross: $(INSTALLED) build/ziglang/.installed
	$(BIN)/python -m tests.sanitize.cross

build/ziglang/.installed:
	test -x build/ziglang/venv/bin/python || $(PYTHON) -m venv build/ziglang/venv
	build/ziglang/venv/bin/python -m pip install ziglang==0.17.1
	@touch $@

# In the machine's own Python, which has torch with CUDA, triton and pytest: nothing is installed.
gpu:
	$(PYTHON) tests/gpu/run.py $(GPU_OPTIONS)

# Three processes, two at a time: in one Triton interprets its kernels, which it must know before it is imported.
test: $(INSTALLED)
	$(MAKE) --jobs=2 --output-sync=target test-compiled test-interpreted test-builds

test-compiled: $(INSTALLED)
	$(BIN)/pytest $(addprefix --ignore=,$(BUILDS))

# What compiles the sources again, installs them or runs them elsewhere.
test-builds: $(INSTALLED)
	$(BIN)/pytest $(BUILDS)

test-interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/pytest $(INTERPRETED) -k triton

lint: $(INSTALLED)
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES)

wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks python/*.egg-info
	rm -f python/fused_attention/_*.so python/fused_attention/_build_info.py $(INSTALLED)
	find $(PYTHON_SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# An editable install compiles once, so what goes into the extension goes into the stamp.
$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard build_tools/*.py) $(CXX_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench,test,triton,dev,examples,transformers]'
	@$(BIN)/fused-attention info
	@touch $@
