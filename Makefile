# Every target does its own set-up: a .venv with the dependencies and the built extension.
# On a GPU machine without package registries: make gpu PYTHON=/path/to/python-with-cuda-torch
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
TORCH := torch==2.13.0
STAGE ?= all
export MAX_JOBS ?= 2

.PHONY: setup demo test fuzz sanitize inspect bench gate gpu lint clean

setup: $(STAMP)

# torch first, so that nothing pulls another build of it; then the extension against its headers
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.* csrc/*/*/*.*)
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --upgrade "pip>=24" "setuptools>=77" wheel cmake ninja numpy
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q --no-build-isolation -e ".[dev,plot]"
	$(PY) -m pip install -q --no-deps k-diffusion  # for the parity tests; most of what it depends on they do not need
	touch $@

demo: setup
	$(PY) -m genengine env
	$(PY) -m genengine demo

test: setup
	$(PY) -m ruff check .
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not emulated"

# The property tests of every op with at least 2,000 fresh cases each; a failure prints how to reproduce it.
fuzz: setup
	$(PY) -m pytest -q -n 2 -m fuzz --hypothesis-profile=fuzz

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
sanitize: setup
	bash tools/sanitize.sh $(PY)

# What can be known of GPU code without a GPU: blocks of threads run with their instructions emulated, then every kernel
# compiled for its architectures (needs nvcc) and its machine code read. The records, as one table, go to
# build/machine_code.md, and from there into benchmarks/results when a kernel changes.
inspect: setup
	$(PY) -m pytest -q -n 2 --dist loadfile -m emulated
	mkdir -p build
	$(PY) tools/inspect_gpu.py --table build/machine_code.md

# The quick suite, with a page of plots; ARGS="--compare FILE" and others are passed on. `pytest benchmarks/` runs the same
# rows under pytest-benchmark.
bench: setup
	$(PY) -m genengine bench quick --budget 0.5 --save out/bench --html out/bench/quick.html $(ARGS)

# Fails if a ratio to eager got worse: a short, robust subset, against the stored result of this machine or another's.
gate: setup
	$(PY) -m genengine bench gate --budget 1 --compile none --compare benchmarks/results --threshold 0.25 --strict

# Verifies, tests, benchmarks and profiles on a CUDA machine, in stages that can be resumed (tools/gpu.sh). With PYTHON=
# given, no .venv and no registry are needed.
gpu: $(if $(PYTHON),,setup)
	bash tools/gpu.sh $(or $(PYTHON),$(PY)) $(STAGE)

lint: setup
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) build dist *.egg-info genengine/_C.abi.so genengine/_build.json
