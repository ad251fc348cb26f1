#!/usr/bin/env python
"""Draw pictures of a COCO-format data set with their annotations and print its statistics."""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyfocal.data.coco import CocoSplit, load_split
from polyfocal.data.pictures import usual_loader
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import run_tool

DESCRIPTION = """\
Look at a COCO-format data set before training on it: check its files, print how many objects of
which size each class has, and draw some of its pictures with boxes, masks and labels, one PNG a
picture and a contact sheet of them all. A dashed box is a crowd region."""

EPILOG = """\
examples:
  python tools/browse_dataset.py data/digit_scenes
  python tools/browse_dataset.py data/coco --split val --num 30 --category "traffic light"
"""

# COCO's limits between small, medium and large objects, in pixels of area.
SMALL, MEDIUM = 32**2, 96**2
# With more objects than this, the labels would hide the picture.
MOST_LABELS = 40


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the data set")
    parser.add_argument("--split", default="train", help="which split (default train)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write the pictures (default work_dirs/browse/FOLDER_SPLIT)",
    )
    parser.add_argument(
        "--num", type=int, default=16, metavar="N", help="pictures to draw, 0 for none (default 16)"
    )
    parser.add_argument(
        "--category", metavar="NAME", help="only pictures and objects of this class"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(browse, parse_args(argv), goes_on_with=None)


def browse(args: argparse.Namespace) -> None:
    """Check, count and draw."""
    if args.num < 0:
        raise UserError(f"--num must be 0 or more, got {args.num}.")
    split = load_split(args.folder, args.split)
    if args.category is not None and args.category not in split.classes:
        raise UserError(
            f"--category {args.category!r} is not a class of {split.annotation_file}; "
            f"it has {', '.join(split.classes)}."
        )
    coco = split.annotations.coco()

    console = Console()
    console.print(statistics(split))
    for line in remarks(split):
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    chosen = choose(split, coco, args.num, args.category)
    if not chosen:
        return
    out = args.out or Path("work_dirs/browse") / f"{args.folder.resolve().name}_{args.split}"
    try:
        draw_all(out, split, coco, chosen, args.category)
    except OSError as error:
        raise UserError(f"Cannot write pictures to {out}: {error.strerror or error}.") from error
    console.print(
        f"{len(chosen)} pictures and contact_sheet.png are in {out}",
        highlight=False,
        soft_wrap=True,
    )


def draw_all(
    out: Path,
    split: CocoSplit,
    coco: COCO,
    chosen: list[dict[str, Any]],
    category: str | None,
) -> None:
    """Write a PNG for each picture and the contact sheet."""
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(chosen, start=1):
        long_side = max(image["width"], image["height"])
        scale = min(max(640, long_side), 1600) / long_side / 100
        figure = plt.figure(figsize=(image["width"] * scale, image["height"] * scale), dpi=100)
        draw(figure.add_axes((0, 0, 1, 1)), split, coco, image, category, font_size=9)
        save(figure, out / f"{number:02d}_{Path(image['file_name']).stem}.png")
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.5 * columns, 3.5 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, image in zip(grid.flat, chosen, strict=False):
        draw(axes, split, coco, image, category, font_size=6)
        axes.set_title(image["file_name"], fontsize=6)
    save(figure, out / "contact_sheet.png")


def statistics(split: CocoSplit) -> Table:
    """One row a class: objects, pictures with it, sizes."""
    table = Table(
        title=f"{split.annotation_file}: {split.num_images} pictures",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("class", no_wrap=True)
    for name in ("objects", "pictures", "small", "medium", "large", "median box"):
        table.add_column(name, justify="right", no_wrap=True)
    by_class = defaultdict(list)
    for annotation in split.annotations.objects:
        by_class[annotation["category_id"]].append(annotation)

    def add_row(name: str, annotations: list[dict[str, Any]]) -> None:
        areas = np.array([annotation["area"] for annotation in annotations])
        median = "-"
        if annotations:
            width, height = np.median([a["bbox"][2:] for a in annotations], axis=0)
            median = f"{width:.0f} x {height:.0f}"
        table.add_row(
            Text(name),
            str(len(annotations)),
            str(len({annotation["image_id"] for annotation in annotations})),
            str((areas < SMALL).sum()),
            str(((areas >= SMALL) & (areas < MEDIUM)).sum()),
            str((areas >= MEDIUM).sum()),
            median,
        )

    for id_, name in zip(split.category_ids, split.classes, strict=True):
        add_row(name, by_class[id_])
    table.add_section()
    add_row("all", split.annotations.objects)
    return table


def remarks(split: CocoSplit) -> list[str]:
    """What else to know before training."""
    images, objects = split.annotations.images, split.annotations.objects
    sides = [sorted({image[key] for image in images}) for key in ("width", "height")]
    width, height = (f"{s[0]}" if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in sides)
    bare = len(images) - len({annotation["image_id"] for annotation in objects})
    crowds = split.num_annotations - len(objects)
    lines = [
        f"pictures are in {split.image_dir}, {width} wide and {height} high",
        f"{len(objects) / len(images):.1f} objects a picture, at most {split.max_instances}; "
        f"{bare} pictures without any; {crowds} crowd regions",
        "every object has a mask" if split.has_masks else f"no masks: {split.mask_problem}",
        *split.notes,
    ]
    if split.max_instances > 100:
        lines.append(
            f"up to {split.max_instances} objects in a picture: "
            "raise the customary limit of 100 detections for training and evaluation"
        )
    return lines


def choose(split: CocoSplit, coco: COCO, num: int, category: str | None) -> list[dict[str, Any]]:
    """Pictures at even distances in the order of the file."""
    images = coco.dataset["images"]
    if category is not None:
        with_it = set(coco.getImgIds(catIds=[split.category_ids[split.classes.index(category)]]))
        images = [image for image in images if image["id"] in with_it]
    if len(images) <= num:
        return images
    return [images[index] for index in np.linspace(0, len(images) - 1, num).round().astype(int)]


def draw(
    axes: Axes,
    split: CocoSplit,
    coco: COCO,
    image: dict[str, Any],
    category: str | None,
    font_size: float,
) -> None:
    """Draw a picture with boxes, masks and labels; the colour tells the class.

    Where there is one class only, the colour tells the objects apart.
    """
    width, height = image["width"], image["height"]
    picture = usual_loader()(split.image_dir / image["file_name"])  # as a training sees it
    axes.imshow(picture[:, :, ::-1], extent=(0, width, height, 0))
    labels = {
        id_: (index, name)
        for index, (id_, name) in enumerate(zip(split.category_ids, split.classes, strict=True))
    }
    annotations = [
        annotation
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        if category in (None, labels[annotation["category_id"]][1])
    ]
    overlay = np.zeros((height, width, 4))
    for number, annotation in enumerate(annotations):
        index, name = labels[annotation["category_id"]]
        color = _color(index if len(split.classes) > 1 else number)
        left, top, box_width, box_height = annotation["bbox"]
        style = "--" if annotation["iscrowd"] else "-"
        axes.add_patch(
            Rectangle(
                (left, top),
                box_width,
                box_height,
                fill=False,
                color=color,
                ls=style,
                lw=font_size / 6,
            )
        )
        if split.has_masks and not annotation["iscrowd"]:
            overlay[coco.annToMask(annotation) > 0] = (*color, 0.4)
        if len(split.classes) > 1 and len(annotations) <= MOST_LABELS:
            above = top > height / 20
            axes.text(
                left,
                top,
                name,
                fontsize=font_size,
                color="white",
                va="bottom" if above else "top",
                clip_on=True,
                bbox={"facecolor": color, "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
            )
    axes.imshow(overlay, extent=(0, width, height, 0))
    axes.axis("off")


def _color(index: int) -> tuple[float, float, float]:
    # Steps of the golden ratio keep neighbouring indices apart in hue, however many there are.
    red, green, blue = matplotlib.colors.hsv_to_rgb((index * 0.618034 % 1, 0.85, 0.85))
    return float(red), float(green), float(blue)


def save(figure: Figure, path: Path) -> None:
    """Write a figure; an interrupted run leaves no half of a picture under its name."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
