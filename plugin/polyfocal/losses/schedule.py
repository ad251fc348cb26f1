"""Schedules: pure functions of the training progress in [0, 1]."""

import math

from polyfocal.errors import UserError


def check_factor(factor: float) -> None:
    """Raises UserError unless ``factor`` is a finite number >= 1."""
    if not (isinstance(factor, int | float) and math.isfinite(factor) and factor >= 1):
        raise UserError(f"factor={factor}: expected a finite number >= 1")


def cyclical_weight(progress: float, factor: float) -> float:
    r"""Weight :math:`\xi` of the high-confidence term of the cyclical focal loss.

    .. math::
        \xi(t) = 1 - f t \;\text{for}\; f t < 1, \qquad
        \xi(t) = \frac{f t - 1}{f - 1} \;\text{after that}

    so that it goes from 1 to 0 over the first 1/f of the training and back to 1 over the rest;
    with f = 1 it never comes back. The result is clamped to [0, 1]. With t = e / (E - 1) for epoch
    e = 0, ..., E - 1 these are the values of the paper's code; a training of one epoch has t = 0.

    Args:
        progress: part of the training that is done, t; any real number, clamped to [0, 1].
        factor: f >= 1. 2 is a symmetric triangle, 4 a short easy phase and a long return.

    Returns:
        A number in [0, 1].

    Raises:
        UserError: factor < 1, or a progress that is NaN.

    Source: Smith, Cyclical Focal Loss (2022).
    """
    check_factor(factor)
    if math.isnan(progress):
        raise UserError("progress is NaN: expected the part of the training that is done, 0 to 1")
    cycles = factor * min(max(progress, 0.0), 1.0)
    if cycles < 1:
        return 1.0 - cycles
    if factor == 1:
        return 0.0
    return min((cycles - 1.0) / (factor - 1.0), 1.0)
