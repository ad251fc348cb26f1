"""COCO-format folders: find, check once, evaluate. The parts are in :mod:`polyfocal.data`."""

from polyfocal.data.annotations import Annotations, read_annotations
from polyfocal.data.coco import CocoSplit, class_counts, hold_out, load_split
from polyfocal.data.detections import Detections
from polyfocal.data.evaluation import CocoResult, evaluate, format_table
from polyfocal.data.files import DatasetError

__all__ = [
    "Annotations",
    "CocoResult",
    "CocoSplit",
    "DatasetError",
    "Detections",
    "class_counts",
    "evaluate",
    "format_table",
    "hold_out",
    "load_split",
    "read_annotations",
]
