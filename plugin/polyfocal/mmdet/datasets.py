"""MMDetection's COCO data set on annotations that have been read and checked already."""

from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.registry import TRANSFORMS, DefaultScope

from polyfocal.data.annotations import (
    class_scores,
    forget_annotations,
    is_soft,
    read_annotations,
)
from polyfocal.data.pictures import Loader, PictureError
from polyfocal.mmengine.registry import DATASETS


def load_coco(file: str) -> COCO:
    """The object that MMDetection makes of an annotation file, from :func:`read_annotations`."""
    coco = read_annotations(file).coco(COCO)
    # The constructor set these when the others were still empty.
    coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
    return coco


def picture_loader(step: dict[str, Any]) -> Loader:
    """A loader that reads a picture as a ``LoadImageFromFile`` of a config does.

    Args:
        step: The step of the pipeline, with its settings.
    """
    settings = {key: value for key, value in step.items() if key != "backend_args"}
    with DefaultScope.overwrite_default_scope("mmdet"):
        transform = TRANSFORMS.build(settings)

    def load(path: Path) -> Any:
        found = transform({"img_path": str(path)})
        if found is None:  # what ignore_empty makes of it
            raise PictureError(f"{type(transform).__name__} does not read it")
        return found["img"]

    return load


@DATASETS.register_module()
class CocoDataset(MMDetCocoDataset):
    """MMDetection's ``CocoDataset``, which opens no file that :func:`load_split` has read.

    It accepts annotations without ``area`` or ``iscrowd`` and files with a byte order mark, see
    :func:`polyfocal.data.annotations.read_annotations`. The other arguments are those of
    MMDetection's class.

    Args:
        soft_labels: Take the ``category_ids`` and ``category_scores`` of annotations, see
            :func:`polyfocal.data.annotations.class_scores`. A pipeline then gets labels from C on,
            the number of classes, for such objects: C + r stands for row r of ``class_scores``,
            (R, C) in float32. ``SoftLabelsHook`` tells the head.
    """

    COCOAPI = staticmethod(load_coco)

    def __init__(self, *args: Any, soft_labels: bool = False, **kwargs: Any) -> None:
        self._rows: dict[tuple[float, ...], int] | None = {} if soft_labels else None
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        """The samples. The annotations of a training set are not kept in memory."""
        samples = super().load_data_list()
        if self._rows is not None:
            rows = np.array(list(self._rows), np.float32)
            self.class_scores = rows.reshape(-1, len(self.metainfo["classes"]))
        if not self.test_mode:
            forget_annotations(self.ann_file)
        return samples

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """A sample; an object of several classes has the number of its row of ``class_scores``."""
        sample: dict = super().parse_data_info(raw_data_info)
        annotations = raw_data_info["raw_ann_info"]
        if self._rows is None or not any(map(is_soft, annotations)):
            return sample
        sample["instances"] = []
        for annotation in annotations:  # one by one, since some are left out
            alone = {**raw_data_info, "raw_ann_info": [annotation]}
            for instance in super().parse_data_info(alone)["instances"]:
                if is_soft(annotation):
                    row = tuple(class_scores(annotation, self.cat_ids))
                    instance["class_row"] = self._rows.setdefault(row, len(self._rows))
                sample["instances"].append(instance)
        return sample

    def prepare_data(self, idx: int) -> Any:
        """A sample after the pipeline, which takes a label as a mere number."""
        if self._rows is None:
            return super().prepare_data(idx)
        sample = self.get_data_info(idx)
        for instance in sample["instances"]:
            if "class_row" in instance:
                instance["bbox_label"] = self.class_scores.shape[1] + instance["class_row"]
        return self.pipeline(sample)
