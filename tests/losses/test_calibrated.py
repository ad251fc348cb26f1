"""Dual focal loss, FLSD-53 and AdaFocal against their formulas and literal numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

import polyfocal
from polyfocal.losses import functional as L


def batch(n=40, c=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, c, dtype=torch.float64, generator=generator)
    return logits, torch.randint(0, c, (n,), generator=generator)


def test_dual_focal_is_its_formula():
    # Probabilities (1/2, 3/10, 1/5). Label 1: p_j = 1/5, (1 - 0.3 + 0.2)^2 = 0.81; label 0:
    # (1 - 0.5 + 0.3)^2 = 0.64; label 2 has none below it: (1 - 0.2)^2 = 0.64.
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)).expand(3, 3)
    loss = L.dual_focal_loss(logits, torch.tensor([1, 0, 2]), gamma=2.0, reduction="none")
    expected = [0.81 * -math.log(0.3), 0.64 * math.log(2), 0.64 * math.log(5)]
    assert loss.tolist() == pytest.approx(expected)
    logits, labels = batch()
    plain = L.dual_focal_loss(logits, labels, gamma=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))
    # a tie is not below
    tie = L.dual_focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=3.0)
    assert tie.item() == pytest.approx(0.125 * math.log(2))


def test_flsd_53_is_focal_loss_with_its_gamma_in_every_range():
    logits, labels = batch()
    loss = polyfocal.SampleDependentFocalLoss(use_sigmoid=False, reduction="none")
    p_t = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    five, three = (
        L.focal_loss(logits, labels, use_sigmoid=False, gamma=g, alpha=None, reduction="none")
        for g in (5.0, 3.0)
    )
    assert 0 < (p_t < 0.2).sum() < 40
    torch.testing.assert_close(loss(logits, labels), torch.where(p_t < 0.2, five, three))


def test_stepped_sigmoid_form_steps_in_every_entry():
    logits, labels = batch()
    args = dict(use_sigmoid=True, alpha=0.25, reduction="none")
    ours = L.stepped_focal_loss(logits, labels, edges=(0.3,), gammas=(4.0, 1.0), **args)
    four, one = (L.focal_loss(logits, labels, gamma=g, **args) for g in (4.0, 1.0))
    positive = labels[:, None] == torch.arange(5)
    p_t = torch.where(positive, logits.sigmoid(), 1 - logits.sigmoid())
    torch.testing.assert_close(ours, torch.where(p_t < 0.3, four, one))


def test_a_gamma_below_0_is_the_inverse_focal_loss():
    logits = torch.tensor([[math.log(3.0), 0.0]])  # p = 3/4
    args = dict(edges=(), gammas=(-2.0,), use_sigmoid=False)
    loss = L.stepped_focal_loss(logits, torch.tensor([0]), **args)
    assert loss.item() == pytest.approx(1.75**2 * math.log(4 / 3))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck(gamma):
    logits, labels = batch(6, 3)
    logits.requires_grad_()
    steps = dict(edges=(0.3,), gammas=(gamma, -1.5))
    for call in (
        lambda x: L.dual_focal_loss(x, labels, gamma=gamma, reduction="none"),
        lambda x: L.stepped_focal_loss(x, labels, use_sigmoid=False, **steps),
        lambda x: L.stepped_focal_loss(
            x, labels, use_sigmoid=True, alpha=0.3, reduction="none", **steps
        ),
    ):
        assert torch.autograd.gradcheck(call, logits)
        far = (10_000 * logits.detach()).float().requires_grad_()
        call(far).sum().backward()
        assert far.grad.isfinite().all()


def test_contract():
    logits, labels = batch()
    weight = torch.rand(40, dtype=torch.float64)
    for call in (
        lambda *a, **k: L.dual_focal_loss(*a, gamma=2.0, **k),
        lambda *a, **k: L.stepped_focal_loss(
            *a, edges=(0.2, 0.5), gammas=(5.0, 3.0, 1.0), use_sigmoid=False, **k
        ),
    ):
        each = call(logits, labels, reduction="none")
        torch.testing.assert_close(call(logits, labels, weight, reduction="sum"), each @ weight)
        torch.testing.assert_close(call(logits, labels, avg_factor=7.0), each.sum() / 7)
        kept = labels != 2
        torch.testing.assert_close(call(logits, labels, ignore_index=2), each[kept].mean())
        empty = call(logits[:0].requires_grad_(), labels[:0])
        empty.backward()
        assert empty == 0


def test_adafocal_moves_every_gamma_by_its_bin():
    loss = polyfocal.AdaFocalLoss(num_bins=2, rate=2.0, gamma=1.0)
    # Bin 1: confidences 0.3, 0.5, one right: too modest by 0.1. Bin 2: 0.8, 1.0, none right.
    confidence = torch.tensor([0.8, 0.3, 1.0, 0.5])
    correct = torch.tensor([False, True, False, False])
    loss.update(confidence, correct)
    assert loss.edges.tolist() == pytest.approx([0.8])
    assert loss.gammas.tolist() == pytest.approx([math.exp(-0.2), math.exp(1.8)])
    # p_t = 3/4 is in bin 1, 0.9 in bin 2
    logits = torch.log(torch.tensor([[3.0, 1.0], [9.0, 1.0]]))
    values = loss(logits, torch.tensor([0, 0]), reduction_override="none")
    first, second = loss.gammas.tolist()
    expected = [0.25**first * math.log(4 / 3), 0.1**second * math.log(10 / 9)]
    assert values.tolist() == pytest.approx(expected)


def test_adafocal_switches_to_the_inverse_and_back_and_stays_in_bounds():
    loss = polyfocal.AdaFocalLoss(num_bins=1, rate=1.0, gamma=0.21)
    modest = (torch.full((4,), 0.5), torch.ones(4))
    sure = (torch.full((4,), 0.5), torch.zeros(4))
    loss.update(*modest)  # 0.21 e^-0.5 = 0.127
    assert loss.gammas.item() == pytest.approx(-0.2)
    loss.update(*modest)  # below 0 the exponent's sign turns: it grows
    assert loss.gammas.item() == pytest.approx(-0.2 * math.exp(0.5))
    for _ in range(20):
        loss.update(*modest)
    assert loss.gammas.item() == -2.0
    for _ in range(40):
        loss.update(*sure)
    assert loss.gammas.item() == 20.0
    assert loss.state_dict() == {}


@pytest.mark.parametrize("low", [0.0, 0.1, -0.1])
def test_adafocal_that_may_not_be_inverse_stays_focal_and_comes_back(low):
    loss = polyfocal.AdaFocalLoss(num_bins=1, rate=1.0, gamma=0.25, low=low)
    modest = (torch.full((4,), 0.5), torch.ones(4))
    sure = (torch.full((4,), 0.5), torch.zeros(4))
    loss.update(*modest)
    assert loss.gammas.item() == pytest.approx(0.25 * math.exp(-0.5))
    loss.update(*modest)
    least = max(low, 0.25 * math.exp(-1.0))
    assert loss.gammas.item() == pytest.approx(least)
    loss.update(*sure)
    assert loss.gammas.item() == pytest.approx(least * math.exp(0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: polyfocal.DualFocalLoss(-1), "gamma=-1: expected"),
        (lambda: polyfocal.DualFocalLoss(1, use_sigmoid=True), "use_sigmoid=True: the dual focal"),
        (
            lambda: polyfocal.SampleDependentFocalLoss((1, 2), use_sigmoid=True),
            r"gammas=\(1, 2\): expected 3 finite numbers",
        ),
        (
            lambda: polyfocal.SampleDependentFocalLoss(edges=(0.5, 0.2), use_sigmoid=True),
            r"edges=\(0.5, 0.2\): expected ascending",
        ),
        (lambda: polyfocal.AdaFocalLoss(gamma=0.1), "gamma=0.1: expected"),
        (lambda: polyfocal.AdaFocalLoss(num_bins=0), "num_bins=0: expected"),
        (
            lambda: polyfocal.AdaFocalLoss().update(torch.rand(3), torch.ones(3)),
            "3 validation samples for num_bins=15",
        ),
    ],
)
def test_bad_settings_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
