"""Schedules: pure functions of the training progress in [0, 1]."""

import math

from polyfocal._torch import is_compiling
from polyfocal.errors import UserError
from polyfocal.losses.settings import Number, Range

FACTOR = Number(Range(1.0, 8.0, log=True), low=1.0)  # the author's are 2 and 4


def cyclical_weight(progress: float, factor: float) -> float:
    r"""Weight :math:`\xi` of the high-confidence term of the cyclical focal loss.

    .. math::
        \xi(t) = 1 - f t \;\text{for}\; f t < 1, \qquad
        \xi(t) = \frac{f t - 1}{f - 1} \;\text{after that}

    So the weight goes from 1 to 0 over the first 1/f of the training, and back to 1 over the rest.
    With f = 1 it never comes back. The result is clamped to [0, 1]. With t = e / (E - 1) for epoch
    e = 0, ..., E - 1 the values are those of the paper's code. A training of one epoch has t = 0.

    Args:
        progress: part of the training that is done, t; any real number, clamped to [0, 1].
        factor: f >= 1. 2 is a symmetric triangle, 4 a short easy phase and a long return.

    Returns:
        A number in [0, 1].

    Raises:
        UserError: factor < 1, or a progress that is NaN.

    Source: Smith, Cyclical Focal Loss (2022).
    """
    if not is_compiling():  # for the compiler a number may be a symbol
        factor = FACTOR.checked("factor", factor, "cyclical_weight") or 1.0
        if math.isnan(progress):
            raise UserError(
                "progress is NaN: expected the part of the training that is done, 0 to 1"
            )
    cycles = factor * min(max(progress, 0.0), 1.0)
    if cycles < 1:
        return 1.0 - cycles
    if factor == 1:
        return 0.0
    return min((cycles - 1.0) / (factor - 1.0), 1.0)
