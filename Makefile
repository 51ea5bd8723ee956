# `make help` lists the targets. `make train` and `make test` set up a fresh machine themselves.
#   ARGS    more arguments for train, train-pixels, demo-remote, test, bench and doctor:  make train ARGS="--seed 1 -n 50000"
#   TORCH   what pip installs:  make test TORCH="torch==2.13.0 --index-url <PyTorch's index for CPU builds>"
#   PYTHON  interpreter for the virtual environments, 3.10 to 3.12;  VENV, TEACHER_VENV  where they lie
VENV ?= .venv
TEACHER_VENV ?= .venv-teacher
TORCH ?= $(shell grep '^torch==' constraints.txt)
PYTHON ?=
ARGS ?=
export PYTHON
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.rpd_sb3-installed
TEACHER_INSTALLED := $(TEACHER_VENV)/.rpd_sb3-installed
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help train train-pixels demo-remote test test-slow check format check-format lint type bench doctor system vulkan clean
.NOTPARALLEL:

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

train: $(INSTALLED)  ## distil a noisy teacher into a student on PickCube
	$(RUN) -m rpd_sb3.train --algo rpd_ppo --env PickCube-v1 --section noisy-teacher $(ARGS)

train-pixels: $(INSTALLED)  ## the same from a camera, without noise: PickCube from 64 x 64 pixels, to an exported expert
	scripts/train_pixels.sh $(RUN) $(ARGS)

demo-remote: $(INSTALLED) $(TEACHER_INSTALLED)  ## the same, with the teacher behind HTTP in an environment without torch
	scripts/demo_remote.sh $(RUN) $(TEACHER_VENV)/bin/python $(ARGS)

test: check-format lint type  ## the gate: formatting, lint, types, tests
	$(PYTEST) $(ARGS)

test-slow: $(INSTALLED)  ## the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

check: format test  ## format, then the gate

format: $(INSTALLED)  ## rewrite the code in the house format
	$(RUN) -m ruff check --fix-only --quiet .
	$(RUN) -m ruff format .

check-format: $(INSTALLED)
	$(RUN) -m ruff format --check .

lint: $(INSTALLED)  ## ruff
	$(RUN) -m ruff check .

type: $(INSTALLED)  ## mypy
	$(RUN) -m mypy

bench: $(INSTALLED)  ## every script in benchmarks/
	set -e; for file in benchmarks/*.py; do $(RUN) "$$file" $(ARGS); done

doctor: $(INSTALLED)  ## what works on this machine, and how to fix the rest
	$(RUN) -m rpd_sb3.doctor $(ARGS)

system:  ## system packages (needs root once): venv, OpenCV's libraries, a Vulkan driver
	@scripts/system.sh

vulkan:  ## a Vulkan driver, if none works
	@scripts/vulkan.sh

clean:  ## remove what make has made; run folders stay
	rm -rf $(VENV) $(TEACHER_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.cfg constraints.txt | system
	scripts/venv.sh $(VENV) $(TORCH)
	@touch $@

$(TEACHER_INSTALLED): setup.cfg constraints.txt | system
	scripts/teacher_venv.sh $(TEACHER_VENV)
	@touch $@
