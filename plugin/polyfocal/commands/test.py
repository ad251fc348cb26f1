"""Evaluate a trained detector on the val split of its data set.

Use the same --data, --profile or --demo as in training: they decide what the model looks like.
"""

import argparse

from polyfocal.adapters import prepare
from polyfocal.experiments.command_line import (
    add_common_options,
    add_config,
    parser_of,
    request_of,
    run_tool,
)

EXAMPLES = """\
examples:
  # what the demo trained
  polyfocal test retinanet_poly1 work_dirs/retinanet_poly1/epoch_12.pth --demo

  # your own data; the detections as COCO results, the pictures in work_dirs/.../shown
  polyfocal test mask_rcnn_poly1 epoch_12.pth --data ~/cells --profile tiny \\
      --out results.json --show-dir shown

  # a LiDAR detector on a folder in KITTI's layout, every scan drawn from above
  polyfocal test pointpillars_poly1_kitti epoch_12.pth --data ~/kitti \\
      --profile tiny --show-dir shown

  # COCO 2017 in data/coco, with flipped pictures too
  polyfocal test retinanet_poly1 epoch_12.pth --tta
"""


def run(args: argparse.Namespace) -> None:
    """Evaluate with the options of the command line."""
    from polyfocal.mmengine import runs

    experiment = request_of(args, prepare, train=False).prepare()
    runs.set_up(experiment.config, args.work_dir, args.launcher, args.local_rank)
    more_metrics = [] if args.out is None else experiment.keep_detections(args.out)
    if args.show_dir is not None:
        experiment.draw_all(args.show_dir)
    if args.thresholds is not None:
        experiment.use_thresholds(args.thresholds)
    if args.tta:
        experiment.use_tta()
    runs.test(experiment, args.checkpoint, more_metrics=more_metrics)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = parser_of("test", __doc__, EXAMPLES)
    add = parser.add_argument
    add_config(parser, "config that it was trained with")
    add("checkpoint", help="for instance work_dirs/retinanet_poly1/epoch_12.pth")
    add_common_options(parser)
    add(
        "--out",
        metavar="FILE",
        help="keep the detections: NAME.json writes COCO results to NAME.bbox.json (and "
        "NAME.segm.json), NAME.pkl what MMDetection's analysis tools read; for a LiDAR config a "
        "folder, which gets label files of KITTI",
    )
    text = "draw every picture, ground truth and prediction, into DIR below the run's folder"
    add("--show-dir", metavar="DIR", help=text)
    text = (
        "precision, recall and F1 at the score thresholds that polyfocal calibration --thresholds "
        "wrote, and pictures of what is above them"
    )
    add("--thresholds", metavar="FILE", help=text)
    add("--tta", action="store_true", help="test-time augmentation: the config's, or flipping")
    return run_tool(run, parser.parse_args(argv))
