"""IoU-aware losses: against their formulas in float64, their originals, and their properties."""

import math

import pytest
import torch
import torch.nn.functional as F

from polyfocal import losses, ops
from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses import functional as Q

# 3 rows of 2 classes, float64: a positive of class 1, one of class 0, a background.
LOGITS = [[-1.0, 0.5], [2.0, -0.3], [0.7, -2.0]]
LABELS = [1, 0, 2]
SCORES = [0.8, 0.3, 0.0]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(p, y):
    return -y * math.log(p) - (1 - y) * math.log(1 - p)


def first_term(p, y):
    if p < y:
        return first_term(1 - p, 1 - y)
    return p - y - (y * math.log(p / y) if y else 0)


def by_hand(positive, negative):
    """Losses (3, 2) of two functions of plain numbers."""
    return [
        [
            positive(sigmoid(x), SCORES[row]) if LABELS[row] == column else negative(sigmoid(x))
            for column, x in enumerate(LOGITS[row])
        ]
        for row in range(3)
    ]


def ia_target(p, y):
    return max(p**0.25 * y**0.75, 0.01)


LOSSES = {
    "quality focal": (
        Q.poly1_quality_focal_loss,
        dict(beta=1.5),
        lambda p, y, e: abs(y - p) ** 1.5 * bce(p, y) + e * abs(y - p) ** 2.5,
        lambda p, e: -(p**1.5) * math.log(1 - p) + e * p**2.5,
    ),
    "varifocal": (
        Q.poly1_varifocal_loss,
        dict(alpha=0.6, gamma=2.0),
        lambda p, y, e: y * (bce(p, y) + e * first_term(p, y)),
        lambda p, e: 0.6 * (-(p**2) * math.log(1 - p) + e * p**3),
    ),
    "varifocal, not weighted": (
        Q.poly1_varifocal_loss,
        dict(iou_weighted=False),
        lambda p, y, e: bce(p, y) + e * first_term(p, y),
        lambda p, e: 0.75 * (-(p**2) * math.log(1 - p) + e * p**3),
    ),
    "matchability": (
        Q.poly1_matchability_aware_loss,
        dict(gamma=1.5, alpha=0.5),
        lambda p, y, e: bce(p, y**1.5) + e * first_term(p, y**1.5),
        lambda p, e: 0.5 * p**1.5 * (-math.log(1 - p) + e * p),
    ),
    "iou-aware bce": (
        Q.poly1_iou_aware_bce,
        dict(),
        lambda p, y, e: bce(p, ia_target(p, y)) + e * first_term(p, ia_target(p, y)),
        lambda p, e: -(p**2) * math.log(1 - p) + e * p**3,
    ),
}


def tensors(dtype=torch.float64):
    return (
        torch.tensor(LOGITS, dtype=dtype),
        (torch.tensor(LABELS), torch.tensor(SCORES, dtype=dtype)),
    )


def matrix(labels, scores, columns):
    """The target (N, C) that (labels, scores) stand for."""
    return F.one_hot(labels, columns + 1)[:, :-1] * scores[:, None]


@pytest.fixture(params=["auto", "blocked", "composed"])
def path(request):
    before = ops.use_path(request.param)
    yield request.param
    ops.use_path(before)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("epsilon", [0.0, 1.5, -1.0])
def test_values_are_those_of_the_formula(name, epsilon, path):
    loss, settings, positive, negative = LOSSES[name]
    expected = torch.tensor(
        by_hand(lambda p, y: positive(p, y, epsilon), lambda p: negative(p, epsilon)),
        dtype=torch.float64,
    )
    x, target = tensors()
    found = loss(x, target, epsilon=epsilon, reduction="none", **settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    total = loss(x, target, epsilon=epsilon, reduction="sum", **settings)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-12, atol=1e-12)
    soft = loss(x, matrix(*target, 2), epsilon=epsilon, reduction="none", **settings)
    torch.testing.assert_close(soft, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", [n for n in LOSSES if n[0] in "qv"])
def test_gradients_are_those_of_the_value(name, reduction, path):
    """Of the losses in which no factor is kept out of the gradient."""
    loss, settings, *_ = LOSSES[name]
    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels, scores = torch.tensor([0, 1, 2, 3, 1, 3, 0]), torch.rand(7, dtype=torch.float64)
    weight = torch.rand(7, 3, dtype=torch.float64)

    def of(x):
        return loss(
            x, (labels, scores), weight, epsilon=0.7, class_weight=[1.0, 2.0, 0.5],
            reduction=reduction, **settings,
        )  # fmt: skip

    assert torch.autograd.gradcheck(of, (x,))
    assert torch.autograd.gradgradcheck(of, (x,))


@pytest.mark.parametrize("name", LOSSES)
def test_a_matrix_is_computed_as_labels_where_each_row_has_one_positive_at_most(name):
    loss, settings, *_ = LOSSES[name]
    torch.manual_seed(0)
    x = torch.randn(30, 6).requires_grad_()
    labels, scores, weight = torch.randint(0, 7, (30,)), torch.rand(30), torch.rand(30)
    settings = {"epsilon": 0.5, "reduction": "sum", **settings}
    found = []
    for target in ((labels, scores), matrix(labels, scores, 6)):
        value = loss(x, target, weight, **settings)
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    several = torch.where(torch.rand(30, 6) < 0.4, torch.rand(30, 6), 0.0)
    assert several.count_nonzero(dim=1).max() > 1
    # Entry by entry: each as a row of one column, of which it is the only positive.
    value = loss(x, several, weight, **settings)
    single = loss(x.reshape(-1, 1), several.reshape(-1, 1), weight.repeat_interleave(6), **settings)
    torch.testing.assert_close(value, single)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(single, x))


