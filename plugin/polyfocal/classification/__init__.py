"""Classification with MMEngine's Runner: data, a classifier, its metric and its experiments."""

import polyfocal.mmengine  # noqa: F401
from polyfocal.classification.datasets import ImageDataset
from polyfocal.classification.metrics import ClassificationMetric
from polyfocal.classification.models import CifarResNet, Classifier, ImagePreprocessor
from polyfocal.data.cifar import LabelledImages, Variant, load_images

__all__ = [
    "CifarResNet",
    "ClassificationMetric",
    "Classifier",
    "ImageDataset",
    "ImagePreprocessor",
    "LabelledImages",
    "Variant",
    "load_images",
]
