"""MMDetection's COCO data set on annotations that have been read and checked already."""

from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.registry import TRANSFORMS, DefaultScope

from polyfocal.data.annotations import forget_annotations, read_annotations
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
    :func:`polyfocal.data.annotations.read_annotations`. The arguments are those of MMDetection.
    """

    COCOAPI = staticmethod(load_coco)

    def load_data_list(self) -> list[dict]:
        """The samples. The annotations of a training set are not kept in memory."""
        samples = super().load_data_list()
        if not self.test_mode:
            forget_annotations(self.ann_file)
        return samples
