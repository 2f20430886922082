# demo, check and test set up everything they need in .venv; gpu uses the python3 that is there.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 3  # one more than cores: some tests wait for what they started
# A file stays with one process, for what its tests share; those that take longest begin first (tests/conftest.py).
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f)
export FASTDISTILL_ISA ?= native

.PHONY: demo check fast test lowest bench lint style types gpu gpu-sanitize build clean

demo: $(VENV)/ready
	$(BIN)/fastdistill stark --task docstrings --teacher minilm --student-layers 2 --sparsity 0.2,0.4,0.6 --epochs 2 --output runs/demo

# Everything but the tests marked slow, beside mypy, which without a cache has work for one core alone.
check: style
	$(MAKE) --jobs 2 types fast

fast: $(VENV)/ready
	$(BIN)/$(PYTEST) -m "not slow"

test: $(VENV)/ready
	$(BIN)/$(PYTEST)

# The fast tests with the lowest versions that pyproject.toml allows. Of torch that is the version that all else is
# tested with, so that what was compiled serves here, too, and the ops need no second look.
lowest: $(VENV)/ready .venv-lowest/ready
	.venv-lowest/bin/$(PYTEST) -m "not slow" --ignore=tests/ops --ignore=tests/kernels --ignore=tests/cuda

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	FASTDISTILL_REQUIRE_NATIVE=0 .venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt -e '.[dev]'
	touch $@

bench: $(VENV)/ready
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=runs/benchmarks.json
	$(BIN)/python -m benchmarks.report runs/benchmarks.json

lint: style types

style: $(VENV)/ready
	$(BIN)/ruff check .

types: $(VENV)/ready
	$(BIN)/mypy

# Builds, tests and measures on the GPU of this machine; installs nothing from outside. ONLY=kd_ce_loss: of one op;
# OUTPUT: folder of the results; STAGES=benchmarks: without tests and recipes; MINUTES: stop after so many.
gpu: build/gpu
	python3 -m benchmarks.gpu $(if $(ONLY),--only $(ONLY)) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(STAGES),--stages $(STAGES)) $(if $(MINUTES),--minutes $(MINUTES))

# tests/cuda under compute-sanitizer, where there is one.
gpu-sanitize: build/gpu
	python3 -m benchmarks.sanitize $(if $(ONLY),--only $(ONLY))

build/gpu: pyproject.toml setup.py $(NATIVE)
	python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
	mkdir -p build
	touch $@

# Rebuilds what changed, where it stands.
build: $(VENV)/ready
	$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/ready: pyproject.toml setup.py $(CONSTRAINTS) $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch ninja pybind11 setuptools wheel
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf build runs $(VENV) .venv-lowest fastdistill/*.so fastdistill/_build.json *.egg-info
