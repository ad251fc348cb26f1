r"""The losses as functions of logits and targets.

Notation: C classes; x the logits; p = sigmoid(x) or softmax(x); p_t the probability that the model
gives to the target; alpha_t = alpha where the target is 1 and 1 - alpha where it is 0.

Common arguments, the same for every function here:

logits
    ``(N, C)`` in the sigmoid form (any shape with soft targets), ``(N, K)`` in the softmax form,
    K = C + 1 with the background last where there is one, and ``(N, C, ...)`` or ``(N, K, ...)``
    with a map of labels; floating point. float16 and bfloat16 are
    computed, and returned, in float32, also under autocast.
target
    Integer labels ``(N,)``: sigmoid in [0, C], C being background, softmax in [0, K - 1]; a map of
    them ``(N, ...)``; or
    soft targets of the logits' shape in [0, 1], in the softmax form with rows that sum to 1, which
    have no gradient. The range is checked on the CPU; on other devices, where a check would stop
    the device, an integer label out of range makes the loss NaN in the fused kernels, and fails in
    plain operations.
weight, class_weight, ignore_index, reduction, avg_factor
    See :mod:`polyfocal.losses.rows`.

Every function returns a scalar, or for ``reduction='none'`` the unreduced loss: the logits' shape
in the sigmoid form, ``(N,)`` in the softmax form. Empty input gives a zero that is connected to
the graph. Every function raises :class:`polyfocal.errors.UserError` (a ValueError) for a shape,
dtype or range that is none of these.
"""

from polyfocal.losses.class_weights import class_alphas, class_weights
from polyfocal.losses.confidence_regularization import confidence_regularization
from polyfocal.losses.cyclical_focal import cyclical_focal_loss
from polyfocal.losses.debiased_focal import debiased_focal_loss
from polyfocal.losses.dual_focal import dual_focal_loss
from polyfocal.losses.focal import focal_loss
from polyfocal.losses.gaussian_poly1_focal import gaussian_poly1_focal_loss
from polyfocal.losses.imbalanced_noised_topk import imbalanced_noised_topk_loss, topk_margins
from polyfocal.losses.noised_topk import noised_topk_loss
from polyfocal.losses.poly1_cross_entropy import poly1_cross_entropy
from polyfocal.losses.poly1_focal import poly1_focal_loss, poly1_focal_of_probabilities
from polyfocal.losses.poly1_iou_aware_bce import poly1_iou_aware_bce
from polyfocal.losses.poly1_matchability_aware import poly1_matchability_aware_loss
from polyfocal.losses.poly1_quality_focal import poly1_quality_focal_loss
from polyfocal.losses.poly1_varifocal import poly1_varifocal_loss
from polyfocal.losses.poly_n import poly_n_loss
from polyfocal.losses.product_of_experts import product_of_experts
from polyfocal.losses.reweighted_cross_entropy import reweighted_cross_entropy
from polyfocal.losses.sample_dependent_focal import stepped_focal_loss

__all__ = [
    "class_alphas",
    "class_weights",
    "confidence_regularization",
    "cyclical_focal_loss",
    "debiased_focal_loss",
    "dual_focal_loss",
    "focal_loss",
    "gaussian_poly1_focal_loss",
    "imbalanced_noised_topk_loss",
    "noised_topk_loss",
    "poly1_cross_entropy",
    "poly1_focal_loss",
    "poly1_focal_of_probabilities",
    "poly1_iou_aware_bce",
    "poly1_matchability_aware_loss",
    "poly1_quality_focal_loss",
    "poly1_varifocal_loss",
    "poly_n_loss",
    "product_of_experts",
    "reweighted_cross_entropy",
    "stepped_focal_loss",
    "topk_margins",
]
