"""Train a detector and evaluate it on the val split of its data set.

A config alone trains on COCO 2017 in data/coco; --data takes any COCO-format folder (for a LiDAR
detector one in KITTI's layout), and --demo the built-in pictures (simulated scans). The
work directory gets the log, the checkpoints and pictures of predictions beside the ground truth.
"""

import argparse
import sys

import torch

from polyfocal.errors import UserError
from polyfocal.mmdet.command_line import add_common_options, prepare_run, run_tool
from polyfocal.mmdet.runs import train

EXAMPLES = """\
examples:
  # the built-in pictures, minutes on a CPU
  python tools/train.py configs/retinanet_poly1.py --demo

  # your own COCO-format folder on a CPU
  python tools/train.py configs/fcos_poly1.py --data ~/cells --profile tiny

  # the same folder with the full model on a GPU, mixed precision, TensorBoard
  python tools/train.py configs/mask_rcnn_poly1.py --data ~/cells --amp --tensorboard

  # a LiDAR detector on simulated scans
  python tools/train.py configs/pointpillars_poly1_kitti.py --demo

  # another epsilon and ten epochs; then go on after an interruption
  python tools/train.py configs/retinanet_poly1.py --demo \\
      --cfg-options model.bbox_head.loss_cls.epsilon=0.5 train_cfg.max_epochs=10
  python tools/train.py configs/retinanet_poly1.py --demo --resume

  # COCO 2017 in data/coco on 8 GPUs
  torchrun --nproc_per_node 8 tools/train.py configs/retinanet_poly1.py --launcher pytorch
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="for instance configs/retinanet_poly1.py")
    add_common_options(parser)
    parser.add_argument(
        "--seed", type=int, help="of everything random (default: the config's, or 0)"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision; needs a GPU")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or without a name from the work directory's last one",
    )
    parser.add_argument("--load-from", metavar="CHECKPOINT", help="start from these weights")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate to the number of devices and the batch size",
    )
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Train with the options of the command line."""
    if args.resume and args.load_from:
        raise UserError("--resume and --load-from both name weights to start from: give one.")
    experiment = prepare_run(args, train=True)
    cfg = experiment.config
    randomness = {"seed": None, **cfg.get("randomness", {})}
    if args.seed is not None or randomness["seed"] is None:
        randomness["seed"] = args.seed or 0
    cfg.randomness = randomness
    if args.amp:
        if not torch.cuda.is_available():
            raise UserError("--amp needs a GPU, and torch finds none: train without it.")
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(
                f"--auto-scale-lr needs auto_scale_lr.base_batch_size in {args.config}."
            )
        cfg.auto_scale_lr.enable = True
    if args.tensorboard:
        cfg.visualizer.vis_backends.append({"type": "TensorboardVisBackend"})
    train(experiment, resume=args.resume, load_from=args.load_from)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
