"""Digit scenes: a detection and segmentation set made from scikit-learn's handwritten digits.

Digits of 8x8 pixels are enlarged, rotated, coloured and put, partly over one another, on textured
backgrounds. Boxes and masks are exact, because the generator knows every pixel. The same seed,
settings and :data:`VERSION` give the same pictures and annotations. Picture ``i`` of a split does
not depend on the number of pictures.
"""

import colorsys
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits

from polyfocal.demo.folder import Scenes, whole, whole_pair

VERSION = 1
"""Raised whenever the same settings would give other pictures or annotations."""

DEMO_FOLDER = Path("data/digit_scenes")
"""Where ``--demo`` keeps the digit scenes, below the current directory."""

CLASSES = tuple(str(digit) for digit in range(10))

# A digit that is hidden more than this can no longer be read, however its box overlaps others.
_MIN_VISIBLE = 0.5
_MAX_ROTATION = 25.0  # degrees; much more and 6 and 9 become one class
_MIN_CONTRAST = 3.0  # WCAG 2 contrast ratio between a digit and both tones of the background
_PLACEMENT_TRIES = 40

_SPLITS = ("train", "val", "ood")
# One random stream per purpose, so that label noise does not change a pixel and the colour cue does
# not move a digit.
_SCENE, _CUE, _LABEL_NOISE = range(3)


@dataclass(frozen=True)
class DigitScenes(Scenes):
    """The settings of a set of digit scenes; checked when made.

    Attributes:
        num_train: Pictures in the train split, ``>= 1``.
        num_val: Pictures in the val split, ``>= 1``.
        num_ood: Pictures in the ood split, ``>= 1``; written only where ``spurious > 0``.
        size: Side of the square pictures in pixels, ``>= 64``.
        digits: Fewest and most digits tried in a picture. A digit for which no place is found is
            left out, so crowded pictures may hold fewer; each holds at least one.
        digit_size: Smallest and largest height of a digit in pixels before rotation; the largest
            may be at most 0.7 of ``size`` so that it fits when rotated.
        long_tail: How many times more frequent the digit 0 is than the digit 9 in train, in
            [1, 1e6]; the frequencies in between fall exponentially. val and ood stay balanced.
        overlap: Largest fraction of the smaller of two boxes that the other may cover, in
            [0, 1]. In any case at least half of every digit stays visible.
        label_noise: Probability that a train annotation names a wrong class, each of the other
            nine being equally likely, in [0, 1]. Pictures, boxes and masks stay the same.
        spurious: Probability that the cue agrees with a digit's class in train and val, in
            [0, 1]; otherwise the cue points to one of the other classes. 0 switches the cue off;
            0.1 is chance. In ood the cue is independent of the class.
        cue: ``"color"`` ties a digit's hue to its class; ``"background"`` ties the hue of the
            picture's background to the class of the digits on it.

    Raises:
        UserError: A value is out of its range.
    """

    what = "digit scenes"
    settings_file = "digit_scenes.json"
    command = "make_demo_data"
    version = VERSION

    num_train: int = 600
    num_val: int = 150
    num_ood: int = 150
    size: int = 160
    digits: tuple[int, int] = (2, 5)
    digit_size: tuple[int, int] = (32, 72)
    long_tail: float = 1.0
    overlap: float = 0.25
    label_noise: float = 0.0
    spurious: float = 0.0
    cue: Literal["color", "background"] = "color"

    def __post_init__(self) -> None:
        super().__post_init__()
        check = self.check
        check("size", whole(self.size) and self.size >= 64, "a whole number of 64 pixels or more")
        check(
            "digits",
            whole_pair(self.digits) and 1 <= self.digits[0] <= self.digits[1],
            "two whole numbers (fewest, most) with 1 <= fewest <= most",
        )
        largest = math.floor(0.7 * self.size)
        check(
            "digit_size",
            whole_pair(self.digit_size)
            and 16 <= self.digit_size[0] <= self.digit_size[1] <= largest,
            "two whole numbers of pixels (smallest, largest) with 16 <= smallest <= largest <= "
            f"{largest} (0.7 of size {self.size})",
        )
        for name in ("long_tail", "overlap", "label_noise", "spurious"):
            check(name, isinstance(getattr(self, name), (int, float)), "a number")
        check("long_tail", 1 <= self.long_tail <= 1e6, "a ratio between 1 and 1e6")
        for name in ("overlap", "label_noise", "spurious"):
            check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        check("cue", self.cue in ("color", "background"), "'color' or 'background'")

    @property
    def splits(self) -> dict[str, int]:
        splits = {"train": self.num_train, "val": self.num_val}
        if self.spurious > 0:
            splits["ood"] = self.num_ood
        return splits

    def class_probabilities(self, split: str) -> NDArray[np.float64]:
        """Probability of each of the 10 digits in a split, before any background cue."""
        ratio = self.long_tail if split == "train" else 1.0
        weights = ratio ** -np.linspace(0.0, 1.0, len(CLASSES))
        return weights / weights.sum()

    def fill(self, folder: Path) -> None:
        for split, count in self.splits.items():
            _write_split(folder, self, split, count)


