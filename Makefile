# `make app` and `make test` do all the set-up on a fresh machine with Python 3.11 to 3.14; `make help` lists the rest.
# A second run installs nothing: the stamps in .venv are younger than the files that say what to install.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
APP_STAMP := $(VENV)/.app
TEST_STAMP := $(VENV)/.test
BROWSER_STAMP := $(VENV)/.browser
COMPACT_STAMP := $(VENV)/.compact
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.bench
UPGRADE := .venv-upgrade
MILVUS := .venv-milvus
MILVUS_STAMP := $(MILVUS)/.milvus

# PYTHON: the interpreter behind .venv; the first of these that is new enough.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.14 python
# TORCH_INDEX: where to take PyTorch from, if not from where pip looks anyway; docs/install.md says when that is worth it.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# ARGS: passed on to the command, as in `make app ARGS="--photos ~/Pictures"`.
ARGS ?=

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help app test test-long test-scale upgrade-check lint audit format docs gallery compact bench bench-train

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

app: $(APP_STAMP)  ## open the app on http://127.0.0.1:7860 (GRADIO_SERVER_PORT=8000 make app: another port)
	$(BIN)/python app.py $(ARGS)

test: $(TEST_STAMP) $(BROWSER_STAMP)  ## check style, floors, names, types and known vulnerabilities, then run every test
	@$(MAKE) --no-print-directory audit & $(MAKE) --no-print-directory lint && wait $$!  # one waits for the network
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(TEST_STAMP) $(BROWSER_STAMP)  ## kill builds and trainings, run torchrun, build the wheel, keep the app under load: some half an hour
	$(BIN)/pytest tests/long $(ARGS)

test-scale: $(TEST_STAMP) $(MILVUS_STAMP)  ## run the index on a real Milvus server, started from pip in an environment of its own
	$(BIN)/pytest tests/scale $(ARGS)

# What relies on the inside of another package; one that was renamed fails here at once.
CONTRACTS := tests/test_gradio_internals.py tests/test_model.py tests/test_model_composition.py tests/test_zerogpu.py \
  tests/test_openvino.py tests/test_train_trainer_internals.py tests/test_index_server.py

SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

upgrade-check: $(TEST_STAMP)  ## test with the newest gradio, transformers, openvino and pymilvus in an environment of its own
	$(BIN)/python -m venv --clear $(UPGRADE)
	$(BIN)/python $(SITE) > "$$($(UPGRADE)/bin/python $(SITE))/tested.pth"  # all others are those of .venv
	$(UPGRADE)/bin/python -m pip install --upgrade "gradio[mcp]" transformers openvino pymilvus
	$(UPGRADE)/bin/python -m pytest $(CONTRACTS) $(ARGS)

lint: $(TEST_STAMP)  ## check style, floors, names, sizes and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python tests/layout.py
	$(BIN)/mypy

audit: $(TEST_STAMP)  ## look the packages up among the known vulnerabilities; without a network it says that it could not
	@$(BIN)/python tests/audit.py

format: $(TEST_STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: $(APP_STAMP)  ## write the tables of the documentation that repeat the code
	$(BIN)/python docs/tables.py

gallery: $(APP_STAMP)  ## rebuild the starter gallery after the model has changed
	$(BIN)/python -m alignment.gallery build assets/gallery/sources --out assets/gallery $(ARGS)

# DATA: a folder that holds these; FLICKR8K=... and so on where they lie elsewhere.
FLICKR8K ?= $(DATA)/flickr8k
FLICKR8K_CN ?= $(DATA)/flickr8k-cn/flickr8kzhc.caption.txt
COCO ?= $(DATA)/coco
ADE20K ?= $(DATA)/ade20k

compact: $(COMPACT_STAMP)  ## retrain the compact model: make compact DATA=folder/with/flickr8k/and/the/others
	@test -d "$(FLICKR8K)" || { echo 'Say where the training data is: make compact DATA=path' >&2; exit 1; }
	$(BIN)/python -m alignment.compact --data "$(FLICKR8K)" "$(COCO)" "$(ADE20K)" --chinese "$(FLICKR8K_CN)" \
	  --out checkpoints/compact $(ARGS)

bench: $(APP_STAMP) $(BENCH_STAMP)  ## compare encoding, indexing and search with the peers: make bench ARGS="--out table.md"
	PYTHONPATH=. $(BENCH)/bin/python tests/benchmarks/bench.py $(ARGS)

bench-train: $(BENCH_STAMP)  ## compare training speed with transformers' example and open_clip
	PYTHONPATH=. $(BENCH)/bin/python tests/benchmarks/training_speed.py $(ARGS)

$(BIN)/python:
	@for python in $(PYTHON); do \
	  "$$python" -c '$(SUPPORTED)' 2>/dev/null || continue; \
	  echo "Creating $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) && exit 0; \
	  rm -rf $(VENV); \
	  echo "$$python cannot create a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; \
	done; \
	echo "Python 3.11, 3.12, 3.13 or 3.14 is needed; found none among: $(PYTHON)." >&2; \
	if command -v python3 >/dev/null; then echo "python3 here is $$(python3 --version 2>&1)." >&2; fi; \
	echo "Install a newer one, or name it: make app PYTHON=/path/to/python3.12" >&2; \
	exit 1

# PyTorch by its exact version first: pip then takes a CPU build where it is offered one, and keeps it afterwards.
$(APP_STAMP): requirements.txt | $(BIN)/python
	@$(BIN)/python -c '$(SUPPORTED)' || { echo "$(VENV) has $$($(BIN)/python --version); Python 3.11 to 3.14 is needed. Delete $(VENV) and run make again." >&2; exit 1; }
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) install -r requirements.txt
	@touch $@

