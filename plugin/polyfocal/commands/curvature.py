"""Measure how curved the training loss is at a checkpoint: eigenvalues, trace, spectrum.

The Hessian of the classification loss over the parameters of the classification branch, unless
--params and --loss say otherwise. Use the same --data, --profile or --demo as in training: they
decide what the model looks like and which pictures the loss is taken of.
"""

import argparse

from rich.console import Console

from polyfocal.adapters import prepare
from polyfocal.experiments import command_line
from polyfocal.mmengine import runs

EXAMPLES = """\
examples:
  # what the demo trained: seconds on a CPU
  polyfocal curvature retinanet_poly1 work_dirs/retinanet_poly1/epoch_12.pth --demo

  # five eigenvalues, a better trace, the spectrum as a picture
  polyfocal curvature retinanet_poly1 epoch_12.pth --demo \\
      --top-k 5 --probes 60 --method hutch++ --out curvature.json --plot spectrum.svg

  # the whole detector and all its losses; --params retina_cls: the last layer only
  polyfocal curvature retinanet_poly1 epoch_12.pth --demo --params . --loss all

  # the same weights under another loss, so that two trainings are measured alike
  polyfocal curvature retinanet_poly1 epoch_12.pth --demo \\
      --cfg-options model.bbox_head.loss_cls.epsilon=0 model.bbox_head.loss_cls.gamma=0
"""


def run(args: argparse.Namespace) -> None:
    """Measure with the options of the command line."""
    command_line.check_file("--out", args.out, (".json",))
    command_line.check_file("--plot", args.plot, (".png", ".svg"))
    experiment = command_line.request_of(args, prepare).prepare()
    runs.set_up(experiment.config, args.work_dir, args.launcher, args.local_rank)
    names = ("batches", "seed", "parameters", "kind", "top_k", "steps", "probes", "method")
    settings = {name: getattr(args, name) for name in names}
    found = runs.curvature(experiment, args.checkpoint, density=args.plot is not None, **settings)
    Console().print(found.table())
    ends = dict.fromkeys((found.parameters[0], found.parameters[-1]))
    print(f"parameters  {' ... '.join(ends)}")
    print(f"time        {found.seconds:.1f} s, {found.eigenvalues.steps} products for eigenvalues")
    if found.density is not None:
        found.density.draw(args.plot)
        print(f"spectrum    {args.plot}")
    if args.out is not None:
        found.write(args.out, {"config": args.config, "checkpoint": args.checkpoint, **settings})
        print(f"numbers     {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = command_line.parser_of("curvature", __doc__, EXAMPLES)
    add = parser.add_argument
    command_line.add_config(parser, "config that it was trained with")
    add("checkpoint", help="for instance work_dirs/retinanet_poly1/epoch_12.pth")
    command_line.add_common_options(parser)
    text = "parameters with such names (default: a detector's classification branch, else all)"
    add("--params", dest="parameters", metavar="REGEX", help=text)
    text = "losses called cls, or the whole training loss (default: cls, if there is one)"
    add("--loss", dest="kind", choices=["cls", "all"], help=text)
    add("--top-k", type=int, default=1, help="number of largest eigenvalues (default: 1)")
    add("--steps", type=int, default=100, help="most products for the eigenvalues (default: 100)")
    add("--probes", type=int, default=16, help="number of products for the trace (default: 16)")
    methods, text = ["hutchinson", "hutch++"], "how the trace is estimated (default: hutchinson)"
    add("--method", choices=methods, default=methods[0], help=text)
    add("--batches", type=int, default=4, help="batches of training pictures to use (default: 4)")
    add(
        "--seed",
        type=command_line.seed,
        default=0,
        help="seed of the pictures and the probes (default: 0)",
    )
    add("--out", metavar="FILE", help="write the numbers to NAME.json")
    add("--plot", metavar="FILE", help="draw the spectral density into NAME.png or NAME.svg")
    return command_line.run_tool(run, parser.parse_args(argv))
