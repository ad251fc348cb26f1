"""Train a detector of Detectron2 with a loss of polyfocal, and evaluate it.

The config is a LazyConfig (.py) or yaml. Without --data and --demo it trains on COCO 2017 where
Detectron2 looks for it (DETECTRON2_DATASETS, or ./datasets). --data takes any COCO-format folder;
--demo takes the built-in pictures.
"""

import argparse

from polyfocal.experiments.command_line import add_data_options, parser_of, request_of, run_tool
from polyfocal.shipped import config_file

EXAMPLES = """\
examples:
  # the built-in pictures, minutes on a CPU
  polyfocal train_detectron2 --config-file detectron2/retinanet_poly1 --demo

  # your own COCO-format folder on a CPU
  polyfocal train_detectron2 --config-file detectron2/mask_rcnn_poly1 \\
      --data ~/cells --profile tiny

  # another epsilon and fewer steps; then go on after an interruption
  polyfocal train_detectron2 --config-file detectron2/retinanet_poly1 --demo \\
      model.cls_loss.epsilon=0.5 train.max_iter=500
  polyfocal train_detectron2 --config-file detectron2/retinanet_poly1 --demo \\
      --resume

  # yaml, whose overrides are pairs
  polyfocal train_detectron2 --config-file detectron2/retinanet_poly1.yaml --demo \\
      SOLVER.MAX_ITER 500

  # evaluate a checkpoint
  polyfocal train_detectron2 --config-file detectron2/retinanet_poly1 --demo \\
      --eval-only train.init_checkpoint=work_dirs/detectron2/retinanet_poly1/model_final.pth

  # COCO 2017 on 8 GPUs, mixed precision
  polyfocal train_detectron2 --config-file detectron2/retinanet_poly1 \\
      --num-gpus 8 train.amp.enabled=True
"""


def run(args: argparse.Namespace) -> None:
    """Train or evaluate with the options of the command line."""
    from polyfocal.detectron2.prepare import prepare_experiment
    from polyfocal.detectron2.runs import launch

    places = ("num_gpus", "num_machines", "machine_rank", "dist_url")
    request = request_of(args, prepare_experiment, train=not args.eval_only)
    launch(request, resume=args.resume, **{name: getattr(args, name) for name in places})


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0, 2 for a user's error, 130 when interrupted."""
    parser = parser_of("train_detectron2", __doc__, EXAMPLES)
    add = parser.add_argument
    text = (
        "a file, or the name of one that comes with polyfocal, such as detectron2/retinanet_poly1"
    )
    add("--config-file", dest="config", type=config_file, required=True, metavar="FILE", help=text)
    add_data_options(parser)
    text = "go on from the last checkpoint of the output directory, or evaluate it"
    add("--resume", action="store_true", help=text)
    add("--eval-only", action="store_true", help="evaluate and do not train")
    add("--num-gpus", type=int, default=1, help="number of GPUs per machine")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="number of this machine")
    text = "where the machines meet, tcp://ADDRESS:PORT of the first (one machine: auto)"
    add("--dist-url", default="auto", help=text)
    text = (
        "at the end: key=value ... for a LazyConfig, KEY value ... for yaml; the output directory "
        "is train.output_dir or OUTPUT_DIR (default: work_dirs/detectron2/CONFIG's name)"
    )
    add("cfg_options", nargs=argparse.REMAINDER, metavar="OVERRIDE", help=text)
    return run_tool(run, parser.parse_args(argv), goes_on_with="--resume")
