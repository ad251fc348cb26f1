"""A finished training, as an adapter reads it back from its work directory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyfocal.data.annotations import Annotations, read_annotations
from polyfocal.data.detections import Kind

KEPT_RESULTS = "val"
"""The last evaluation's detections are ``val.bbox.json`` (and ``val.segm.json``) in the folder."""


@dataclass(frozen=True)
class TrainedRun:
    """A training of ``polyfocal train`` that has come to its end.

    Attributes:
        folder: The work directory.
        config: The config of the training.
        training: What was logged while it trained, in order: ``loss`` and its parts, ``lr``,
            ``time`` (seconds per iteration), ``memory`` (MiB) where it was logged, ``iter``.
        evaluations: The evaluations in order, by the shortest names that tell their numbers apart,
            such as ``bbox_mAP``; and ``step``: the epoch, or the iteration of a training without
            epochs.
    """

    folder: Path
    config: dict[str, Any]
    training: list[dict[str, float]]
    evaluations: list[dict[str, float]]

    @property
    def measured(self) -> dict[str, float]:
        """The numbers of the last evaluation."""
        return {name: value for name, value in self.evaluations[-1].items() if name != "step"}

    @property
    def dataset(self) -> dict[str, Any]:
        """The data set of the val split, without its pipeline and without wrappers around it."""
        dataset = self.config["val_dataloader"]["dataset"]
        while "ann_file" not in dataset and isinstance(dataset.get("dataset"), dict):
            dataset = dataset["dataset"]
        return {name: value for name, value in dataset.items() if name != "pipeline"}

    @property
    def data(self) -> str:
        """How a message calls the data of the evaluation."""
        dataset = self.dataset
        return str(self.annotation_file or dataset.get("data_root") or dataset.get("root"))

    @property
    def annotation_file(self) -> Path | None:
        """COCO annotations of the val split; None for data that has none."""
        if not str(self.dataset.get("ann_file", "")).endswith(".json"):
            return None
        return self._place(self.dataset["ann_file"])

    @property
    def classes(self) -> set[str] | None:
        """The names of the classes that the config names; None where it leaves them to the data."""
        named = (self.dataset.get("metainfo") or {}).get("classes")
        return None if named is None or isinstance(named, str) else set(named)

    def truth(self, file: Path) -> Annotations:
        """What the evaluation counted of an annotation file: objects of the config's classes."""
        truth = read_annotations(file, pictures=False)
        return truth if self.classes is None else truth.of_classes(self.classes)

    @property
    def image_dir(self) -> Path:
        """Where the pictures of the val split are."""
        return self._place((self.dataset.get("data_prefix") or {}).get("img", ""))

    @property
    def results(self) -> dict[Kind, Path]:
        """The existing files with the last evaluation's detections, by kind."""
        kinds: tuple[Kind, ...] = ("bbox", "segm")
        files = {kind: self.folder / f"{KEPT_RESULTS}.{kind}.json" for kind in kinds}
        return {kind: file for kind, file in files.items() if file.is_file()}

    @property
    def max_dets(self) -> int:
        """Most detections of a category in a picture that counted in the evaluation."""
        metrics = self.config["val_evaluator"]
        if isinstance(metrics, dict):  # one, or MMEngine's Evaluator written out around several
            metrics = metrics.get("metrics", [metrics])
        return next((one["max_dets"] for one in metrics if "max_dets" in one), 100)

    def evaluated_as(self, other: "TrainedRun") -> bool:
        """Whether both were evaluated on the same data: annotations and classes, or settings."""
        mine, theirs = self.annotation_file, other.annotation_file
        if mine is None or theirs is None:
            return self.dataset == other.dataset
        if self.classes and other.classes and self.classes != other.classes:
            return False
        if mine == theirs:
            return True
        try:
            return mine.read_bytes() == theirs.read_bytes()
        except OSError:
            return False

    def _place(self, name: str) -> Path:
        return Path(os.path.join(self.dataset.get("data_root") or "", name))
