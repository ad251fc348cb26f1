"""Is a score the probability that it claims to be? Framework-free."""

from polyfocal.calibration.classification import (
    Bins,
    ClassificationCalibration,
    ClassificationResult,
)
from polyfocal.calibration.detection import (
    ClassCalibration,
    DetectionCalibration,
    DetectionResult,
    MatchedDetections,
    Matches,
    match,
)

__all__ = [
    "Bins",
    "ClassCalibration",
    "ClassificationCalibration",
    "ClassificationResult",
    "DetectionCalibration",
    "DetectionResult",
    "MatchedDetections",
    "Matches",
    "match",
]
