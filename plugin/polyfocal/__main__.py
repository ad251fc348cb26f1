"""``polyfocal COMMAND``, or ``python -m polyfocal COMMAND``: the tools, wherever polyfocal is.

A command's module is imported when it is asked for: each needs other packages.
"""

import argparse
import sys
from importlib import import_module

import polyfocal
from polyfocal.errors import PackageError

COMMANDS = {
    "train": "train a detector or a classifier",
    "test": "evaluate a checkpoint",
    "tune": "search the settings of a loss on your data",
    "reproduce": "carry out a study over seeds",
    "compare": "compare finished trainings in one HTML file",
    "curvature": "measure how curved the loss is at a checkpoint",
    "calibration": "measure how far scores can be trusted, and calibrate them",
    "export": "write a trained detector as an ONNX file",
    "diagnose": "say how sure an AP is, and which mistakes cost it",
    "train_detectron2": "train and evaluate a detector of Detectron2",
    "plot_loss": "draw losses and their gradients",
    "swap_loss": "write a config with its classification losses swapped",
    "browse_dataset": "look at a data set before training on it",
    "convert": "write a data set in YOLO's, Pascal VOC's or Roboflow's format in COCO's",
    "make_demo_data": "write the built-in data set",
    "create_kitti_infos": "write MMDetection3D's info files for a folder in KITTI's layout",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog="polyfocal",
        usage="polyfocal COMMAND ...",
        description="The tools of polyfocal.",
        epilog="commands (each has a --help):\n"
        + "".join(f"  {name:{width}}{what}\n" for name, what in COMMANDS.items())
        + "\nwhat is installed here, and whether it fits together: python -m polyfocal.doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=polyfocal.__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    given = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(given[:1]).command
    try:
        status: int = import_module(f"polyfocal.commands.{name}").main(given[1:])
    except PackageError as error:
        sentence = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "polyfocal").partition(".")[0] == "polyfocal":
            raise
        sentence = (
            f"polyfocal {name} needs {error.name}, which is not installed: it comes with an extra, "
            "such as pip install 'polyfocal[mmdet]'"
        )
    else:
        return status
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
