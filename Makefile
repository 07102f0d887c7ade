# make demo: install, and segment a picture.   make test: install, and run the tests.
# make kernel: compile the deformable-attention kernel for the PyTorch of this environment.
PYTHON ?= python3
VENV ?= .venv
# What pip installs as PyTorch: "torch" is the newest build; a pinned one may be smaller.
TORCH ?= torch
EXTRAS ?= dev
PYTEST_ARGUMENTS ?=
KERNEL_ARGUMENTS ?=
BIN := $(VENV)/bin

.PHONY: demo test kernel style quality clean

demo: $(VENV)/.installed-demo
	$(BIN)/proscale segment examples/scene.png --output overlay.png --json segments.json

test: $(VENV)/.installed-$(EXTRAS)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGUMENTS)

# The compiled deformable attention for this PyTorch, in kernels/ms_deform_attn/build: where PROSCALE_KERNEL_DIR may point.
kernel: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python kernels/ms_deform_attn/build.py $(KERNEL_ARGUMENTS)

style: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-$(EXTRAS): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) overlay.png segments.json
