"""polyfocal: the focal-loss family for MMDetection, MMDetection3D and Detectron2.

Importing this package imports torch and nothing of the detection frameworks; their adapters are
``polyfocal.mmengine``, ``polyfocal.mmdet``, ``polyfocal.mmdet3d`` and ``polyfocal.detectron2``.
"""

import sys

# The doctor looks at environments whose torch may be missing or broken.
if not (sys.argv[:1] == ["-m"] and "polyfocal.doctor" in sys.orig_argv):
    from polyfocal.losses import (
        AdaFocalLoss,
        ConfidenceRegularizationLoss,
        CyclicalFocalLoss,
        DebiasedFocalLoss,
        DualFocalLoss,
        FocalLoss,
        GaussianPoly1FocalLoss,
        ImbalancedNoisedTopKLoss,
        NoisedTopKLoss,
        Poly1CrossEntropyLoss,
        Poly1FocalLoss,
        Poly1IoUAwareBCELoss,
        Poly1MatchabilityAwareLoss,
        Poly1QualityFocalLoss,
        Poly1VarifocalLoss,
        PolyNLoss,
        ProductOfExpertsLoss,
        ReweightedCrossEntropyLoss,
        SampleDependentFocalLoss,
    )
    from polyfocal.swapping import swap

__version__ = "0.1.0"

__all__ = [
    "AdaFocalLoss",
    "ConfidenceRegularizationLoss",
    "CyclicalFocalLoss",
    "DebiasedFocalLoss",
    "DualFocalLoss",
    "FocalLoss",
    "GaussianPoly1FocalLoss",
    "ImbalancedNoisedTopKLoss",
    "NoisedTopKLoss",
    "Poly1CrossEntropyLoss",
    "Poly1FocalLoss",
    "Poly1IoUAwareBCELoss",
    "Poly1MatchabilityAwareLoss",
    "Poly1QualityFocalLoss",
    "Poly1VarifocalLoss",
    "PolyNLoss",
    "ProductOfExpertsLoss",
    "ReweightedCrossEntropyLoss",
    "SampleDependentFocalLoss",
    "__version__",
    "swap",
]
