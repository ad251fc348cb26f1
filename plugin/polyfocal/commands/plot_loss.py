"""Draw losses and the magnitude of their gradient against p_t, and the schedule of cyclical ones.

p_t is the probability that the model gives to the target. The losses are the real modules, fed with
the logits that give each p_t; nothing is trained and nothing downloaded. A loss is a type and its
settings: --loss Poly1FocalLoss epsilon=-1 gamma=2. Without use_sigmoid a loss is drawn in its
sigmoid form (Poly1CrossEntropyLoss in its softmax form, its default). Softmax is drawn for two
classes.
"""

import argparse
from pathlib import Path
from typing import Any

from polyfocal.errors import UserError
from polyfocal.experiments.command_line import parser_of, run_tool, settings_of
from polyfocal.experiments.loss_curves import build_loss, curves_of, draw, draw_scores, name_of
from polyfocal.losses import LOSSES
from polyfocal.shipped import config_file

EXAMPLES = """\
examples:
  what epsilon does to the focal loss, on a logarithmic scale
    polyfocal plot_loss --loss FocalLoss --loss Poly1FocalLoss epsilon=-1 \\
        --loss Poly1FocalLoss epsilon=1 --log --out epsilon.svg

  the losses of two configs
    polyfocal plot_loss retinanet_focal retinanet_poly1

  a cyclical loss at the start, at its focal end and half way back, and what negatives get
    polyfocal plot_loss --loss CyclicalFocalLoss --progress 0 0.25 0.625 --negatives
"""


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks."""
    losses: list[tuple[str, str, dict[str, Any]]] = []
    for path in args.configs:
        from polyfocal.mmengine.configs import losses_in

        losses += [(f"{Path(path).stem}: {name_of(*one)}", *one) for one in losses_in(path)]
    for kind, *words in args.loss:
        where = f"--loss {kind} (configs go before the first --loss)"
        losses.append((" ".join([kind, *words]), kind, settings_of(words, where)))
    curves = [
        curve
        for name, kind, settings in losses
        for curve in curves_of(name, build_loss(kind, settings), args.progress, args.bias)
    ]
    if not curves:
        raise UserError("nothing to draw: give a config or --loss TYPE KEY=VALUE ...; see --help")
    if args.scores:
        draw_scores(curves, args.out)
    else:
        draw(curves, args.out, log=args.log, negatives=args.negatives)
    print(f"{args.out}: {len(curves)} curve{'s' if len(curves) > 1 else ''}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of("plot_loss", __doc__, EXAMPLES)
    add = parser.add_argument
    text = "configs whose losses to draw (needs MMEngine)"
    add("configs", nargs="*", type=config_file, metavar="CONFIG", help=text)
    text = f"a loss to draw, may be repeated; TYPE is one of {', '.join(LOSSES.of_logits())}"
    form = ("TYPE", "KEY=VALUE")
    add("--loss", nargs="+", action="append", default=[], metavar=form, help=text)
    text = "moments of the training, 0 to 1, for cyclical losses (default 0 0.25 0.5 0.75)"
    moments = [0.0, 0.25, 0.5, 0.75]
    add("--progress", nargs="+", type=float, default=moments, metavar="T", help=text)
    text = "what a debiasing loss's bias model gives to the target (default 0.1 0.5 0.9)"
    add("--bias", nargs="+", type=float, default=[0.1, 0.5, 0.9], metavar="P", help=text)
    add(
        "--negatives",
        action="store_true",
        help="draw target 0 too, dotted (sigmoid losses)",
    )
    add("--log", action="store_true", help="logarithmic vertical axes")
    text = "instead, draw the score of the least loss against how often the target is 1"
    add("--scores", action="store_true", help=text)
    text = "picture to write, .png or .svg (default loss.png)"
    add("--out", type=Path, default=Path("loss.png"), metavar="FILE", help=text)
    args = parser.parse_args(argv)
    if args.scores and (args.negatives or args.log):
        parser.error("--negatives and --log are for curves of the loss, not for --scores")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv))