$(TEST_STAMP): pyproject.toml $(APP_STAMP)
	$(PIP) install -e ".[test]"
	$(PIP) install --no-deps open_clip_torch==3.3.0  # its losses are a reference; its torchvision and timm stay away
	@touch $@

$(COMPACT_STAMP): pyproject.toml $(APP_STAMP)
	$(PIP) install -e ".[compact]"
	@touch $@

# An environment of its own: the peers need torchvision, and with it transformers would take another way to the pixels.
# torch and torchvision come together, whatever pair pip finds; ours runs from the source beside them.
$(BENCH_STAMP): pyproject.toml requirements.txt | $(BIN)/python
	$(BIN)/python -m venv --clear $(BENCH)
	grep -v '^torch' requirements.txt > $(BENCH)/requirements.txt
	$(BENCH)/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(BENCH)/bin/python -m pip install -r $(BENCH)/requirements.txt "open_clip_torch[training]==3.3.0" "datasets>=5.0,<6" \
	  "accelerate>=1.15,<2" "matplotlib>=3.10,<4" "peft>=0.21,<0.22" "tensorboard>=2.20,<3" \
	  "sentence-transformers>=6.2,<7" "onnxruntime>=1.32,<2" "onnx>=1.23,<2" "onnxscript>=0.7,<0.8" \
	  "faiss-cpu>=1.15,<2" "usearch>=2.26,<3" "ftfy>=6.3,<7" "pi-heif>=1.1,<2"
	$(BENCH)/bin/python -m pip install --no-deps --ignore-requires-python "rclip==3.3.0"  # it asks for an old numpy
	@touch $@

# A database server without a container or a root account. It is offered for few machines.
$(MILVUS_STAMP): | $(BIN)/python
	$(BIN)/python -m venv --clear $(MILVUS)
	$(MILVUS)/bin/python -m pip install "milvus==2.3.5" || { \
	  echo "milvus 2.3.5, the server that the tests start, is not offered for $$(uname -sm) with $$($(BIN)/python --version)." >&2; \
	  echo "make test-scale runs on Linux x86-64 with any Python from 3.11 on." >&2; exit 1; }
	@touch $@

# The browser tests take `chromium` from the PATH, else Playwright's own; the Chinese page needs a font as well.
$(BROWSER_STAMP): $(TEST_STAMP)
	@system=$$(. /etc/os-release 2>/dev/null && echo "$$ID"); \
	if [ "$$(id -u)" = 0 ]; then root=env; elif sudo -n true 2>/dev/null; then root="sudo -n env"; else root=; fi; \
	if command -v chromium >/dev/null && fc-list :lang=zh 2>/dev/null | grep -q .; then \
	  echo "Browser: $$(command -v chromium)"; \
	elif [ "$$system" = debian ] && [ -n "$$root" ] && $$root apt-get update && \
	  $$root DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium fonts-noto-cjk fontconfig curl; then \
	  echo "Browser: $$(command -v chromium)"; \
	elif [ "$$system" = ubuntu ] && [ -n "$$root" ]; then \
	  $(BIN)/playwright install --with-deps chromium; \
	else \
	  $(BIN)/playwright install chromium; \
	fi
	@touch $@
