"""Where the command lines' shared code was; it moves to polyfocal.experiments.command_line."""

import argparse
from pathlib import Path
from typing import Any

from polyfocal.adapters import prepare
from polyfocal.experiments.command_line import (
    add_common_options,
    add_experiment_options,
    request_of,
    run_tool,
)
from polyfocal.experiments.request import Request
from polyfocal.mmengine.runs import check_launcher, set_up

__all__ = [
    "add_common_options",
    "add_experiment_options",
    "check_launcher",
    "prepare_experiment",
    "prepare_run",
    "run_tool",
]


def prepare_experiment(path: str | Path, **settings: Any) -> Any:
    """The experiment of any config."""
    settings["options"] = settings.get("options") or {}
    return Request(prepare, path, **settings).prepare()


def prepare_run(args: argparse.Namespace, *, train: bool) -> Any:
    """The experiment that the common options ask for, with its work directory and launcher."""
    experiment = request_of(args, prepare, train=train).prepare()
    set_up(
        experiment.config,
        work_dir=args.work_dir,
        launcher=args.launcher,
        local_rank=args.local_rank,
    )
    return experiment