@pytest.mark.parametrize("keep", [0, 2**20], ids=["again", "kept"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_path_gives_the_same(name, keep, monkeypatch):
    monkeypatch.setattr(ops.cpu, "_KEEP", keep)
    loss, settings, *_ = LOSSES[name]
    torch.manual_seed(0)
    logits = 4 * torch.randn(500, 20)
    labels = torch.where(torch.rand(500) < 0.2, torch.randint(0, 20, (500,)), 20)
    scores, weight = torch.rand(500), torch.rand(500)
    found = []
    for path in ("auto", "blocked", "composed"):
        before = ops.use_path(path)
        x = logits.clone().requires_grad_()
        value = loss(
            x, (labels, scores), weight, epsilon=0.5, avg_factor=9.0, ignore_index=3, **settings
        )
        found.append((value.detach(), *torch.autograd.grad(3 * value, x)))
        ops.use_path(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-5, atol=1e-7)
    assert (found[0][1][labels == 3] == 0).all() and (labels == 3).any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("epsilon", [-1.0, -0.5, 0.0, 2.0])
@pytest.mark.parametrize("y", [0.001, 0.0145, 0.05, 0.3, 0.5, 0.8, 1.0])
def test_a_positive_is_taught_its_quality(name, epsilon, y):
    """Non-negative, least at p = y and growing on either side."""
    loss, settings, *_ = LOSSES[name]
    if name == "quality focal":
        settings = dict(beta=0.2)  # the least that a negative epsilon takes
    p = torch.linspace(1e-4, 1 - 1e-4, 4001, dtype=torch.float64)
    scores = torch.full_like(p, y)
    goal = y
    if name == "matchability":
        goal = y**1.5
    elif name == "iou-aware bce":
        # The target moves with p; take the one where it would stay.
        settings, goal = dict(alpha=0.0), max(y, 0.01)
    value = loss(
        torch.logit(p)[:, None], (torch.zeros(4001, dtype=torch.int64), scores), epsilon=epsilon,
        reduction="none", **settings,
    )[:, 0]  # fmt: skip
    assert (value >= 0).all()
    step = value.diff()
    assert (step[p[1:] <= goal] <= 1e-12).all()
    assert (step[p[:-1] >= goal] >= -1e-12).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_negative_is_taught_zero(name):
    loss, settings, *_ = LOSSES[name]
    p = torch.linspace(1e-4, 1 - 1e-4, 2001, dtype=torch.float64)
    value = loss(
        torch.logit(p)[:, None], torch.ones(2001, dtype=torch.int64), epsilon=-1.0,
        reduction="none", **settings,
    )[:, 0]  # fmt: skip
    assert (value >= 0).all() and (value.diff() >= 0).all()


@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 2.0])
def test_of_qualities_0_and_1_it_is_poly1_focal(epsilon):
    torch.manual_seed(0)
    x = 3 * torch.randn(40, 5, dtype=torch.float64)
    labels = torch.randint(0, 6, (40,))
    foreground = F.one_hot(labels, 6)[:, :-1].bool()
    common = dict(epsilon=epsilon, use_sigmoid=True, alpha=None, reduction="none")
    focal = {g: functional.poly1_focal_loss(x, labels, gamma=g, **common) for g in (0.0, 1.5, 2.0)}
    ones = (labels, torch.ones(40, dtype=torch.float64))
    for target in (labels, ones, foreground.double()):
        args = dict(epsilon=epsilon, reduction="none")
        found = Q.poly1_quality_focal_loss(x, target, **args)
        torch.testing.assert_close(found, focal[2.0])
        # The positives of the others have no modulator.
        for loss, settings, gamma, alpha in (
            (Q.poly1_varifocal_loss, {}, 2.0, 0.75),
            (Q.poly1_matchability_aware_loss, {}, 1.5, 1.0),
            (Q.poly1_iou_aware_bce, dict(alpha=0.0), 2.0, 1.0),
        ):
            expected = torch.where(foreground, focal[0.0], alpha * focal[gamma])
            found = loss(x, target, **args, **settings)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_probabilities_are_as_their_logits_and_exact_at_0_and_1():
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64)
    labels, scores = torch.randint(0, 5, (30,)), torch.rand(30, dtype=torch.float64)
    for target in ((labels, scores), labels, matrix(labels, scores, 4)):
        args = dict(epsilon=0.5, beta=1.5, reduction="none")
        expected = Q.poly1_quality_focal_loss(x, target, **args)
        found = Q.poly1_quality_focal_loss(x.sigmoid(), target, activated=True, **args)
        torch.testing.assert_close(found, expected)
    p = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]], requires_grad=True)
    target = (torch.tensor([1, 0, 0, 1, 0]), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5]))
    found = Q.poly1_quality_focal_loss(
        p, target, epsilon=2.0, activated=True, reduction="none"
    ).squeeze()
    # log 0 counts as -100: (100 + 2), and 0.25 (0.5 * 100) + 2 / 8.
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 102.0, 102.0, 12.75]))
    (gradient,) = torch.autograd.grad(found[:2].sum(), p)
    assert (gradient == 0).all()


