# Short names for the real commands. Everything is installed into .venv; nothing outside it changes but the cache of models.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check -q

# A file of tests goes to one process as a whole: what its tests share is made once. Those of kernels use two processors
# as they are.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help run test test-soak test-kernels test-triton36 test-jit test-cupy cupy test-cudnn test-clients test-all check bench report exports gpu-check gpu-speed docker-check clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# One stamp per set of extras: a set is installed once, and again when pyproject.toml changes. PINNED are releases that
# an environment is there for, in place of the newest.
PINNED :=

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.with-%: pyproject.toml $(VENV)/.created
	@echo "installing infera-gpu[$*] into $(VENV)"
	@$(PIP) install --editable '.[$*]' $(PINNED)
	@touch $@

run: $(VENV)/.with-server  ## fetch real models, serve them, send each a real input, leave the server running
	@$(PY) examples/demo.py

# What other targets have installed is hidden from these tests, as it is not there where nothing else was ever run.
test: $(VENV)/.with-test  ## the tests (two cores, under 15 minutes, no GPU)
	@INFERA_TEST_WITHOUT="cupy numba torch triton" $(PY) -m pytest $(SPREAD) -m "not large and not gpu and not kernels and not clients"

test-soak: $(VENV)/.with-test  ## a server under a mix of everything, for two minutes, and 10,000 requests that are none (3 minutes)
	@$(PY) -m pytest -m large tests/server/test_soak.py tests/server/test_http_fuzz.py

test-kernels: $(VENV)/.with-test $(VENV)/.with-kernels  ## the Triton kernels, no GPU: interpreted, compiled for sm_80, 86, 90 and 100, in the plans of models
	@$(PY) -m pytest -m "kernels and not large and not gpu"

# Tests that look at compiled code and at launches; of those in the interpreter some of every kind of kernel.
TRITON36      := $(wildcard tests/kernels/test_compile*.py) $(patsubst %,tests/kernels/test_%.py,assembler dependent known_differences launch tensor_maps tile_table tma_choice tuning_tables)
TRITON36_RUNS := not batch- and not gpu_ and not networks- and not operators- or operators-0

test-triton36:  ## the Triton kernels with Triton 3.6, no GPU: launched, compiled, some interpreted, in an environment of its own (.venv-triton36)
	@$(MAKE) --no-print-directory VENV=.venv-triton36 PINNED="'triton==3.6.*'" .venv-triton36/.with-test .venv-triton36/.with-kernels
	@.venv-triton36/bin/python -m pytest $(SPREAD) $(TRITON36)
	@.venv-triton36/bin/python -m pytest tests/kernels/test_interpreter.py -k "$(TRITON36_RUNS)"

test-jit:  ## the kernels that numba compiles for the CPU, in an environment of their own (.venv-jit)
	@$(MAKE) --no-print-directory VENV=.venv-jit .venv-jit/.with-test .venv-jit/.with-jit
	@.venv-jit/bin/python -m pytest $(SPREAD) -m "not large and not gpu and not kernels" tests/test_jit.py tests/test_jit_attention.py tests/test_processes.py tests/test_processes_jit.py tests/test_ops.py tests/test_models.py tests/test_session.py tests/test_quantized_models.py tests/test_slots.py tests/test_passes.py tests/test_alike.py

test-cupy:  ## what is bound to CuPy's arrays, no GPU, with CuPy for CUDA 13 and 12, in environments of their own (.venv-cupy, .venv-cupy12)
	@$(MAKE) --no-print-directory VENV=.venv-cupy CUDA=13 cupy
	@$(MAKE) --no-print-directory VENV=.venv-cupy12 CUDA=12 cupy

CUDA := 13

cupy: $(VENV)/.with-test $(VENV)/.with-cuda$(CUDA)
	@$(PY) -m pytest tests/kernels/test_real_cupy.py tests/test_portable.py tests/test_cli_doctor.py

test-cudnn:  ## what cuDNN takes of what it is asked, without a GPU, in an environment of its own (.venv-cudnn)
	@$(MAKE) --no-print-directory VENV=.venv-cudnn .venv-cudnn/.with-test .venv-cudnn/.with-kernels .venv-cudnn/.with-cudnn13
	@.venv-cudnn/bin/python -m pytest tests/test_cudnn.py tests/test_cudnn_choice.py tests/test_cudnn_attention.py tests/kernels/test_real_cudnn.py

