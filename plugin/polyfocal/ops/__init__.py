"""Losses of the polynomial focal family from logits: composed operations and fused passes.

Everything above this layer (shapes, labels, what weights and reductions mean) is in
``polyfocal.losses``; everything here assumes inputs that are already checked.
"""

from polyfocal.ops.fused import sigmoid_poly_focal, softmax_poly_focal, use_path
from polyfocal.ops.noised_topk import noised_gap
from polyfocal.ops.poly_focal import PolyFocal

__all__ = [
    "PolyFocal",
    "noised_gap",
    "sigmoid_poly_focal",
    "softmax_poly_focal",
    "use_path",
]
