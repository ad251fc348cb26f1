"""What a person looks at before training on a COCO-format data set: statistics and pictures."""

import colorsys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pycocotools.coco import COCO
from rich import box
from rich.table import Table

from polyfocal.data.coco import CocoSplit
from polyfocal.data.evaluation import USUAL_LIMIT
from polyfocal.data.files import written_whole
from polyfocal.data.pictures import usual_loader
from polyfocal.errors import UserError
from polyfocal.tables import table

# COCO's limits between small, medium and large objects, in pixels of area.
SMALL, MEDIUM = 32**2, 96**2
# With more objects than this, the labels would hide the picture.
MOST_LABELS = 40
_OURS = {"Software": "polyfocal browse_dataset"}  # in each PNG: others' are not removed


def statistics(split: CocoSplit) -> Table:
    """A row per class, and one for all classes: objects, pictures with them, sizes."""
    by_class = defaultdict(list)
    for annotation in split.annotations.objects:
        by_class[annotation["category_id"]].append(annotation)
    rows = [
        _row(name, by_class[id_])
        for id_, name in zip(split.category_ids, split.classes, strict=True)
    ]
    made = table(
        f"{split.annotation_file}: {split.num_images} pictures",
        ("class", "objects", "pictures", "small", "medium", "large", "median box"),
        rows,
        box=box.SIMPLE,
        pad_edge=False,
    )
    made.add_section()
    made.add_row(*_row("all", split.annotations.objects))
    return made


def _row(name: str, annotations: list[dict[str, Any]]) -> list[str]:
    areas = np.array([annotation["area"] for annotation in annotations])
    pictures = {annotation["image_id"] for annotation in annotations}
    small, large = (areas < SMALL).sum(), (areas >= MEDIUM).sum()
    counts = (len(areas), len(pictures), small, len(areas) - small - large, large)
    median = "-"
    if annotations:
        width, height = np.median([a["bbox"][2:] for a in annotations], axis=0)
        median = f"{width:.0f} x {height:.0f}"
    return [name, *map(str, counts), median]


def remarks(split: CocoSplit) -> list[str]:
    """What else a person should know before training."""
    images, objects = split.annotations.images, split.annotations.objects
    sides = [sorted({image[key] for image in images}) for key in ("width", "height")]
    width, height = (f"{s[0]}" if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in sides)
    bare = len(images) - len({annotation["image_id"] for annotation in objects})
    crowds = split.num_annotations - len(objects)
    lines = [
        f"pictures are in {split.image_dir}, {width} wide and {height} high",
        f"{len(objects) / len(images):.1f} objects per picture, at most {split.max_instances}; "
        f"{bare} pictures without any; {crowds} crowd regions",
        "every object has a mask" if split.has_masks else f"no masks: {split.mask_problem}",
        *split.notes,
    ]
    if split.max_instances > USUAL_LIMIT:
        lines.append(
            f"up to {split.max_instances} objects in a picture: raise the customary limit of "
            f"{USUAL_LIMIT} detections for training and evaluation"
        )
    return lines


def draw_some(split: CocoSplit, out: Path, num: int, category: str | None = None) -> int:
    """Draw pictures at even distances in the order of the file, and a contact sheet of them.

    Args:
        split: Split of the data set.
        out: Folder for a PNG per picture and ``contact_sheet.png``; those of an earlier drawing
            are removed.
        num: Most pictures to draw, 0 for none.
        category: Only pictures and objects of this class.

    Returns:
        How many pictures were drawn.

    Raises:
        UserError: There is no such class, or the folder cannot be written.
    """
    if num < 0:
        raise UserError(f"--num must be 0 or more, got {num}.")
    if category is not None and category not in split.classes:
        raise UserError(
            f"--category {category!r} is not a class of {split.annotation_file}; "
            f"it has {', '.join(split.classes)}."
        )
    coco = split.annotations.coco()
    images = coco.dataset["images"]
    if category is not None:
        with_it = set(coco.catToImgs[split.category_ids[split.classes.index(category)]])
        images = [image for image in images if image["id"] in with_it]
    places = np.linspace(0, len(images) - 1, min(num, len(images))).round().astype(int)
    chosen = [images[place] for place in places]
    if not chosen:
        return 0
    _remove_drawn(out)
    for number, image in enumerate(chosen, start=1):
        long_side = max(image["width"], image["height"])
        scale = min(max(640, long_side), 1600) / long_side / 100
        figure = Figure(figsize=(image["width"] * scale, image["height"] * scale), dpi=100)
        _draw(figure.add_axes((0, 0, 1, 1)), split, coco, image, category, font_size=9)
        with written_whole(out / f"{number:02d}_{Path(image['file_name']).stem}.png") as part:
            figure.savefig(part, metadata=_OURS)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(3.5 * columns, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(chosen) :]:
        axes.axis("off")
    for axes, image in zip(grid, chosen, strict=False):
        _draw(axes, split, coco, image, category, font_size=6)
        axes.set_title(image["file_name"], fontsize=6, parse_math=False)
    with written_whole(out / "contact_sheet.png") as part:
        figure.savefig(part, metadata=_OURS)
    return len(chosen)


def _remove_drawn(out: Path) -> None:
    """Remove what was drawn into a folder before, which may be of another data set."""
    for file in (*out.glob("[0-9][0-9]*_*.png"), out / "contact_sheet.png"):
        try:
            with Image.open(file) as picture:
                ours = _OURS.items() <= picture.info.items()
        except OSError:  # there is none, or it is no picture
            continue
        if ours:
            file.unlink()


def _draw(
    axes: Axes,
    split: CocoSplit,
    coco: COCO,
    image: dict[str, Any],
    category: str | None,
    font_size: float,
) -> None:
    """Draw a picture with boxes, masks and labels; the colour tells the class.

    If there is only one class, the colour tells the objects apart.
    """
    width, height = image["width"], image["height"]
    extent = (0, width, height, 0)
    picture = usual_loader()(split.image_dir / image["file_name"])  # as a training sees it
    axes.imshow(picture[:, :, ::-1], extent=extent)
    labels = {id_: index for index, id_ in enumerate(split.category_ids)}
    annotations = [
        annotation
        for annotation in coco.imgToAnns[image["id"]]
        if category in (None, split.classes[labels[annotation["category_id"]]])
    ]
    several = len(split.classes) > 1
    overlay = np.zeros((height, width, 4))
    for number, annotation in enumerate(annotations):
        label = labels[annotation["category_id"]]
        # Steps of the golden ratio keep neighbours apart in hue, however many there are.
        hue = (label if several else number) * 0.618034 % 1
        color = colorsys.hsv_to_rgb(hue, 0.85, 0.85)
        left, top, *size = annotation["bbox"]
        style: dict[str, Any] = {"color": color, "ls": "--" if annotation["iscrowd"] else "-"}
        axes.add_patch(Rectangle((left, top), *size, fill=False, lw=font_size / 6, **style))
        if split.has_masks and not annotation["iscrowd"]:
            overlay[coco.annToMask(annotation) > 0] = (*color, 0.4)
        if several and len(annotations) <= MOST_LABELS:
            axes.text(
                left,
                top,
                split.classes[label],
                fontsize=font_size,
                color="white",
                va="bottom" if top > height / 20 else "top",
                clip_on=True,
                parse_math=False,
                bbox={"facecolor": color, "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
            )
    axes.imshow(overlay, extent=extent)
    axes.axis("off")
