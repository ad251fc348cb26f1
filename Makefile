# `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
DEMO := work_dirs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test clean

help:
	@echo "make demo    set up, train configs/retinanet_poly1.py on the built-in pictures and"
	@echo "             print its COCO table: about 5 minutes on 2 cores once it is set up"
	@echo "make test    set up, then lint, formatting, types and tests: about 5 minutes"
	@echo "make setup   create .venv with everything in it: about 4 minutes on 2 cores"
	@echo "             the first time, a second when it is there"
	@echo "make clean   remove work_dirs/ (trained models, logs, pictures); .venv stays"

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@echo "* training on the built-in pictures (about 5 minutes on 2 cores)"
	.venv/bin/python tools/train.py configs/retinanet_poly1.py --demo --work-dir $(DEMO)

test: setup
	@echo "* lint, formatting and types (a minute)"
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	@echo "* tests (about 4 minutes on 2 cores)"
	.venv/bin/python -m pytest

clean:
	rm -rf work_dirs
