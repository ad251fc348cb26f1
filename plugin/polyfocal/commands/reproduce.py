"""Carry out a study over seeds: a paper's table beside ours, or a question without a paper.

A study comes with polyfocal (configs/studies of its repository), or is your own file: rows of
settings, and what is measured. Runs that are done keep their numbers in work_dirs/reproduce/STUDY
(with --config STUDY_CONFIG) or --work-dir: after an interruption give the same command again. With
real data a paper's table is the published experiment, as far as it is known; with --demo a study
ends on a laptop.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import get_rank

from polyfocal.adapters import prepare
from polyfocal.data.coco import annotations_digest
from polyfocal.experiments.batch import Slurm, carry_out
from polyfocal.experiments.command_line import (
    add_common_options,
    add_freeze_option,
    check_freeze,
    parser_of,
    run_tool,
)
from polyfocal.experiments.study import chosen, find_study, read_study, study_names
from polyfocal.mmengine.checkpoint import latest_checkpoint
from polyfocal.mmengine.configs import content_of
from polyfocal.mmengine.runs import check_launcher, join_processes
from polyfocal.mmengine.studies import measure_run
from polyfocal.mmengine.work_dir import read_trained_run
from polyfocal.shipped import CONFIGS, config_file

EXAMPLES = """\
examples:
  polyfocal reproduce polyloss_coco --demo --dry-run      # what there is to do, nothing done
  polyfocal reproduce polyloss_coco --demo --seeds 3      # 25 minutes on 2 cores
  polyfocal reproduce polyloss_coco --data data/coco      # the published experiment, one GPU
  polyfocal reproduce polyloss_coco --data data/coco --slurm PARTITION    # a job per training
  polyfocal reproduce shortcut --demo --seeds 5           # losses where a colour misleads
  polyfocal reproduce gamma_sigmoid --data ~/cells --profile tiny --only gamma_0_alpha_0.25
"""
STUDIES = CONFIGS / "studies"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("reproduce", __doc__, EXAMPLES)
    add = parser.add_argument
    add("study", metavar="STUDY", help=f"a YAML file, or: {', '.join(study_names(STUDIES))}")
    add(
        "--config",
        metavar="FILE",
        type=config_file,
        help="config for the rows, instead of the one that the study names",
    )
    add_common_options(parser, place="work_dirs/reproduce/STUDY's name")
    add_freeze_option(parser)
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[3],
        metavar="N",
        help="one number: how many seeds, 0 to N-1 (default: 3); several: these seeds",
    )
    add(
        "--epochs",
        type=int,
        metavar="N",
        help="epochs of the runs (with --demo or --profile tiny); a row that names its own keeps"
        " them",
    )
    add("--only", nargs="+", metavar="ROW[/SEED]", help="do these rows or runs now, not all")
    add("--dry-run", action="store_true", help="show the runs that are left to do, and do nothing")
    add("--slurm", metavar="PARTITION", help="submit a job for each run that is not done")
    add("--gpus", type=int, help="GPUs of each job of --slurm, 0 for a CPU (default: 8)")
    add(
        "--sbatch-args",
        metavar="ARGS",
        help="more of sbatch's long options, behind an equals sign: "
        '--sbatch-args="--time=2-0 --account=lab"',
    )
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def run(args: argparse.Namespace) -> None:
    """Do what the study of the command line still needs, and write its tables."""
    study = read_study(find_study(args.study, STUDIES), args.config)
    given = {name: getattr(args, name) for name in ("data", "profile", "demo", "freeze", "epochs")}
    check_freeze(args)
    configs = {row.config for row in study.rows.values()}
    contents = {config: content_of(config_file(config)) for config in configs}
    annotations = annotations_digest(args.data) if args.data else None
    changing: dict[str, Any] = {"contents": contents, "annotations": annotations}
    runs = study.runs(args.seeds, **given, options=args.cfg_options, **changing)
    wanted = chosen(runs, args.only)
    slurm = Slurm.of(args, ["-m", "polyfocal", "reproduce", *args.argv])
    check_launcher(args.launcher)
    join_processes(args.launcher)
    name = "_".join([study.name, *([Path(args.config).stem] if args.config else [])])
    folder = Path(args.work_dir or Path("work_dirs") / "reproduce" / name)
    measure = partial(measure_run, adapter=prepare, launcher=args.launcher)
    how = {"slurm": slurm, "dry_run": args.dry_run, "main_process": get_rank() == 0}
    carry_out(study, runs, wanted, folder, measure, latest_checkpoint, read_trained_run, **how)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv), goes_on_with="the same command")