@dataclass(frozen=True)
class Instance:
    """One digit of a scene: ``mask`` (bool, size x size) is its visible part."""

    digit: int
    source: int
    cue: int | None
    mask: NDArray[np.bool_]


def write_digit_scenes(
    root: Path, scenes: DigitScenes = DigitScenes(), *, overwrite: bool = False
) -> Path:
    """Write digit scenes as a COCO-format folder, see :meth:`DigitScenes.write`.

    ``root/annotations/{train,val}.json``, ``root/images/{train,val}/000001.png`` and
    ``root/digit_scenes.json`` with the version and the settings; ``ood`` too where ``spurious`` is
    above 0.
    """
    return scenes.write(root, overwrite=overwrite)


def render_scene(
    scenes: DigitScenes, split: str, index: int
) -> tuple[NDArray[np.uint8], list[Instance]]:
    """Draw picture ``index`` (from 0) of a split.

    Returns:
        The picture, uint8 of shape (size, size, 3) in RGB, and its digits, the lowest first.
    """
    rng = _generator(scenes, split, index, _SCENE)
    cue_rng = _generator(scenes, split, index, _CUE)
    probabilities = scenes.class_probabilities(split)
    sources = _sources()[split]

    background_cue: int | None = None
    background_hue = rng.random()
    if scenes.spurious > 0 and scenes.cue == "background":
        background_cue = int(cue_rng.choice(len(CLASSES), p=probabilities))
        background_hue = _cue_hue(background_cue, cue_rng)
    canvas, tones = _background(rng, scenes.size, background_hue)

    full: list[NDArray[np.bool_]] = []
    instances: list[Instance] = []
    for _ in range(int(rng.integers(scenes.digits[0], scenes.digits[1] + 1))):
        digit = int(rng.choice(len(CLASSES), p=probabilities))
        hue = rng.random()
        cue = background_cue
        if scenes.spurious > 0 and scenes.cue == "background":
            digit = _class_on_background(
                scenes, split, background_cue, digit, probabilities, cue_rng
            )
        elif scenes.spurious > 0:
            cue = _color_cue(scenes, split, digit, cue_rng)
            hue = _cue_hue(cue, cue_rng)
        source = int(rng.choice(sources[digit]))
        opacity = _enlarge(source, rng, scenes)
        color = _digit_color(hue, tones, rng)

        placed = _place(opacity > 0.5, full, instances, scenes, rng)
        if placed is None:
            continue
        top, left, shape, visible = placed
        instances = [
            Instance(old.digit, old.source, old.cue, mask)
            for old, mask in zip(instances, visible, strict=True)
        ]
        full.append(shape)
        instances.append(Instance(digit, source, cue, shape))
        height, width = opacity.shape
        patch = canvas[top : top + height, left : left + width]
        patch += opacity[:, :, None] * (color - patch)
    return np.round(canvas * 255).astype(np.uint8), instances


