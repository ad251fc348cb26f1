"""Is a score the probability that it claims to be? Framework-free."""

from polyfocal.calibration.classification import (
    Bins,
    ClassificationCalibration,
    ClassificationResult,
)

__all__ = ["Bins", "ClassificationCalibration", "ClassificationResult"]
