"""Segmentations of COCO's two kinds, checked before pycocotools' C code decodes them."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# Larger than any picture, yet areas stay finite and pycocotools can still draw polygons.
FARTHEST = 1e5
"""How far from 0 a coordinate may be, in pixels."""


def is_number(value: Any) -> bool:
    """Whether the value is a finite real number, and not a boolean."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def is_segmentation(value: Any, size: list[int]) -> bool:
    """Whether a mask can be made of the value, for a picture of height and width ``size``."""
    if isinstance(value, list):
        return bool(value) and all(_is_polygon(polygon) for polygon in value)
    if isinstance(value, dict) and isinstance(value.get("counts"), list):
        counts = value["counts"]
        return (
            _is_size(value.get("size"), size)
            and all(type(run) is int and run >= 0 for run in counts)
            and sum(counts) == size[0] * size[1]
        )
    return is_compressed_rle(value, size)


def is_compressed_rle(value: Any, size: list[int]) -> bool:
    """Whether the value is a compressed RLE with as many pixels as ``size``."""
    if not (isinstance(value, dict) and _is_size(value.get("size"), size)):
        return False
    text = value.get("counts")
    if isinstance(text, str) and text.isascii():
        text = text.encode()
    if not isinstance(text, bytes) or not text:
        return False
    # Six bits per character: five of a number, lowest first, and one that says if more follow.
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    if codes.min() < 0 or codes.max() > 63 or codes[-1] >= 32:
        return False
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > 7:  # characters: more than 32 bits
        return False
    starts = ends - lengths + 1
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << 5 * places, starts)
    numbers -= ((codes[ends] & 16) >> 4) << 5 * lengths  # the last one holds the sign
    # From the fourth run on, a number is the difference to the run two before.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return bool(numbers.min() >= 0 and numbers.sum() == size[0] * size[1])


def run_lengths(segmentation: Any, size: list[int]) -> Any:
    """The compressed RLE of a segmentation that :func:`is_segmentation` accepts."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation


def area_of(annotation: Mapping[str, Any], size: list[int]) -> tuple[float, bool]:
    """The area of an annotation in pixels, and whether it is that of a mask, not of the box.

    Args:
        annotation: With a ``bbox``, and with or without a ``segmentation``: one that
            :func:`is_segmentation` does not accept does not count.
        size: Height and width of the picture.
    """
    segmentation = annotation.get("segmentation")
    if is_segmentation(segmentation, size):
        return float(coco_mask.area(run_lengths(segmentation, size))), True
    return annotation["bbox"][2] * annotation["bbox"][3], False


def _is_polygon(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(is_number(number) and abs(number) <= FARTHEST for number in value)
    )


def _is_size(value: Any, size: list[int]) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and list(value) == size
