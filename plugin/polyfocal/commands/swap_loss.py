"""Write a config with its classification losses swapped, or show what they are.

Swap the classification losses of a config for losses of this package. The result is a short config
with the given one as its base: the new losses, their adapters, and new types of the heads that need
one. Without --loss, show the classification losses of the config and what fits in their places.
"""

import argparse
from pathlib import Path

from polyfocal import swapping
from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import add_config, parser_of, run_tool, settings_of

EXAMPLES = """\
examples:
  polyfocal swap_loss mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py
  polyfocal swap_loss mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py --loss poly1 --epsilon 1 --out my.py
  polyfocal swap_loss my_config.py --loss FocalLoss gamma=1.5 --slot rpn_head
  polyfocal swap_loss detectron2::COCO-Detection/retinanet_R_50_FPN_1x.py --loss poly1
"""


def run(args: argparse.Namespace) -> None:
    """Show the losses of a config, or swap them."""
    config = swapping.load(args.config)
    if args.loss is None:
        if args.epsilon is not None or args.out or args.slot:
            raise UserError(
                "--epsilon, --slot and --out are given without --loss: write --loss poly1"
            )
        print(swapping.as_table(swapping.find_losses(config.model)))
        return
    settings = settings_of(args.loss[1:], "--loss")
    if args.epsilon is not None:
        settings["epsilon"] = args.epsilon
    text = swapping.as_text(args.config, config, args.loss[0], args.slot, out=args.out, **settings)
    if args.out is None:
        print(text, end="")
        return
    if args.out.exists():
        raise UserError(f"{args.out} is there already: name another file")
    write_text(args.out, text)
    print(f"{args.out} is {args.config} with its losses swapped")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = parser_of("swap_loss", __doc__, EXAMPLES)
    add = parser.add_argument
    add_config(parser, "config to change: mmdet::NAME, mmdet3d::NAME, detectron2::NAME")
    text = "poly1, for the Poly-1 form of the present loss, or the name of a loss; then settings"
    add("--loss", nargs="+", metavar=("LOSS", "KEY=VALUE"), help=text)
    add("--epsilon", type=float, help="epsilon of the Poly-1 term (default 1)")
    text = (
        "which loss, by its name in the table or part of it (default: all that decide on classes)"
    )
    add("--slot", action="append", metavar="NAME", help=text)
    add("--out", type=Path, metavar="FILE", help="write the config there, not on the screen")
    return run_tool(run, parser.parse_args(argv))
