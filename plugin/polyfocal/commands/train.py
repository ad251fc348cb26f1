"""Train a detector or a classifier and evaluate it on the val split of its data set.

A config alone trains on COCO 2017 in data/coco; --data takes any COCO-format folder (for a LiDAR
detector one in KITTI's layout, for a classifier one of CIFAR), and --demo the built-in data. The
work directory gets the log, the checkpoints and pictures of predictions beside the ground truth.
"""

import argparse

from polyfocal.adapters import prepare
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import (
    add_common_options,
    add_config,
    add_freeze_option,
    parser_of,
    request_of,
    run_tool,
    seed,
)

EXAMPLES = """\
examples:
  # the built-in pictures, minutes on a CPU
  polyfocal train retinanet_poly1 --demo

  # your own COCO-format folder on a CPU
  polyfocal train fcos_poly1 --data ~/cells --profile tiny

  # the same folder with the full model on a GPU, mixed precision, TensorBoard
  polyfocal train mask_rcnn_poly1 --data ~/cells --amp --log tensorboard

  # a LiDAR detector on simulated scans; a classifier on the built-in digits
  polyfocal train pointpillars_poly1_kitti --demo
  polyfocal train classification/focal --demo

  # another epsilon and ten epochs; then go on after an interruption
  polyfocal train retinanet_poly1 --demo \\
      --cfg-options model.bbox_head.loss_cls.epsilon=0.5 train_cfg.max_epochs=10
  polyfocal train retinanet_poly1 --demo --resume \\
      --cfg-options model.bbox_head.loss_cls.epsilon=0.5 train_cfg.max_epochs=10

  # COCO 2017 in data/coco on 8 GPUs
  torchrun --nproc-per-node 8 -m polyfocal train retinanet_poly1 --launcher pytorch
"""


def run(args: argparse.Namespace) -> None:
    """Train with the options of the command line."""
    if args.resume and args.load_from:
        raise UserError("--resume and --load-from both name weights to start from: give one.")
    from polyfocal.mmengine import runs

    experiment = request_of(args, prepare).prepare()
    runs.set_up(experiment.config, args.work_dir, args.launcher, args.local_rank)
    experiment.use_seed(args.seed)
    if args.amp:
        experiment.use_mixed_precision()
    if args.auto_scale_lr:
        experiment.scale_learning_rate()
    if args.log:
        experiment.log_to(args.log)
    runs.train(experiment, resume=args.resume, load_from=args.load_from)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = parser_of("train", __doc__, EXAMPLES)
    add_config(parser)
    add_common_options(parser)
    add_freeze_option(parser)
    add = parser.add_argument
    add("--seed", type=seed, help="seed of everything random (default: the config's, or 0)")
    add("--amp", action="store_true", help="mixed precision; needs a GPU")
    text = "go on from this checkpoint; without a name, from the last one in the work directory"
    add("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=text)
    add("--load-from", metavar="CHECKPOINT", help="start from the weights of this checkpoint")
    text = "scale the learning rate to the number of devices and the batch size"
    add("--auto-scale-lr", action="store_true", help=text)
    text = (
        "log for these programs too, with AP by class and the statistics of the losses: "
        "tensorboard, mlflow, wandb, clearml; their packages are installed with pip"
    )
    programs = ["tensorboard", "mlflow", "wandb", "clearml"]
    add("--log", nargs="+", choices=programs, metavar="PROGRAM", help=text)
    return run_tool(run, parser.parse_args(argv), goes_on_with="--resume")