# kserve cannot share .venv, it wants another protobuf. perf_analyzer needs glibc 2.38: where there is an older one Debian
# 13's loader and libraries are fetched for it alone. INFERA_GLIBC=folder names others.
CLIENTS_VENV := .venv-clients
CLIENTS_PIP   = $(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check -q

$(CLIENTS_VENV)/.installed:
	@echo "installing kserve, schemathesis and perf_analyzer (450 MB) into $(CLIENTS_VENV)"
	@$(PYTHON) -m venv $(CLIENTS_VENV)
	@$(CLIENTS_PIP) install kserve==0.21.0 schemathesis==4.32.5
	@$(CLIENTS_PIP) download --no-deps --only-binary=:all: --platform manylinux_2_38_x86_64 -d $(CLIENTS_VENV)/wheels perf-analyzer==2.60.0
	@$(CLIENTS_VENV)/bin/python -m zipfile -e $(CLIENTS_VENV)/wheels/perf_analyzer-*.whl $(CLIENTS_VENV)/perf
	@chmod +x $(CLIENTS_VENV)/perf/perf_analyzer/bin/perf_analyzer
	@touch $@

# Debian keeps the newest of each only: of packages.debian.org/trixie/amd64/libc6/download and the like.
DEBIAN     := https://deb.debian.org/debian/pool/main
GLIBC_DEBS := \
	b59b0625cd1a791375d40dab23a4d5d3d0641e3d0a773501becdc3725b7f99cf:g/glibc/libc6_2.41-12+deb13u5 \
	3c71917b490d1a17aed43196a2787a256ecf060526cdb20216a74bedc061b150:g/gcc-14/libgcc-s1_14.2.0-19 \
	ab1fa05837aa7a92aae748fd07a18a35f7d18bb4a71c4724fe2bbf0e32089de0:g/gcc-14/libstdc++6_14.2.0-19 \
	ffefb9af363e0e4592251b2533eb06453c8e470f7772e40263c4b2129251a6d5:o/openssl/libssl3t64_3.5.9-1~deb13u1 \
	2f6a2aeacfc925eba8b00ac9139bc4bfccf8cacb09eb93de067074b26948eef9:libz/libzstd/libzstd1_1.5.7+dfsg-1 \
	8c27c342230503b73dfde629642c3b352e87b554e06d60cf58772f236a305ceb:z/zlib/zlib1g_1.3.dfsg+really1.3.1-1+deb13u1

$(CLIENTS_VENV)/.glibc: $(CLIENTS_VENV)/.installed
	@found=$$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2); \
	if [ "$$(uname -sm)" != "Linux x86_64" ] || [ -n "$$INFERA_GLIBC" ] || [ -z "$$found" ] \
		|| [ "$$(printf '%s\n' 2.38 "$$found" | sort -V | head -n 1)" = 2.38 ]; then exit 0; fi; \
	echo "fetching Debian 13's C library (7 MB) into $(@D)/glibc: perf_analyzer needs 2.38, here is $$found"; \
	( mkdir -p $(@D)/glibc && cd $(@D)/glibc && for deb in $(GLIBC_DEBS); do \
		curl -fsSL --retry 2 -m 120 -o one.deb "$(DEBIAN)/$${deb#*:}_amd64.deb" \
		&& echo "$${deb%%:*}  one.deb" | sha256sum -c --quiet \
		&& if command -v dpkg-deb >/dev/null; then dpkg-deb -x one.deb .; else ar p one.deb data.tar.xz | tar -xJ; fi \
		|| { echo "$${deb#*:} could not be had: tests of perf_analyzer are skipped"; exit 1; }; \
	done && rm one.deb ) && touch $@ || rm -rf $(@D)/glibc

test-clients: $(VENV)/.with-test $(CLIENTS_VENV)/.installed $(CLIENTS_VENV)/.glibc  ## other people's clients: tritonclient, kserve, perf_analyzer, schemathesis
	@INFERA_GLIBC="$${INFERA_GLIBC:-$(abspath $(CLIENTS_VENV)/glibc/usr/lib/x86_64-linux-gnu)}" $(PY) -m pytest tests/clients

