"""Detections in COCO's results format, made from a list or a file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyfocal.data.annotations import Annotations, is_finite_box, is_whole, kind_of
from polyfocal.data.files import DatasetError, read_json
from polyfocal.data.masks import FARTHEST, is_compressed_rle, is_number

Kind = Literal["bbox", "segm"]

ROUNDING = 1e-6
"""How far outside [0, 1] a probability may be that a model computed in single precision."""


@dataclass(frozen=True, eq=False)
class Detections:
    """A model's detections.

    Attributes:
        source: How messages call them.
        entries: As they were given, each with ``image_id``, ``category_id``, ``score`` and ``bbox``
            (x, y, width, height in pixels) or ``segmentation`` (compressed RLE).
    """

    source: str
    entries: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, results: "Sequence[dict[str, Any]] | str | Path | Detections") -> "Detections":
        """Detections from a list, from a JSON file with a list, or as they are.

        Raises:
            DatasetError: The file cannot be read, or holds no list.
        """
        if isinstance(results, Detections):
            return results
        source, entries = "the results", results
        if isinstance(results, (str, Path)):
            source, entries = str(results), read_json(Path(results))
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise DatasetError(f"{source} must be a list of detections, got {kind_of(entries)}.")
        return cls(source, entries)

    @property
    def most_in_a_picture(self) -> int:
        """Most detections of a category in a picture."""
        counts = Counter((one["image_id"], one["category_id"]) for one in self.entries)
        return max(counts.values(), default=0)

    def checked(
        self, truth: Annotations, kind: Kind, *, probabilities: bool = False
    ) -> list[dict[str, Any]]:
        """The detections with only the keys that are compared, in their order.

        Args:
            truth: The ground truth that they belong to.
            kind: Whether they need a ``bbox`` or a ``segmentation``.
            probabilities: Whether scores must be in [0, 1], up to rounding, and not only finite.

        Raises:
            DatasetError: They do not fit the ground truth.
        """
        shape = "bbox" if kind == "bbox" else "segmentation"
        keys = ("image_id", "category_id", "score", shape)
        declared = {
            "image_id": truth.sizes.keys(),
            "category_id": {category["id"] for category in truth.categories},
        }
        checked = []
        for number, result in enumerate(self.entries):
            where = f"detection {number} of {self.source}"
            if not isinstance(result, dict):
                raise DatasetError(f"{where} must be an object, got {kind_of(result)}.")
            for key in keys:
                if key not in result:
                    raise DatasetError(f"{where} has no {key!r}; it needs {', '.join(keys)}.")
            for key, known in declared.items():
                if not is_whole(result[key]):
                    raise DatasetError(
                        f"{where} has {key} {result[key]!r}; it must be a whole number, one of "
                        f"those of {truth.source}."
                    )
                if result[key] not in known:
                    raise DatasetError(
                        f"{where} has {key} {result[key]!r}, not declared in {truth.source}."
                    )
            if not is_number(result["score"]):
                raise DatasetError(
                    f"{where} has score {result['score']!r}; it must be a finite number."
                )
            if probabilities and not -ROUNDING <= result["score"] <= 1 + ROUNDING:
                raise DatasetError(
                    f"{where} has score {result['score']!r}; calibration needs a probability in "
                    "[0, 1]."
                )
            # A model may predict a box of negative size: such a box just matches nothing.
            if kind == "bbox" and not is_finite_box(result["bbox"]):
                raise DatasetError(
                    f"{where} has bbox {result['bbox']!r}; it must be 4 numbers x, y, width, "
                    f"height, none beyond {FARTHEST:g} pixels."
                )
            size = truth.sizes[result["image_id"]]
            if kind == "segm" and not is_compressed_rle(result["segmentation"], size):
                raise DatasetError(
                    f"{where} has no usable segmentation; it must be a compressed RLE of size "
                    f"{size}."
                )
            # pycocotools would take the area of a box instead of that of the mask.
            kept = {key: result[key] for key in keys}
            if kind == "bbox":
                kept["bbox"] = [float(value) for value in result["bbox"]]
            checked.append(kept)
        return checked
