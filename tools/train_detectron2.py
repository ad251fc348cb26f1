"""Train a detector of Detectron2 with a loss of polyfocal, and evaluate it.

The config is a LazyConfig (.py) or yaml. Alone it trains on COCO 2017 where Detectron2 looks for it
(DETECTRON2_DATASETS, or ./datasets); --data takes any COCO-format folder, and --demo the built-in
pictures.
"""

import argparse
import sys
from importlib import import_module
from typing import Any

import torch

from polyfocal.errors import UserError
from polyfocal.experiments.command_line import run_tool

EXAMPLES = """\
examples:
  # the built-in pictures, minutes on a CPU
  python tools/train_detectron2.py --config-file configs/detectron2/retinanet_poly1.py --demo

  # your own COCO-format folder on a CPU
  python tools/train_detectron2.py --config-file configs/detectron2/mask_rcnn_poly1.py \\
      --data ~/cells --profile tiny

  # another epsilon and fewer steps; then go on after an interruption
  python tools/train_detectron2.py --config-file configs/detectron2/retinanet_poly1.py --demo \\
      model.cls_loss.epsilon=0.5 train.max_iter=500
  python tools/train_detectron2.py --config-file configs/detectron2/retinanet_poly1.py --demo \\
      --resume

  # yaml, whose overrides are pairs
  python tools/train_detectron2.py --config-file configs/detectron2/retinanet_poly1.yaml --demo \\
      SOLVER.MAX_ITER 500

  # evaluate a checkpoint
  python tools/train_detectron2.py --config-file configs/detectron2/retinanet_poly1.py --demo \\
      --eval-only train.init_checkpoint=work_dirs/detectron2/retinanet_poly1/model_final.pth

  # COCO 2017 on 8 GPUs, mixed precision
  python tools/train_detectron2.py --config-file configs/detectron2/retinanet_poly1.py \\
      --num-gpus 8 train.amp.enabled=True
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: Detectron2's, and the options of tools/train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="for instance configs/detectron2/retinanet_poly1.py",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="a COCO-format folder: annotations/{train,val}.json (or COCO 2017's names) and "
        "pictures; classes, paths and evaluation are taken from it",
    )
    parser.add_argument(
        "--profile",
        choices=["tiny"],
        help="tiny: a CPU-sized version of the same architecture, from scratch, no download",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="the built-in pictures (written to data/digit_scenes) with the tiny profile",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint of the output directory, or evaluate it",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate and do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs per machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine")
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="where the machines meet, tcp://ADDRESS:PORT of the first (one machine: auto)",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="OVERRIDE",
        help="at the end: key=value ... for a LazyConfig, KEY value ... for yaml; the output "
        "directory is train.output_dir or OUTPUT_DIR (default: work_dirs/detectron2/CONFIG's name)",
    )
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Any:
    """The experiment that the options ask for."""
    return import_module("polyfocal.detectron2.prepare").prepare_experiment(
        args.config_file,
        data=args.data,
        tiny=args.profile == "tiny",
        demo=args.demo,
        options=args.opts,
        train=not args.eval_only,
    )


def run(args: argparse.Namespace) -> None:
    """Train or evaluate, in one process of possibly many."""
    runs = import_module("polyfocal.detectron2.runs")
    (runs.test if args.eval_only else runs.train)(prepare(args), resume=args.resume)


def check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other or the machine."""
    for override in args.opts:
        if override.startswith("--"):
            raise UserError(f"{override} stands behind an override: options come before them.")
    if args.demo and args.data:
        raise UserError("--demo is the built-in data set and --data another one: give one of them.")
    if args.num_gpus * args.num_machines > 1:
        found = torch.cuda.device_count()
        if args.num_gpus > found:
            raise UserError(f"--num-gpus {args.num_gpus}: torch finds {found} here.")
        prepare(args)  # what is wrong with it is better said once


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0, 2 for a user's error, 130 when interrupted."""
    return run_tool(launch, parse_args(argv))


def launch(args: argparse.Namespace) -> None:
    """Start the processes that train."""
    engine = import_detectron2()
    check(args)
    engine.launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def import_detectron2() -> Any:
    """Detectron2's engine, or a sentence that says how to get it."""
    try:
        import_module("polyfocal.detectron2")
    except ImportError as error:
        raise UserError(str(error)) from error
    return import_module("detectron2.engine")


if __name__ == "__main__":
    sys.exit(main())
