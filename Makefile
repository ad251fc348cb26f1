# `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= newest
# Which stack of MMDetection; empty keeps the environment's, or takes the one that works here.
STACK ?=
# Which tests; empty is all.
TESTS ?=
# A PYTHON that was asked for is not dropped for that of an environment that is there.
SETUP := $(PYTHON) tools/setup_env.py $(if $(filter command environment,$(origin PYTHON)),--this-python)
PYTEST := -m pytest --numprocesses 2 --dist loadfile $(TESTS)
DEMO := work_dirs/demo
DEMO_3D := work_dirs/demo_3d

.DEFAULT_GOAL := help
.PHONY: help setup setup-3d demo demo-3d docs test test-core test-stack test-detectron2 clean

help:
	@echo "make demo    set up, train configs/retinanet_poly1.py on the built-in pictures and"
	@echo "             print its COCO table: about 5 minutes on 2 cores once it is set up"
	@echo "make demo-3d set up, train configs/pointpillars_poly1_kitti.py on simulated LiDAR scans and"
	@echo "             print its KITTI table: about 6 minutes on 2 cores once it is set up"
	@echo "make test    set up, then lint, formatting, types and tests: about 22 minutes"
	@echo "make test-core TORCH=2.1.2       the tests on another torch, without a framework"
	@echo "make test-stack STACK=torch21    the tests on another stack: torch21, onedl or upstream"
	@echo "make test-detectron2 PYTHON=...  the tests with the Detectron2 of that Python"
	@echo "             each in an environment of its own, .venv-..., which is kept"
	@echo "make docs    set up, then build the documentation of docs/ into site/: seconds"
	@echo "make setup   create .venv with everything in it: about 4 minutes on 2 cores"
	@echo "             the first time, a second when it is there"
	@echo "make setup-3d  the same and MMDetection3D: half a minute more"
	@echo "             PYTHON=python3.12 STACK=onedl choose the Python and the stack: docs/install.md"
	@echo "make clean   remove work_dirs/ (trained models, logs, pictures) and site/; .venv stays"

setup:
	@$(SETUP) $(if $(STACK),--stack $(STACK))

setup-3d:
	@$(SETUP) $(if $(STACK),--stack $(STACK)) --3d needed

demo: setup
	@echo "* training on the built-in pictures (about 5 minutes on 2 cores)"
	.venv/bin/python tools/train.py configs/retinanet_poly1.py --demo --work-dir $(DEMO)

demo-3d: setup-3d
	@echo "* training on simulated LiDAR scans (about 6 minutes on 2 cores)"
	.venv/bin/python tools/train.py configs/pointpillars_poly1_kitti.py --demo --work-dir $(DEMO_3D)

docs: setup
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
	@echo "* site/index.html; with search: .venv/bin/python -m http.server --directory site"

test:
	@$(SETUP) $(if $(STACK),--stack $(STACK)) --3d where-possible
	@echo "* lint, formatting and types (a minute)"
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	@echo "* tests (about 20 minutes on 2 cores)"
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST)

test-core:
	@$(SETUP) --into .venv-core-$(TORCH) --core $(TORCH)
	OMP_NUM_THREADS=1 .venv-core-$(TORCH)/bin/python $(PYTEST)

test-stack:
	@$(if $(STACK),,echo "error: name the stack: make test-stack STACK=torch21" >&2; exit 2)
	@$(SETUP) --into .venv-$(STACK) --stack $(STACK)
	OMP_NUM_THREADS=1 .venv-$(STACK)/bin/python $(PYTEST)

test-detectron2:
	@$(SETUP) --into .venv-detectron2 --detectron2
	OMP_NUM_THREADS=1 .venv-detectron2/bin/python $(PYTEST)

clean:
	rm -rf work_dirs site
