#!/usr/bin/env python
"""Write a config with its classification losses swapped, or show what they are."""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

from polyfocal import heads, swapping
from polyfocal.errors import UserError

DESCRIPTION = """\
Swap the classification losses of a config for losses of this package: the shortest config that
is the given one with the losses, their adapters and the types of heads that need it. Without
--loss, show the classification losses of the config and what fits in their places."""

EPILOG = """\
examples:
  python tools/swap_loss.py mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py
  python tools/swap_loss.py mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py --loss poly1 --epsilon 1 --out my.py
  python tools/swap_loss.py my_config.py --loss FocalLoss gamma=1.5 --slot rpn_head
"""  # noqa: E501


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a file, or mmdet::NAME, mmdet3d::NAME")
    parser.add_argument(
        "--loss",
        nargs="+",
        metavar=("LOSS", "KEY=VALUE"),
        help="poly1, for the Poly-1 form of what stands there, or the name of a loss; settings",
    )
    parser.add_argument("--epsilon", type=float, help="of the Poly-1 term (default 1)")
    parser.add_argument(
        "--slot",
        action="append",
        metavar="NAME",
        help="which loss, as the table shows it, or a part of its name (default all that decide on"
        " classes)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write it there, not on the screen"
    )
    return parser.parse_args(argv)


def settings_of(words: list[str]) -> dict[str, Any]:
    """The settings that follow the name of a loss."""
    settings = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign:
            raise UserError(f"--loss: {word!r} is no setting: write KEY=VALUE")
        try:
            settings[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            settings[key] = value
    return settings


def table(found: list[swapping.Found]) -> str:
    """What a config's losses are and what fits in their places."""
    lines = []
    for loss in found:
        kind = None if loss.slot is None else heads.KINDS[loss.slot.kind]
        if kind is None:
            fits = "not in the table of heads: see docs/heads.md"
        elif loss.slot is not None and loss.slot.kind == "name":
            fits = f"{heads.FAMILIES[heads.SIGMOID]}, in polyfocal.{loss.head}"
        else:
            fits = ", or ".join(heads.FAMILIES[of] for of in kind.fits) or f"none: {kind.take}"
        name = str(loss.loss["type"])
        lines.append(f"{loss.where}\n    of {loss.head}, now {name}\n    fits: {fits}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    args = parse_args(argv)
    try:
        print_or_write(args)
    except UserError as error:
        print(f"swap_loss.py: {error}", file=sys.stderr)
        return 2
    return 0


def print_or_write(args: argparse.Namespace) -> None:
    """The job."""
    config = swapping.load(args.config)
    if args.loss is None:
        if args.epsilon is not None or args.out or args.slot:
            raise UserError(
                "--epsilon, --slot and --out are given without --loss: write --loss poly1"
            )
        print(table(swapping.find_losses(config.model)))
        return
    settings = settings_of(args.loss[1:])
    if args.epsilon is not None:
        settings["epsilon"] = args.epsilon
    changes = swapping.plan(config.model, args.loss[0], args.slot, **settings)
    base = args.config if "::" in args.config else str(Path(args.config).resolve())
    text = swapping.as_text(base, changes)
    if args.out is None:
        print(text, end="")
        return
    if args.out.exists():
        raise UserError(f"{args.out} is there already: name another file")
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {', '.join(found.where for found, *_ in changes)} swapped")


if __name__ == "__main__":
    sys.exit(main())