def test_float_noise_is_clamped_and_more_is_refused():
    x, (labels, _) = tensors(torch.float32)
    noisy = torch.tensor([1 + 1.2e-7, 1.0, 0.0])
    exact = torch.tensor([1.0, 1.0, 0.0])
    for name, (loss, settings, *_) in LOSSES.items():
        args = dict(epsilon=1.0, **settings)
        assert loss(x, (labels, noisy), **args) == loss(x, (labels, exact), **args), name
        # Rows of background have no score.
        assert loss(x, (labels, exact + torch.tensor([0.0, 0.0, math.nan])), **args).isfinite()
        for wrong in (math.nan, 1.5, -0.2):
            with pytest.raises(UserError, match=r"scores .* range from .*: expected 0 to 1"):
                loss(x, (labels, torch.tensor([wrong, 1.0, 0.0])), **args)
            with pytest.raises(UserError, match="expected 0 to 1"):
                loss(x, torch.full_like(x, wrong), **args)
    with pytest.raises(UserError, match="the probabilities range from -2 to 2"):
        Q.poly1_quality_focal_loss(x, labels, epsilon=0.0, activated=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_and_no_rows(dtype):
    labels, scores = torch.tensor([0, 1, 2, 2]), torch.tensor([0.0, 1.0, 0.5, 0.5])
    x = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4]], dtype=dtype)
    for name, (loss, settings, *_) in LOSSES.items():
        for beta in ({}, dict(beta=0.5)) if name == "quality focal" else ({},):
            y = x.clone().requires_grad_()
            value = loss(y, (labels, scores), epsilon=1.0, **(settings | beta))
            (gradient,) = torch.autograd.grad(value, y)
            assert value.dtype == torch.float32 and gradient.dtype == dtype
            assert value.isfinite() and gradient.isfinite().all(), name
            empty = torch.zeros(0, 2, requires_grad=True)
            nothing = loss(empty, (labels[:0], scores[:0]), epsilon=1.0, **settings)
            assert nothing == 0 and nothing.requires_grad


