"""The losses as modules; the functions behind them are in ``polyfocal.losses.functional``."""

from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.cyclical import CyclicalFocalLoss
from polyfocal.losses.focal import FocalLoss
from polyfocal.losses.gaussian import GaussianPoly1FocalLoss
from polyfocal.losses.poly import Poly1CrossEntropyLoss, Poly1FocalLoss, PolyNLoss

__all__ = [
    "ClassificationLoss",
    "CyclicalFocalLoss",
    "FocalLoss",
    "GaussianPoly1FocalLoss",
    "Poly1CrossEntropyLoss",
    "Poly1FocalLoss",
    "PolyNLoss",
]
