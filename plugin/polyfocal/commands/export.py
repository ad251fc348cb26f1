"""Write a trained detector as an ONNX file: pictures in, boxes, scores and labels out.

Normalisation, the decoding of the boxes and their suppression are in the file, and no part of a
training loss. CONFIG is the one that the training left beside its checkpoints. No data set is
needed. Needs pip install 'polyfocal[onnx]'; docs/export.md shows how to run the file.
"""

import argparse
import logging
from pathlib import Path

from polyfocal.errors import UserError
from polyfocal.experiments.command_line import (
    add_config,
    add_overrides,
    check_file,
    parser_of,
    run_tool,
)

EXAMPLES = """\
examples:
  # what polyfocal train retinanet_poly1 left, as work_dirs/retinanet_poly1/epoch_12.onnx
  polyfocal export work_dirs/retinanet_poly1/retinanet_poly1.py \\
      work_dirs/retinanet_poly1/epoch_12.pth

  # pictures of another size, two at a time; the scores as a calibrator repairs them
  polyfocal export config.py epoch_12.pth --size 640 640 --batch-size 2 \\
      --calibrator calibrator.json --out detector.onnx

  # every candidate, for a runtime that suppresses boxes itself
  polyfocal export config.py epoch_12.pth --no-nms
"""


def run(args: argparse.Namespace) -> None:
    """Export with the options of the command line."""
    check_file("--out", args.out, [".onnx"])
    from polyfocal.calibration.posthoc import Calibrator
    from polyfocal.mmengine.configs import framework_of, merge_options, read_config

    calibrator = None if args.calibrator is None else Calibrator.load(args.calibrator)
    cfg = read_config(args.config)
    if framework_of(cfg) != "mmdet":
        raise UserError(
            f"{args.config} is not for a detector of pictures: polyfocal export takes configs of "
            "MMDetection."
        )
    from polyfocal.mmdet.export import export_onnx, load_detector, usual_size

    merge_options(cfg, args.cfg_options or {})
    size = args.size or usual_size(cfg)
    if size is None:
        raise UserError(
            f"{args.config} resizes pictures to no fixed size: give --size HEIGHT WIDTH."
        )
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # its errors are raised too
    logging.getLogger("onnxscript").setLevel(logging.CRITICAL)
    model, classes = load_detector(cfg, args.checkpoint)
    out = Path(args.out or Path(args.checkpoint).with_suffix(".onnx"))
    export_onnx(
        model,
        out,
        tuple(size),
        classes=classes,
        batch_size=args.batch_size,
        nms=not args.no_nms,
        calibrator=calibrator,
    )
    if getattr(model, "with_mask", False):
        print("note: masks are left out; boxes, scores and labels are exported.")
    print(f"{out}: images ({args.batch_size}, 3, {size[0]}, {size[1]}) -> boxes, scores, labels")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = parser_of("export", __doc__, EXAMPLES)
    add = parser.add_argument
    add_config(parser, "config with the model of the checkpoint")
    add("checkpoint", help="for instance work_dirs/retinanet_poly1/epoch_12.pth")
    add("--out", metavar="FILE", help="the file to write (default: CHECKPOINT's name with .onnx)")
    text = "size of the pictures in pixels (default: that of the config's test pipeline)"
    add("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help=text)
    add("--batch-size", type=int, default=1, metavar="N", help="pictures per run (default 1)")
    text = "apply a calibrator to the scores, a file of polyfocal calibration --save"
    add("--calibrator", metavar="FILE", help=text)
    text = "leave out the suppression of boxes: every candidate comes out, the best score first"
    add("--no-nms", action="store_true", help=text)
    add_overrides(parser)
    return run_tool(run, parser.parse_args(argv))