MODULES = [
    losses.Poly1QualityFocalLoss(epsilon=0.5, use_sigmoid=True, beta=1.5),
    losses.Poly1VarifocalLoss(epsilon=0.5, use_sigmoid=True, iou_weighted=False),
    losses.Poly1MatchabilityAwareLoss(epsilon=0.5, use_sigmoid=True, alpha=0.5),
    losses.Poly1IoUAwareBCELoss(epsilon=0.5, use_sigmoid=True, alpha=0.5),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_a_module_is_its_function(module):
    function = {
        "Poly1QualityFocalLoss": Q.poly1_quality_focal_loss,
        "Poly1VarifocalLoss": Q.poly1_varifocal_loss,
        "Poly1MatchabilityAwareLoss": Q.poly1_matchability_aware_loss,
        "Poly1IoUAwareBCELoss": Q.poly1_iou_aware_bce,
    }[type(module).__name__]
    settings = {
        k: getattr(module, k)
        for k in ("epsilon", "beta", "alpha", "gamma", "iou_weighted")
        if getattr(module, k, None) is not None
    }
    x, target = tensors()
    expected = function(x, target, torch.ones(3), avg_factor=2.0, **settings)
    torch.testing.assert_close(module(x, target, torch.ones(3), avg_factor=2.0), expected)
    with pytest.raises(UserError, match="use_sigmoid=False: the .* use_sigmoid=True"):
        type(module)(epsilon=0.0, use_sigmoid=False)
    with pytest.raises(UserError, match=r"has no epsilon: write one, >= -1"):
        type(module)(use_sigmoid=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(epsilon=-2.0), "epsilon=-2.0: expected"),
        (dict(beta=-1.0), "beta=-1.0: expected"),
        (dict(epsilon=-1.0, beta=0.1), r"epsilon=-1.0 is given with beta=0.1: .* beta >= 0.2"),
        (dict(target=torch.tensor([0, 1])), r"got labels \(2,\)"),
        (dict(target=torch.tensor([0, 1, 3])), r"label 3 is out of range \(1 of 3"),
        (dict(target=torch.tensor([0, 1, -1])), "label -1 is out of range"),
        (dict(target=(torch.tensor([0, 1, 2]), torch.ones(2))), r"got scores \(2,\)"),
        (dict(target=(torch.tensor([0, 1, 2]), torch.ones(3), 1)), r"got a target tuple"),
        (dict(target=torch.ones(3, 2, dtype=torch.int64)), r"got labels \(3, 2\)"),
        (dict(weight=torch.ones(4)), r"weight has shape \(4,\)"),
    ],
)
def test_what_is_wrong_is_said(change, message):
    x, target = tensors()
    arguments = dict(target=target, epsilon=0.0) | change
    with pytest.raises(UserError, match=message):
        Q.poly1_quality_focal_loss(x, **arguments)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activated", [False, True])
def test_quality_focal_is_mmdetections_at_epsilon_0(weighted, activated):
    mmdet = pytest.importorskip("mmdet.models.losses", reason="needs MMDetection")
    stock = mmdet.QualityFocalLoss(beta=2.0, loss_weight=0.7, activated=activated)
    ours = losses.Poly1QualityFocalLoss(
        epsilon=0.0, use_sigmoid=True, loss_weight=0.7, activated=activated
    )
    torch.manual_seed(0)
    logits, labels, scores = torch.randn(60, 8), torch.randint(0, 9, (60,)), torch.rand(60)
    weight = torch.rand(60) if weighted else None
    for target in ((labels, scores), matrix(labels, scores, 8)):
        found = []
        for loss in (stock, ours):
            x = (logits.sigmoid() if activated else logits).clone().requires_grad_()
            value = loss(x, target, weight, avg_factor=13.0)
            found.append((value.detach(), *torch.autograd.grad(value, x)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("iou_weighted", [False, True])
def test_varifocal_is_mmdetections_at_epsilon_0(iou_weighted):
    mmdet = pytest.importorskip("mmdet.models.losses", reason="needs MMDetection")
    stock = mmdet.VarifocalLoss(iou_weighted=iou_weighted)
    ours = losses.Poly1VarifocalLoss(epsilon=0.0, use_sigmoid=True, iou_weighted=iou_weighted)
    torch.manual_seed(0)
    logits, labels, scores = torch.randn(60, 8), torch.randint(0, 9, (60,)), torch.rand(60)
    scores[:10] = 0.0
    soft = matrix(labels, scores, 8)
    found = []
    for loss, target in ((stock, soft), (ours, soft), (ours, (labels, scores))):
        x = logits.clone().requires_grad_()
        value = loss(x, target, avg_factor=13.0)
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


def test_gradients_that_are_not_those_of_the_value():
    """Matchability: the modulator is a constant. IoU-aware BCE: the target is."""
    x, target = tensors()
    x.requires_grad_()
    p = x.detach().sigmoid()
    foreground = matrix(target[0], torch.ones(3), 2).bool()
    y = torch.tensor(SCORES, dtype=torch.float64)[:, None].expand(3, 2)
    for name, goal in (("matchability", y**1.5), ("iou-aware bce", p**0.25 * y**0.75)):
        loss, settings, *_ = LOSSES[name]
        (found,) = torch.autograd.grad(loss(x, target, epsilon=1.0, reduction="sum", **settings), x)
        side = torch.where(p >= goal, 1 - p, p)
        positive = (p - goal) * (1 + side)
        if name == "matchability":
            negative = 0.5 * p**1.5 * p * (1 + (1 - p))
        else:  # x of p^2 (softplus(x) + p)
            negative = p**2 * (p + (1 - p) * (2 * F.softplus(x.detach()) + 3 * p))
        torch.testing.assert_close(found, torch.where(foreground, positive, negative))
