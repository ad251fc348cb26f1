"""Detectron2 adapter. Importing it registers the models and heads that take a loss.

Detectron2 has its losses written into its models and heads. The classes here are Detectron2's own
with one changed method: their keyword ``cls_loss`` is the classification loss. A LazyConfig names
them directly. For yaml they are in Detectron2's registries, with ``Polyfocal`` in front of their
names, and :func:`add_polyfocal_config` adds their keys.
"""

from polyfocal.errors import PackageError

try:
    # Not only the top module: a folder of that name beside the caller would be that, too.
    import detectron2.config  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("detectron2", "detectron2.config"):
        raise
    raise PackageError(
        "polyfocal.detectron2 needs Detectron2, which is not installed: install a torchvision that"
        " fits torch and build Detectron2 as its INSTALL.md says,"
        " https://github.com/facebookresearch/detectron2"
    ) from None

from polyfocal.detectron2.config import add_polyfocal_config
from polyfocal.detectron2.data import CalibrationEvaluator
from polyfocal.detectron2.dense import FCOS, RetinaNet
from polyfocal.detectron2.loss import build_loss
from polyfocal.detectron2.progress import ProgressHook
from polyfocal.detectron2.rcnn import (
    RPN,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)

__all__ = [
    "FCOS",
    "RPN",
    "CalibrationEvaluator",
    "CascadeROIHeads",
    "FastRCNNOutputLayers",
    "MaskRCNNConvUpsampleHead",
    "ProgressHook",
    "Res5ROIHeads",
    "RetinaNet",
    "StandardROIHeads",
    "add_polyfocal_config",
    "build_loss",
]
