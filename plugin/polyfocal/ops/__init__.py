"""Unreduced losses of the two families, from logits: the place of the fused kernels.

Everything above this layer (shapes, labels, weights, reduction) is in ``polyfocal.losses``;
everything here assumes inputs that are already checked and already float32 or float64.
"""

from polyfocal.ops.poly_focal import PolyFocal, sigmoid_poly_focal, softmax_poly_focal

__all__ = ["PolyFocal", "sigmoid_poly_focal", "softmax_poly_focal"]
