"""Search the settings of a config's loss on your data: epsilon, gamma, alpha and the others.

Every loss declares which settings are worth a search, and in which range. A trial is a short
training on four fifths of the training split. It is judged by the other fifth, and given up early
if it lags behind. Then the best setting, the config's own and those of --against are trained in
full length with fresh seeds. They are measured on the val split, which the search has not used. The
folder gets best.py, a config ready to train; report.md, the evidence; and search.db, from which the
same command goes on after an interruption.
"""

import argparse
import sys
from pathlib import Path

from polyfocal.adapters import prepare
from polyfocal.experiments import command_line
from polyfocal.experiments.tuned import Budget, tune
from polyfocal.experiments.tuning import Tuning
from polyfocal.shipped import config_file

EXAMPLES = """\
examples:
  # a classifier on the built-in digits: a minute on a CPU
  polyfocal tune classification/poly1 --demo --trials 20

  # a detector on your pictures, 40 minutes of searching; then 3 seeds beside stock focal loss
  polyfocal tune retinanet_poly1 --data ~/cells --profile tiny --minutes 40 \\
      --against retinanet_focal

  # epsilon alone, in trials of 3 epochs
  polyfocal tune retinanet_poly1 --data ~/cells --profile tiny --minutes 40 \\
      --only epsilon --epochs 3

  # trials in full length, each of which trains neck and heads on kept features
  polyfocal tune retinanet_poly1 --data ~/cells --profile small --freeze --minutes 30 \\
      --against retinanet_focal

  # four processes, each on its own GPU if there are as many
  polyfocal tune retinanet_poly1 --data ~/cells --minutes 600 --workers 4

  # one more process on the same search, from another shell: the same command, and --seeds 0

  # several machines on one search: this on the first, and on the others with --seeds 0
  polyfocal tune retinanet_poly1 --data ~/cells --minutes 600 --storage postgresql://me@db/searches
"""


def run(args: argparse.Namespace) -> None:
    """Search, train the best, and write what was found."""
    seeds = args.seeds if args.seeds is not None else 5 if args.freeze else 3
    budget = Budget(args.minutes, args.trials, seeds, args.workers)
    folder = Path(args.work_dir or Path("work_dirs") / "tune" / Path(args.config).stem)
    request = command_line.request_of(args, prepare)
    tuning = Tuning(request, folder, args.epochs, args.only, args.storage)
    worker = [sys.executable, "-m", "polyfocal", "tune", *args.argv]
    tune(tuning, budget, against=args.against, worker=worker)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = command_line.parser_of("tune", __doc__, EXAMPLES)
    add = parser.add_argument
    command_line.add_config(parser)
    command_line.add_experiment_options(parser, "work_dirs/tune/CONFIG's name")
    command_line.add_freeze_option(parser)
    text = "minutes of searching, earlier starts included; a trial under way then does not count"
    add("--minutes", type=float, metavar="M", help=text)
    text = "number of trials, whether finished or given up early"
    add("--trials", type=int, metavar="N", help=text)
    text = "epochs of a trial (default: a third of the config's, with --freeze all of them)"
    add("--epochs", type=int, metavar="N", help=text)
    add("--only", nargs="+", metavar="NAME", help="search these settings, not all")
    text = "number of seeds for the trainings in full length (default: 3, with --freeze 5); 0 for"
    text += " a search alone"
    add("--seeds", type=int, metavar="N", help=text)
    text = "other configs to train in full length too, such as retinanet_focal"
    add("--against", nargs="+", type=config_file, default=[], metavar="CONFIG", help=text)
    text = "where to keep the search, for workers on several machines: a database "
    text += (
        "(postgresql://...), Optuna's gRPC proxy (grpc://HOST:PORT) or the path of a journal file "
    )
    text += "(default: search.db in the work directory)"
    add("--storage", metavar="URL", help=text)
    text = "number of processes that search (default: 1)"
    add("--workers", type=int, default=1, metavar="N", help=text)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return command_line.run_tool(run, args, goes_on_with="the same command")
