"""Poly-1 for heatmaps: the formula, MMDetection's loss at epsilon 0, ends of the range, errors."""

import math

import numpy as np
import pytest
import torch

import polyfocal
from polyfocal.errors import UserError
from polyfocal.losses.functional import gaussian_poly1_focal_loss


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 6, 6, dtype=dtype, generator=generator).clamp(1e-3, 1 - 1e-3)
    y = torch.rand(2, 3, 6, 6, dtype=dtype, generator=generator) ** 3
    y[0, 1, 2, 3] = y[1, 0, 5, 5] = y[1, 2, 0, 0] = 1
    return p.requires_grad_(), y


def test_one_peak_and_one_slope_by_hand():
    """p = 0.8 at a peak; p = 0.3 where the heatmap is 0.5: alpha 2, gamma 4, epsilon -0.5."""
    loss = gaussian_poly1_focal_loss(
        torch.tensor([0.8, 0.3], dtype=torch.float64),
        torch.tensor([1.0, 0.5]),
        epsilon=-0.5,
        reduction="none",
    )
    peak = 0.2**2 * -math.log(0.8) - 0.5 * 0.2**3
    slope = 0.5**4 * (0.3**2 * -math.log(0.7) - 0.5 * 0.3**3)
    np.testing.assert_allclose(loss.numpy(), [peak, slope], rtol=1e-9)


@pytest.mark.parametrize("alpha, gamma", [(2.0, 4.0), (1.5, 3.0), (0.0, 1.0)])
@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 2.0])
def test_against_the_formula(alpha, gamma, epsilon):
    p, y = inputs()
    weight = torch.rand(p.shape, dtype=p.dtype)
    loss = gaussian_poly1_focal_loss(
        p, y, weight, epsilon=epsilon, alpha=alpha, gamma=gamma, avg_factor=3.0
    )
    q, t, w = p.detach().numpy(), y.numpy(), weight.numpy()
    p_t = np.where(t == 1, q, 1 - q)
    poly = (1 - p_t) ** alpha * -np.log(p_t) + epsilon * (1 - p_t) ** (alpha + 1)
    expected = (w * np.where(t == 1, 1, (1 - t) ** gamma) * poly).sum() / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(
        lambda p: gaussian_poly1_focal_loss(p, y, epsilon=epsilon, alpha=alpha, gamma=gamma), p
    )


@pytest.mark.parametrize("alpha, gamma", [(2.0, 4.0), (1.5, 3.0)])
@pytest.mark.parametrize("reduction, avg_factor", [("mean", 5.0), ("mean", None), ("sum", None)])
def test_epsilon_0_is_mmdetections_loss(alpha, gamma, reduction, avg_factor):
    losses = pytest.importorskip("mmdet.models.losses", reason="needs MMDetection")
    p, y = inputs(torch.float32)
    settings = dict(alpha=alpha, gamma=gamma, reduction=reduction, loss_weight=2.0)
    results = []
    for loss in (
        losses.GaussianFocalLoss(**settings),
        polyfocal.GaussianPoly1FocalLoss(epsilon=0.0, **settings),
    ):
        value = loss(p, y, avg_factor=avg_factor)
        results.append((value, *torch.autograd.grad(value, p)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_finite_at_the_ends(alpha):
    p = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    y = torch.tensor([1.0, 1.0, 0.0, 0.0])
    loss = gaussian_poly1_focal_loss(p, y, epsilon=1.0, alpha=alpha, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all() and p.grad.isfinite().all()
    assert loss[1] < 1e-5 and loss[2] < 1e-5
    assert p.grad[0] < -1 and p.grad[3] > 1, "the wrong ones are pushed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    p, y = inputs()
    half = p.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gaussian_poly1_focal_loss(half, y, epsilon=-0.5)
    loss.backward()
    exact = gaussian_poly1_focal_loss(half.double(), y, epsilon=-0.5)
    assert loss.dtype == torch.float32 and half.grad.dtype == dtype
    torch.testing.assert_close(loss, exact.float())


def test_empty_and_call_contract():
    loss = polyfocal.GaussianPoly1FocalLoss(epsilon=-0.5, reduction="mean")
    empty = torch.zeros(0, 2, requires_grad=True)
    loss(empty, torch.zeros(0, 2)).backward()
    p, y = inputs()
    none = loss(p, y, reduction_override="none")
    assert none.shape == p.shape
    torch.testing.assert_close(loss(p, y), none.mean())
    assert loss.state_dict() == {} and "epsilon=-0.5" in repr(loss)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda p, y: gaussian_poly1_focal_loss(p - 3, y, epsilon=0), "ies range from -2"),
        (lambda p, y: gaussian_poly1_focal_loss(p, y + 1, epsilon=0), "the heatmap ranges from"),
        (lambda p, y: gaussian_poly1_focal_loss(p, y[0], epsilon=0), "expected floating point and"),
        (lambda p, y: gaussian_poly1_focal_loss(p, y, epsilon=-2), "epsilon=-2: expected"),
        (lambda p, y: gaussian_poly1_focal_loss(p, y, epsilon=0, alpha=-1), "alpha=-1: expected"),
        (lambda p, y: polyfocal.GaussianPoly1FocalLoss(), "has no epsilon: write one"),
        (lambda p, y: polyfocal.GaussianPoly1FocalLoss(0.0, reduction="avg"), "reduction='avg'"),
        (lambda p, y: polyfocal.GaussianPoly1FocalLoss(0.0)(p * math.nan, y), "range from nan"),
    ],
)
def test_errors(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(*(tensor.detach() for tensor in inputs()))
