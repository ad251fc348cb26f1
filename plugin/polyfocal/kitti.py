"""Folders in KITTI's layout, under the name that they had before :mod:`polyfocal.data.kitti`."""

from polyfocal.data.kitti import (
    CLASSES,
    DONT_CARE,
    IMAGE_SIZE,
    KittiError,
    KittiSplit,
    boxes_in_lidar,
    check_scan,
    hold_out,
    load_infos,
    load_split,
    points_in_boxes,
)

__all__ = [
    "CLASSES",
    "DONT_CARE",
    "IMAGE_SIZE",
    "KittiError",
    "KittiSplit",
    "boxes_in_lidar",
    "check_scan",
    "hold_out",
    "load_infos",
    "load_split",
    "points_in_boxes",
]
