"""MMDetection3D adapter. Importing it registers losses, heads, data sets and metrics.

``custom_imports=dict(imports=['polyfocal.mmdet3d'])`` makes ``type='Poly1FocalLoss'`` work in any
config; ``type='polyfocal.Poly1FocalLoss'`` and ``type='polyfocal.Anchor3DHead'`` work without it.
"""

from polyfocal.errors import PackageError

try:
    import mmdet3d  # noqa: F401
except ModuleNotFoundError as error:
    raise PackageError(
        f"polyfocal.mmdet3d needs MMDetection3D, and {error.name} is not installed: run"
        " `make setup-3d`, or see docs/detection3d.md for the packages and their order"
    ) from None

import polyfocal.mmdet  # noqa: F401
from polyfocal.mmdet3d.datasets import KittiDataset
from polyfocal.mmdet3d.heads import (
    Anchor3DHead,
    MinusOneBackground,
    PartA2RPNHead,
    ShapeAwareHead,
)
from polyfocal.mmdet3d.metrics import KittiMetric, WaymoMetric
from polyfocal.mmdet3d.pictures import DrawFromAboveHook

__all__ = [
    "Anchor3DHead",
    "DrawFromAboveHook",
    "KittiDataset",
    "KittiMetric",
    "MinusOneBackground",
    "PartA2RPNHead",
    "ShapeAwareHead",
    "WaymoMetric",
]