test-all: test test-kernels test-triton36 test-jit test-cupy test-cudnn test-clients  ## everything that needs no GPU, large models included
	@$(PY) -m pytest -m "large and not gpu"
	@$(PY) -m pytest -m hypothesis --hypothesis-profile=others

check: $(VENV)/.with-test $(VENV)/.with-dev  ## formatting, lint, types, import contracts
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

bench: $(VENV)/.with-bench  ## against onnxruntime, interleaved, 1 and 2 threads; writes bench/results
	@$(PY) -m bench $(if $(MODELS),--models $(MODELS))

report: $(VENV)/.created  ## docs/performance.md and its charts from bench/results
	@$(PY) -m bench.report

# Exporting needs frameworks that nothing else here may import: each has an environment of its own, or a Python that has
# it is named, as in PYTHON_torch=python3.
EXPORTS      ?= $(CURDIR)/.cache/exports
FRAMEWORKS   ?= torch tf paddle
$(foreach f,$(FRAMEWORKS),$(eval PYTHON_$f ?= .venv-$f/bin/python))
EXPORT_READY := $(foreach f,$(FRAMEWORKS),$(filter .venv-$f/.installed,$(PYTHON_$f:%/bin/python=%/.installed)))
EXPORT_PIP    = $(@D)/bin/python -m pip --disable-pip-version-check -q install
TORCH_INDEX  := https://download.pytorch.org/whl/cpu

.venv-torch/.installed:
	@echo "installing PyTorch (200 MB), transformers and diffusers into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(EXPORT_PIP) --retries 1 --index-url $(TORCH_INDEX) torch==2.13.0 || $(EXPORT_PIP) torch==2.13.0
	@$(EXPORT_PIP) torch==2.13.0 transformers==5.24.0 diffusers==0.42.1 onnxscript==0.7.2 onnx==1.23.2
	@touch $@

.venv-tf/.installed:
	@echo "installing TensorFlow (250 MB), transformers and tf2onnx into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(EXPORT_PIP) tensorflow-cpu==2.15.1 transformers==4.37.2 tf2onnx==1.17.0 onnx==1.16.2 "numpy<2"
	@touch $@

# Of what Paddle 3.3 saves, paddle2onnx 2.1.0 reads epsilons, slopes and padding as other numbers.
.venv-paddle/.installed:
	@echo "installing PaddlePaddle (200 MB) and paddle2onnx into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(EXPORT_PIP) paddlepaddle==3.0.0 paddle2onnx==2.1.0 onnx==1.17.0 onnx_graphsurgeon onnxruntime packaging setuptools
	@touch $@

exports: $(VENV)/.with-test $(EXPORT_READY)  ## models as exporters write them, against onnxruntime; FRAMEWORKS=torch NAMES="bert llama" for some
	@made=0; $(foreach f,$(FRAMEWORKS),$(PYTHON_$f) -m bench.exporters_$f $(EXPORTS) $(NAMES) || made=1;) \
	INFERA_EXPORTS=$(EXPORTS) $(PY) -m pytest tests/test_exporters.py && exit $$made

gpu-check:  ## needs a GPU: kernels, parity, memory, timings, with PYTHON's packages; ARGS="--only kernels" for some
	@$(PYTHON) -c 'import ml_dtypes, numpy, onnx' 2>/dev/null || { echo "nothing was checked: install 'infera-gpu[cuda12]' or '[cuda13]' for $(PYTHON), or name another Python: make PYTHON=... gpu-check"; exit 3; }
	@PYTHONPATH=.:kernels:server$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m bench.gpu_check $(ARGS)

gpu-speed:  ## needs a GPU: what claims of speed rest on, against roofline and PyTorch; ARGS="--only networks" for some
	@$(PYTHON) -c 'import ml_dtypes, numpy, onnx' 2>/dev/null || { echo "nothing was timed: see make gpu-check"; exit 3; }
	@PYTHONPATH=.:kernels:server$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m bench.gpu_speed $(ARGS)

docker-check: $(VENV)/.created  ## resolve every `pip install` line of Dockerfile.cuda without installing (downloads 1 GB)
	@$(PY) .ci/docker_check.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .venv-triton36 .venv-jit .venv-cupy .venv-cupy12 .venv-cudnn $(CLIENTS_VENV) $(FRAMEWORKS:%=.venv-%) .mypy_cache .pytest_cache .ruff_cache build dist
