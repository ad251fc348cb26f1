"""Pictures with one label each, under the name that they had before :mod:`polyfocal.data.cifar`."""

from polyfocal.data.cifar import SPLITS, LabelledImages, Variant, load_images

__all__ = ["SPLITS", "LabelledImages", "Variant", "load_images"]
