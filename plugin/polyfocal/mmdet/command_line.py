"""What the command lines of the train and test tools share."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import DictAction
from mmengine.device import get_device

from polyfocal.errors import UserError
from polyfocal.mmdet.experiment import Experiment, read_config


def add_experiment_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a data set, a size, a place and overrides."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="a COCO-format folder: annotations/{train,val}.json (or COCO 2017's names) and "
        "pictures; classes, paths and evaluation are taken from it. For a LiDAR detector a folder "
        "in KITTI's layout",
    )
    parser.add_argument(
        "--profile",
        choices=["tiny"],
        help="tiny: a CPU-sized version of the same architecture, from scratch, no download",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="the built-in pictures or LiDAR scans (written to data/) with the tiny profile",
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="where logs, checkpoints and pictures go (default: work_dirs/CONFIG's name)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_KeyValues,
        metavar="KEY=VALUE",
        help="override settings of the config, for instance train_cfg.max_epochs=10; a list is "
        'KEY="[a,b]"',
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`add_experiment_options` and those of a run on several devices."""
    add_experiment_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how a run on several devices was started (torchrun: pytorch)",
    )
    # Set by torch.distributed.launch; torchrun sets the variable of the environment instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


# By the default_scope of a config, the adapter that its experiments are of; else polyfocal.mmdet.
_ADAPTERS = {"mmdet3d": "polyfocal.mmdet3d", "mmengine": "polyfocal.classification"}


def prepare_experiment(path: str | Path, **settings: Any) -> Experiment:
    """The experiment of any config, 2D, 3D or classification.

    Args:
        path: The config.
        settings: Of :func:`polyfocal.mmdet.experiment.prepare_experiment`.

    Raises:
        UserError: The config, an option or the data set is not usable.
    """
    adapter = _ADAPTERS.get(read_config(path).get("default_scope"), "polyfocal.mmdet")
    return import_module(f"{adapter}.experiment").prepare_experiment(path, **settings)


def prepare_run(args: argparse.Namespace, *, train: bool) -> Experiment:
    """The experiment that the common options ask for, with its work directory and launcher.

    Raises:
        UserError: The options contradict each other, or see :func:`prepare_experiment`.
    """
    if args.demo and args.data:
        raise UserError("--demo is the built-in data set and --data another one: give one of them.")
    check_launcher(args.launcher)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    experiment = prepare_experiment(
        args.config,
        data=args.data,
        tiny=args.profile == "tiny",
        demo=args.demo,
        options=args.cfg_options,
        train=train,
    )
    cfg = experiment.config
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / Path(args.config).stem)
    return experiment


def check_launcher(launcher: str) -> None:
    """Refuse a launcher that did not start this process, or has no GPU to give it.

    Raises:
        UserError: The tool is to be started in another way.
    """
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError(
            "--launcher pytorch is for a tool that torchrun starts, as tools/dist_train.sh and "
            "tools/dist_test.sh do."
        )
    if launcher in ("slurm", "mpi") and get_device() == "cpu":
        raise UserError(
            f"--launcher {launcher} runs one process on each GPU, and torch finds none here: "
            "start the tool without it."
        )


def run_tool(
    job: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    *,
    goes_on_with: str = "--resume",
) -> int:
    """Do a tool's job; the user's errors are one line on standard error.

    So are those of the machine: a full disk, a directory or a picture that is not there any more.

    Args:
        job: The tool's.
        args: Its command line.
        goes_on_with: What to give after an interruption.

    Returns:
        The exit status: 0, 2 for an error that is said, 130 for an interruption from the keyboard.
    """
    # News about the packages below us are not for the person who trains.
    warnings.filterwarnings(
        "ignore",
        message=r"pkg_resources is deprecated|DeprecationWarning: |torch\.meshgrid|dir_offset"
        r"|Warning: The (bbox|polygon) is out of bounds",
    )
    logging.raiseExceptions = False  # a log that cannot be written does not end a run, a file does
    try:
        job(args)
    except (UserError, OSError, AssertionError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; go on with {goes_on_with}", file=sys.stderr)
        return 130
    return 0


def _sentence(error: Exception) -> str | None:
    """What a person is told of an error; None where it is a program's, not theirs."""
    text = str(error).strip()
    if "DataLoader worker" in text:  # which hands on its traceback; the last line is "Type: text"
        text = text.splitlines()[-1].partition(": ")[2]
    picture = re.search("failed to load image: (.+)", text)  # MMCV's assertion
    if picture:
        return f"{picture[1]} cannot be read as a picture: put it right, then go on with --resume."
    if isinstance(error, AssertionError):
        return None
    if isinstance(error, UserError):
        return text
    found = re.fullmatch(r"\[Errno -?\d+\] (.+?)(: '(.+)')?", text)
    if found is None:
        return f"{text}."
    return f"{found[3]}: {found[1]}." if found[3] else f"{found[1]}."


class _KeyValues(DictAction):
    """MMEngine's KEY=VALUE options, with a usage error for anything else."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(parser, *args, **kwargs)
        except (ValueError, AssertionError):
            parser.error(f"{self.option_strings[0]} takes KEY=VALUE, got {' '.join(args[1])}")
