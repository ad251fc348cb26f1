"""The losses as modules; the functions behind them are in ``polyfocal.losses.functional``."""

from polyfocal.losses.base import ClassificationLoss, Range, ScheduledLoss
from polyfocal.losses.bias import BiasHead, BiasSource, ClassPriors, StoredScores
from polyfocal.losses.calibrated import AdaFocalLoss, DualFocalLoss, SampleDependentFocalLoss
from polyfocal.losses.cyclical import CyclicalFocalLoss
from polyfocal.losses.debiasing import (
    ConfidenceRegularizationLoss,
    DebiasedFocalLoss,
    DebiasingLoss,
    ProductOfExpertsLoss,
    ReweightedCrossEntropyLoss,
)
from polyfocal.losses.focal import FocalLoss
from polyfocal.losses.gaussian import GaussianPoly1FocalLoss
from polyfocal.losses.ldam import LDAMLoss
from polyfocal.losses.poly import Poly1CrossEntropyLoss, Poly1FocalLoss, PolyNLoss
from polyfocal.losses.quality import (
    Poly1IoUAwareBCELoss,
    Poly1MatchabilityAwareLoss,
    Poly1QualityFocalLoss,
    Poly1VarifocalLoss,
)
from polyfocal.losses.topk import ImbalancedNoisedTopKLoss, NoisedTopKLoss

__all__ = [
    "AdaFocalLoss",
    "BiasHead",
    "BiasSource",
    "ClassPriors",
    "ClassificationLoss",
    "ConfidenceRegularizationLoss",
    "CyclicalFocalLoss",
    "DebiasedFocalLoss",
    "DebiasingLoss",
    "DualFocalLoss",
    "FocalLoss",
    "GaussianPoly1FocalLoss",
    "ImbalancedNoisedTopKLoss",
    "LDAMLoss",
    "NoisedTopKLoss",
    "Poly1CrossEntropyLoss",
    "Poly1FocalLoss",
    "Poly1IoUAwareBCELoss",
    "Poly1MatchabilityAwareLoss",
    "Poly1QualityFocalLoss",
    "Poly1VarifocalLoss",
    "PolyNLoss",
    "ProductOfExpertsLoss",
    "Range",
    "ReweightedCrossEntropyLoss",
    "SampleDependentFocalLoss",
    "ScheduledLoss",
    "StoredScores",
]
