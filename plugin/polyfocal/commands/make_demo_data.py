"""Write the built-in data set, digit scenes, as a COCO-format folder.

The scenes are handwritten digits, enlarged, rotated, coloured and partly hiding one another,
on textured backgrounds, with exact boxes and masks. The folder is in COCO format: give it to any
--data DIR. The same options give the same data; a folder that holds them already is left alone
without --overwrite.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.experiments.command_line import parser_of, run_tool

EXAMPLES = """\
examples:
  the standard set, 750 pictures in a few seconds:
    polyfocal make_demo_data data/digit_scenes
  0 is 50 times more frequent than 9 in train, and one label in ten is wrong:
    polyfocal make_demo_data data/long_tail --long-tail 50 --label-noise 0.1
  the colour gives the class away in 95 of 100 digits, but not in the split "ood":
    polyfocal make_demo_data data/cue --spurious 0.95 --cue color
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the defaults are those of :class:`DigitScenes`."""
    default = DigitScenes()
    parser = parser_of("make_demo_data", __doc__, EXAMPLES)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    text = "replace the digit scenes that are there, of other settings or damaged"
    parser.add_argument("--overwrite", action="store_true", help=text)

    def add(name: str, kind: type, text: str, **more: Any) -> None:
        value = getattr(default, name.replace("-", "_"))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        text = f"{text} (default {shown})"
        parser.add_argument(f"--{name}", type=kind, default=value, help=text, **more)

    pair: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")}
    add("seed", int, "seed of everything random", metavar="N")
    add("num-train", int, "pictures to train on", metavar="N")
    add("num-val", int, "pictures to evaluate on", metavar="N")
    add("num-ood", int, "pictures whose cue means nothing; for --spurious", metavar="N")
    add("size", int, "side of the square pictures in pixels", metavar="PIXELS")
    add("digits", int, "fewest and most digits in a picture", **pair)
    add("digit-size", int, "smallest and largest height of a digit in pixels", **pair)
    add("long-tail", float, "how many times more frequent 0 is than 9 in train", metavar="RATIO")
    add("overlap", float, "largest part of a box that another may cover, 0 to 1", metavar="PART")
    add("label-noise", float, "part of the train labels that is wrong, 0 to 1", metavar="PART")
    add("spurious", float, "probability that the cue fits the class, 0 for no cue", metavar="P")
    add("cue", str, "what gives the class away", choices=("color", "background"))
    return parser.parse_args(argv)


def make(args: argparse.Namespace) -> None:
    """Write the scenes and say where they are."""
    options = vars(args)
    out, overwrite = options.pop("out"), options.pop("overwrite")
    for name in ("digits", "digit_size"):
        options[name] = tuple(options[name])
    start = time.perf_counter()
    scenes = DigitScenes(**options)
    write_digit_scenes(out, scenes, overwrite=overwrite)
    counts = ", ".join(f"{split} {count}" for split, count in scenes.splits.items())
    print(f"{out}: digit scenes ({counts} pictures), ready in {time.perf_counter() - start:.1f} s")
    print(f"look at them: polyfocal browse_dataset {out}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(make, parse_args(argv))
