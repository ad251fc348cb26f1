# `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
DEMO := work_dirs/demo
DEMO_3D := work_dirs/demo_3d

.DEFAULT_GOAL := help
.PHONY: help setup setup-3d demo demo-3d docs test clean

help:
	@echo "make demo    set up, train configs/retinanet_poly1.py on the built-in pictures and"
	@echo "             print its COCO table: about 5 minutes on 2 cores once it is set up"
	@echo "make demo-3d set up, train configs/pointpillars_poly1_kitti.py on simulated LiDAR scans and"
	@echo "             print its KITTI table: about 6 minutes on 2 cores once it is set up"
	@echo "make test    set up, then lint, formatting, types and tests: about 9 minutes"
	@echo "make docs    set up, then build the documentation of docs/ into site/: seconds"
	@echo "make setup   create .venv with everything in it: about 4 minutes on 2 cores"
	@echo "             the first time, a second when it is there"
	@echo "make setup-3d  the same and MMDetection3D: half a minute more"
	@echo "make clean   remove work_dirs/ (trained models, logs, pictures) and site/; .venv stays"

setup:
	@$(PYTHON) tools/setup_env.py

setup-3d:
	@$(PYTHON) tools/setup_env.py --3d

demo: setup
	@echo "* training on the built-in pictures (about 5 minutes on 2 cores)"
	.venv/bin/python tools/train.py configs/retinanet_poly1.py --demo --work-dir $(DEMO)

demo-3d: setup-3d
	@echo "* training on simulated LiDAR scans (about 6 minutes on 2 cores)"
	.venv/bin/python tools/train.py configs/pointpillars_poly1_kitti.py --demo --work-dir $(DEMO_3D)

docs: setup
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
	@echo "* site/index.html; with search: .venv/bin/python -m http.server --directory site"

test: setup-3d
	@echo "* lint, formatting and types (a minute)"
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	@echo "* tests (about 6 minutes on 2 cores)"
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf work_dirs site
