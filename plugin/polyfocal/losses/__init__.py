"""The losses as modules; the functions behind them are in ``polyfocal.losses.functional``.

``LOSSES`` is the table of all of them, which a class enters by being defined.
"""

from typing import Any

from polyfocal.losses import functional
from polyfocal.losses.adafocal import AdaFocalLoss
from polyfocal.losses.base import LOSSES, ClassificationLoss, Loss, ScheduledLoss
from polyfocal.losses.bias import BiasHead, BiasSource, ClassPriors, StoredScores
from polyfocal.losses.confidence_regularization import ConfidenceRegularizationLoss
from polyfocal.losses.cyclical_focal import CyclicalFocalLoss
from polyfocal.losses.debiased_focal import DebiasedFocalLoss
from polyfocal.losses.debiasing import DebiasingLoss
from polyfocal.losses.dual_focal import DualFocalLoss
from polyfocal.losses.focal import FocalLoss
from polyfocal.losses.gaussian_poly1_focal import GaussianPoly1FocalLoss
from polyfocal.losses.imbalanced_noised_topk import ImbalancedNoisedTopKLoss
from polyfocal.losses.ldam import LDAMLoss
from polyfocal.losses.noised_topk import NoisedTopKLoss
from polyfocal.losses.poly1_cross_entropy import Poly1CrossEntropyLoss
from polyfocal.losses.poly1_focal import Poly1FocalLoss
from polyfocal.losses.poly1_iou_aware_bce import Poly1IoUAwareBCELoss
from polyfocal.losses.poly1_matchability_aware import Poly1MatchabilityAwareLoss
from polyfocal.losses.poly1_quality_focal import Poly1QualityFocalLoss
from polyfocal.losses.poly1_varifocal import Poly1VarifocalLoss
from polyfocal.losses.poly_n import PolyNLoss
from polyfocal.losses.product_of_experts import ProductOfExpertsLoss
from polyfocal.losses.reweighted_cross_entropy import ReweightedCrossEntropyLoss
from polyfocal.losses.sample_dependent_focal import SampleDependentFocalLoss
from polyfocal.losses.settings import Range

__all__ = [
    "LOSSES",
    "BiasHead",
    "BiasSource",
    "ClassPriors",
    "ClassificationLoss",
    "DebiasingLoss",
    "Loss",
    "Range",
    "ScheduledLoss",
    "StoredScores",
    "functional",
]
__all__ += sorted(LOSSES)


def __getattr__(name: str) -> Any:
    """A loss that was defined elsewhere, since."""
    try:
        return LOSSES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
