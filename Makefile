# One virtual environment, .venv, made by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := pretrained/hazelnut
PICTURES := training/data/hazelnut_toy/hazelnut/test
TRAIN := $(BIN)/accelerate launch --num_processes 1 training/train.py

# A file at a time in each of two workers.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all quality docs space train-hazelnut train-hazelnut-fast evaluate clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch alone and first: its exact version decides whether gigabytes of CUDA come along.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,demo,export,docs,dev]"
	touch $@

demo: $(VENV)/installed  ## find the defects in the shipped pictures
	$(BIN)/diffusionad predict $(PICTURES) --model $(MODEL) --output demo_output --panels --overwrite

test: $(VENV)/installed  ## the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed  ## the others
	$(PYTEST) -m slow

test-all: test test-slow

quality: $(VENV)/installed  ## lint, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed  ## the documentation as a web site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

space: $(VENV)/installed  ## the Gradio demo on this machine
	$(BIN)/python spaces_demo/app.py

train-hazelnut: $(VENV)/installed  ## train the shipped model again, in two runs (on, after an interruption)
	$(TRAIN) --config training/configs/hazelnut_first.yaml --output_dir runs/hazelnut_first --resume_from_checkpoint latest
	$(TRAIN) --config training/configs/hazelnut.yaml --output_dir runs/hazelnut --resume_from_checkpoint latest

train-hazelnut-fast: $(VENV)/installed  ## train the fast model again: a teacher, then its student
	$(TRAIN) --config training/configs/hazelnut_tiny.yaml --output_dir runs/hazelnut_tiny --resume_from_checkpoint latest
	$(TRAIN) --config training/configs/hazelnut_fast.yaml --output_dir runs/hazelnut_fast --resume_from_checkpoint latest

evaluate: $(VENV)/installed  ## the figures of the README
	$(BIN)/diffusionad evaluate --model $(MODEL) --data training/data/hazelnut_toy/hazelnut --output evaluation

clean:
	rm -rf $(VENV) demo_output evaluation site
