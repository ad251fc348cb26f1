"""Evaluate a trained detector or classifier on the val split of its data set.

Use the same --data, --profile or --demo as in training: they decide what the model looks like.
"""

import argparse
import sys
from copy import deepcopy
from typing import Any

from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict

from polyfocal.classification.experiment import is_classification
from polyfocal.errors import UserError
from polyfocal.mmdet.command_line import add_common_options, prepare_run, run_tool
from polyfocal.mmdet.runs import test
from polyfocal.mmdet.tiny import leaf_datasets, walk

EXAMPLES = """\
examples:
  # what the demo trained
  python tools/test.py configs/retinanet_poly1.py work_dirs/retinanet_poly1/epoch_12.pth --demo

  # your own data; the detections as COCO results, the pictures in work_dirs/.../shown
  python tools/test.py configs/mask_rcnn_poly1.py epoch_12.pth --data ~/cells --profile tiny \\
      --out results.json --show-dir shown

  # COCO 2017 in data/coco, with flipped pictures too
  python tools/test.py configs/retinanet_poly1.py epoch_12.pth --tta
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the config it was trained with")
    parser.add_argument("checkpoint", help="for instance work_dirs/retinanet_poly1/epoch_12.pth")
    add_common_options(parser)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="keep the detections: NAME.json writes COCO results to NAME.bbox.json (and "
        "NAME.segm.json), NAME.pkl what MMDetection's analysis tools read",
    )
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="draw every picture, ground truth and prediction, into DIR below the run's folder",
    )
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation: the config's, or flipping"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Evaluate with the options of the command line."""
    experiment = prepare_run(args, train=False)
    cfg = experiment.config
    if is_classification(cfg) and (args.out or args.show_dir or args.tta):
        raise UserError("--out, --show-dir and --tta are for detectors: test a classifier without.")
    more_metrics: list[Any] = []
    if args.out is not None:
        if args.out.endswith((".pkl", ".pickle")):
            more_metrics.append(DumpDetResults(out_file_path=args.out))
        elif args.out.endswith(".json"):
            for evaluator in walk(cfg.test_evaluator):
                evaluator.outfile_prefix = args.out.removesuffix(".json")
        else:
            raise UserError(f"--out takes a name that ends in .json or .pkl, got {args.out}.")
    if args.show_dir is not None:
        cfg.default_hooks.visualization.update(draw=True, test_out_dir=args.show_dir)
    if args.tta:
        use_tta(cfg)
    test(experiment, args.checkpoint, more_metrics=more_metrics)


def use_tta(cfg: Config) -> None:
    """Put the model behind MMDetection's test-time augmentation."""
    if any("segm" in evaluator.get("metric", ()) for evaluator in walk(cfg.test_evaluator)):
        raise UserError("--tta merges boxes, and this model predicts masks: test it without.")
    wrapper = cfg.get("tta_model") or ConfigDict(
        type="DetTTAModel",
        tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    )
    for dataset in leaf_datasets(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.get("tta_pipeline") or flipped(dataset.pipeline)
    cfg.model = ConfigDict(**wrapper, module=cfg.model)


def flipped(pipeline: list[ConfigDict]) -> list[ConfigDict]:
    """A test pipeline that yields each picture as it is and mirrored."""
    *steps, pack = deepcopy(pipeline)
    pack.meta_keys = (*pack.meta_keys, "flip", "flip_direction")
    flips = [dict(type="RandomFlip", prob=probability) for probability in (0.0, 1.0)]
    return [*steps, ConfigDict(type="TestTimeAug", transforms=[flips, [pack]])]


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
