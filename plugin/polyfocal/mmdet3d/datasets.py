"""A data set that reads only a folder in KITTI's layout."""

from pathlib import Path
from typing import Any

from mmdet3d.datasets import KittiDataset as MMDet3DKittiDataset
from mmdet3d.datasets.transforms import ObjectNameFilter, ObjectRangeFilter

from polyfocal.data import kitti
from polyfocal.errors import UserError
from polyfocal.mmengine.registry import DATASETS


@DATASETS.register_module()
class KittiDataset(MMDet3DKittiDataset):
    """MMDetection3D's ``KittiDataset``, which reads the tree itself and no info file.

    Info files are pickles, which run whatever code their maker put there.

    Args:
        data_root: The tree, see :mod:`polyfocal.kitti`.
        split: Name of a file in ``ImageSets``, such as ``"train"``. ``"test"`` is for
            ``test_mode`` only: it has no labels.
        kwargs: Arguments of MMDetection3D's class, except ``ann_file`` and ``data_prefix``.

    Raises:
        UserError: The split ``"test"`` is to be trained on.
    """

    num_ins_per_cat: list[int]

    def __init__(self, data_root: str, split: str, **kwargs: Any) -> None:
        self.split = split
        if split == "test":
            if not kwargs.get("test_mode"):
                raise UserError("KittiDataset: the split test has no labels to train on.")
            kwargs["load_eval_anns"] = False
        folder = "testing" if split == "test" else "training"
        prefix = {"pts": f"{folder}/velodyne", "img": f"{folder}/image_2"}
        super().__init__(data_root=data_root, ann_file="", data_prefix=prefix, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The samples of the split, with what MMDetection3D reads from an info file."""
        infos = kitti.load_infos(self.data_root, self.split)
        for key, value in infos["metainfo"].items():
            self._metainfo.setdefault(key, value)
        return [self.parse_data_info(info) for info in infos["data_list"]]

    def parse_ann_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """As in MMDetection3D, which counts the objects, but without those that the pipeline drops.

        A range of points in other units, or far from the scanner, drops all of them.
        """
        counts: list[int] = list(self.num_ins_per_cat)
        found = super().parse_ann_info(info)
        if not self.test_mode:
            kept = {key: found[key] for key in ("gt_bboxes_3d", "gt_labels_3d")}
            for step in self.pipeline.transforms:
                if isinstance(step, ObjectRangeFilter | ObjectNameFilter):
                    kept = step(kept)
            for label in kept["gt_labels_3d"]:
                counts[label] += 1
            self.num_ins_per_cat = counts
        return found

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """A sample, its ``sample_idx`` the number of the frame.

        MMEngine puts the place in the data set there. Then label files would get wrong names, and
        the frame would not be found again.

        Raises:
            KittiError: The points have been cut off or removed since the tree was read.
        """
        info = super().get_data_info(idx)
        kitti.check_scan(Path(info["lidar_path"]))
        info["sample_idx"] = int(Path(info["lidar_path"]).stem)
        return info