def _write_split(root: Path, scenes: DigitScenes, split: str, count: int) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        picture, instances = render_scene(scenes, split, index)
        name = f"{index + 1:06d}.png"
        Image.fromarray(picture).save(folder / name, compress_level=4)
        images.append(
            {
                "id": index + 1,
                "file_name": name,
                "width": scenes.size,
                "height": scenes.size,
            }
        )
        noise_rng = _generator(scenes, split, index, _LABEL_NOISE)
        for instance in instances:
            label = instance.digit
            if split == "train" and noise_rng.random() < scenes.label_noise:
                label = _another_class(label, noise_rng)
            rle = coco_mask.encode(np.asfortranarray(instance.mask, dtype=np.uint8))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": index + 1,
                "category_id": label + 1,
                "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                "area": float(coco_mask.area(rle)),
                "iscrowd": 0,
                "segmentation": {
                    "size": rle["size"],
                    "counts": rle["counts"].decode("ascii"),
                },
                "true_category_id": instance.digit + 1,
                "source_digit": instance.source,
            }
            if instance.cue is not None:
                annotation["cue_category_id"] = instance.cue + 1
            annotations.append(annotation)
    content = {
        "info": {"description": f"Digit scenes, {split}", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": digit + 1, "name": name, "supercategory": "digit"}
            for digit, name in enumerate(CLASSES)
        ],
    }
    file = root / "annotations" / f"{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def _generator(scenes: DigitScenes, split: str, index: int, stream: int) -> np.random.Generator:
    key = (VERSION, _SPLITS.index(split), index, stream)
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(entropy=scenes.seed, spawn_key=key))
    )


@cache
def _digit_images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    data = load_digits()
    images = np.pad(data.images.astype(np.float32) / 16.0, ((0, 0), (2, 2), (2, 2)))
    return images, data.target


@cache
def _sources() -> dict[str, list[NDArray[np.int64]]]:
    """The source pictures per split and digit: of every ten of a class, 6, 2 and 2."""
    targets = _digit_images()[1]
    shares = {"train": range(6), "val": range(6, 8), "ood": range(8, 10)}
    by_class = [np.flatnonzero(targets == digit) for digit in range(len(CLASSES))]
    return {
        split: [found[np.isin(np.arange(len(found)) % 10, list(share))] for found in by_class]
        for split, share in shares.items()
    }


