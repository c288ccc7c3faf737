# Every target sets up what it needs in .venv.  TORCH pins the build that is tested.
TORCH ?= 2.13.0
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp

.PHONY: demo occfm-demo test lint wheel compat-build gpu-check clean

demo: $(STAMP)-demo  ## distil the digits teacher into one step and show the result
	$(BIN)/mfd-fast info
	$(BIN)/mfd-fast distill digits

occfm-demo: $(STAMP)-demo  ## train, distil and measure a small occupancy forecaster on made-up scenes
	bash scripts/occfm_demo.sh $(OUT)

test: $(STAMP)-test  ## lint and the whole test suite; needs no GPU
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # one worker a core: two threads each would fight
	OMP_NUM_THREADS=1 MFD_FAST_BACKEND=reference $(BIN)/python -m pytest -n 2 \
	  -m 'not slow and not gpu' -k 'not triton' $(REFERENCE_TESTS)

# What is computed by operators alone, once more without the extension: a minute.
REFERENCE_TESTS := $(filter-out %cuda.py %cuda_compile.py %cuda_on_host.py,$(wildcard tests/ops/*.py)) \
  tests/flow $(patsubst %,tests/distill/test_%.py,gradients graphs distiller) \
  $(patsubst %,tests/baselines/test_objective_%.py,matching maps)

lint: $(STAMP)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' \
	  'tests/support/cuda_host/*')

wheel: $(STAMP)-torch  ## dist/*.whl; CUDA operators too where torch and nvcc have CUDA, MFD_CUDA=OFF: without
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

compat-build:  ## build _C with CUDA for old and new torch, import it, test it on the oldest; no GPU
	bash scripts/compat_build.sh $(VERSIONS)

gpu-check:  ## on a machine with an NVIDIA GPU: build, graphs, headline, gpu tests; then docs/gpu.md
	bash scripts/gpu_check.sh $(or $(OUT),gpu-check-out) first

$(STAMP)-torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip setuptools cmake ninja
	$(BIN)/pip install -q torch==$(TORCH)
	touch $@

# The extension is rebuilt when its sources change; the Python files are used in place (editable).
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

$(STAMP)-demo: $(STAMP)-torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[digits,occfm]'
	touch $@

$(STAMP)-test: $(STAMP)-torch $(SOURCES)
	MFD_WERROR=ON $(BIN)/pip install -q --no-build-isolation -e '.[test,dev]'
	touch $@ $(STAMP)-demo

clean:
	rm -rf build .venv *.egg-info mfd_fast/*.so