def _enlarge(source: int, rng: np.random.Generator, scenes: DigitScenes) -> NDArray[np.float32]:
    """Opacity in [0, 1] of a digit, enlarged and rotated in one bicubic step and cut tight."""
    image = _digit_images()[0][source]
    scale = rng.uniform(scenes.digit_size[0], scenes.digit_size[1]) / 8.0
    angle = math.radians(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
    side = math.ceil(len(image) * scale)
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    middle_out, middle_in = side / 2, len(image) / 2
    enlarged = Image.fromarray(image).transform(
        (side, side),
        Image.Transform.AFFINE,
        (
            cosine,
            sine,
            middle_in - (cosine + sine) * middle_out,
            -sine,
            cosine,
            middle_in - (cosine - sine) * middle_out,
        ),
        Image.Resampling.BICUBIC,
    )
    # Steepen the edge to about three pixels, whatever the scale.
    opacity = np.clip(0.5 + (np.asarray(enlarged) - 0.45) * (scale / 2), 0, 1).astype(np.float32)
    top, left, bottom, right = _box(opacity > 0)
    return opacity[top:bottom, left:right]


def _place(
    shape: NDArray[np.bool_],
    full: list[NDArray[np.bool_]],
    instances: list[Instance],
    scenes: DigitScenes,
    rng: np.random.Generator,
) -> tuple[int, int, NDArray[np.bool_], list[NDArray[np.bool_]]] | None:
    """Find a place: top, left, the digit's mask and what stays visible of the earlier digits."""
    height, width = shape.shape
    own = _box(shape)
    boxes = [_box(mask) for mask in full]
    for _ in range(_PLACEMENT_TRIES):
        top = int(rng.integers(0, scenes.size - height + 1))
        left = int(rng.integers(0, scenes.size - width + 1))
        box = (top + own[0], left + own[1], top + own[2], left + own[3])
        if any(_share(box, other) > scenes.overlap for other in boxes):
            continue
        mask = np.zeros((scenes.size, scenes.size), dtype=bool)
        mask[top : top + height, left : left + width] = shape
        visible = [instance.mask & ~mask for instance in instances]
        if all(
            part.sum() >= _MIN_VISIBLE * whole.sum()
            for part, whole in zip(visible, full, strict=True)
        ):
            return top, left, mask, visible
    return None


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what is True; the last two are beside it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _share(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Fraction of the smaller box that the other covers."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(height, 0) * max(width, 0) / smaller


def _background(
    rng: np.random.Generator, size: int, hue: float
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """A textured picture of two similar tones, both dark or both light, and the two tones."""
    lightness = rng.uniform(0.1, 0.25) if rng.random() < 0.5 else rng.uniform(0.78, 0.9)
    step = rng.uniform(0.03, 0.08)
    saturation = rng.uniform(0.4, 0.8)
    tones = [_rgb(hue, value, saturation) for value in (lightness - step, lightness + step)]

    angle = rng.uniform(0, math.pi)
    across = np.linspace(-1, 1, size)
    along = math.cos(angle) * across[None, :] + math.sin(angle) * across[:, None]
    texture = rng.integers(3)
    if texture == 0:
        blend = 0.5 + along / 2.83
    elif texture == 1:
        blend = 0.5 + 0.5 * np.sin(along * math.pi * rng.uniform(4, 12))
    else:
        cells = int(rng.integers(6, 24))
        noise = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        blend = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    grain = rng.normal(0.0, 0.06, (size, size))
    blend = np.clip(blend + grain, 0, 1)[:, :, None]
    return tones[0] + blend * (tones[1] - tones[0]), tones


def _digit_color(
    hue: float, tones: list[NDArray[np.float64]], rng: np.random.Generator
) -> NDArray[np.float64]:
    """A colour of the hue that stands out from both tones of the background."""
    dark = _luminance(tones[0]) < 0.3
    lightness = rng.uniform(0.55, 0.75) if dark else rng.uniform(0.2, 0.45)
    saturation = rng.uniform(0.6, 1.0)
    while True:
        color = _rgb(hue, lightness, saturation)
        if lightness in (0.0, 1.0) or all(
            _contrast(color, tone) >= _MIN_CONTRAST for tone in tones
        ):
            return color
        lightness = min(max(lightness + (0.03 if dark else -0.03), 0.0), 1.0)


def _rgb(hue: float, lightness: float, saturation: float) -> NDArray[np.float64]:
    return np.array(colorsys.hls_to_rgb(hue % 1.0, lightness, saturation))


def _luminance(color: NDArray[np.float64]) -> float:
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _contrast(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    dark, light = sorted((_luminance(a), _luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def _cue_hue(digit: int, rng: np.random.Generator) -> float:
    return (digit + rng.uniform(-0.2, 0.2)) / len(CLASSES)


def _another_class(digit: int, rng: np.random.Generator) -> int:
    return (digit + int(rng.integers(1, len(CLASSES)))) % len(CLASSES)


def _color_cue(scenes: DigitScenes, split: str, digit: int, rng: np.random.Generator) -> int:
    if split == "ood":
        return int(rng.integers(len(CLASSES)))
    return digit if rng.random() < scenes.spurious else _another_class(digit, rng)


def _class_on_background(
    scenes: DigitScenes,
    split: str,
    background: int | None,
    drawn: int,
    probabilities: NDArray[np.float64],
    rng: np.random.Generator,
) -> int:
    """A background serves several digits, so here the class follows the cue."""
    if background is None or split == "ood":
        return drawn
    if rng.random() < scenes.spurious:
        return background
    others = probabilities.copy()
    others[background] = 0.0
    return int(rng.choice(len(CLASSES), p=others / others.sum()))
