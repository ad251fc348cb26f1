"""The loss functions against the papers' formulas, other packages and literal numbers."""

import math
from functools import partial

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch.utils._python_dispatch import TorchDispatchMode

from polyfocal.errors import UserError
from polyfocal.losses import functional as L
from polyfocal.ops import use_path

GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]
EPSILONS = [-1.0, -0.5, 0.0, 2.0]


def inputs(n=40, c=5, softmax=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, c, dtype=dtype, generator=generator)
    labels = torch.randint(0, c if softmax else c + 1, (n,), generator=generator)
    return logits, labels


def losses(softmax):
    """Every function with one setting: (name, call, coefficients of the reference)."""
    sigmoid = not softmax
    cases = [
        (
            "focal",
            lambda *a, **k: L.focal_loss(*a, use_sigmoid=sigmoid, alpha=None, **k),
            dict(gamma=2),
        ),
        (
            "poly1 focal",
            lambda *a, **k: L.poly1_focal_loss(
                *a, epsilon=-0.7, gamma=1.5, use_sigmoid=sigmoid, alpha=None, **k
            ),
            dict(gamma=1.5, epsilons=(-0.7,)),
        ),
        (
            "poly1 ce",
            lambda *a, **k: L.poly1_cross_entropy(*a, epsilon=2.0, use_sigmoid=sigmoid, **k),
            dict(epsilons=(2.0,)),
        ),
        (
            "poly n",
            lambda *a, **k: L.poly_n_loss(
                *a, epsilons=(1.0, -0.4, 0.2), use_sigmoid=sigmoid, gamma=0.5, **k
            ),
            dict(gamma=0.5, epsilons=(1.0, -0.4, 0.2)),
        ),
        (
            # progress 0.5 with factor 4 is xi = 1/3
            "cyclical",
            lambda *a, **k: L.cyclical_focal_loss(*a, progress=0.5, use_sigmoid=sigmoid, **k),
            dict(gamma=2, xi=1 / 3, gamma_hc=3),
        ),
    ]
    return [
        pytest.param(*case[1:], id=f"{case[0]} {'softmax' if softmax else 'sigmoid'}")
        for case in cases
    ]


@pytest.mark.parametrize(("function", "coefficients"), losses(softmax=False))
def test_sigmoid_form_is_the_papers_formula(function, coefficients):
    logits, labels = inputs()
    expected = reference.sigmoid_loss(logits, labels, **coefficients)
    np.testing.assert_allclose(function(logits, labels, reduction="none"), expected, rtol=1e-10)
    assert function(logits, labels, reduction="mean").item() == pytest.approx(expected.mean())


@pytest.mark.parametrize(("function", "coefficients"), losses(softmax=True))
def test_softmax_form_is_the_papers_formula(function, coefficients):
    logits, labels = inputs(softmax=True)
    expected = reference.softmax_loss(logits, labels, **coefficients)
    np.testing.assert_allclose(function(logits, labels, reduction="none"), expected, rtol=1e-10)
    assert function(logits, labels, reduction="sum").item() == pytest.approx(expected.sum())


def test_values_worked_out_by_hand():
    # One logit log(3): p = 0.75. CE = 0.287682, (1 - p)^2 = 0.0625, (1 - p)^3 = 0.015625.
    logits = torch.tensor([[math.log(3.0)]])
    positive, negative = torch.tensor([0]), torch.tensor([1])
    one = dict(use_sigmoid=True, reduction="sum")
    assert L.focal_loss(logits, positive, **one).item() == pytest.approx(
        0.25 * 0.0625 * 0.287682, rel=1e-5
    )
    # as a negative: p_t = 0.25, CE = 1.386294, (1 - p_t)^2 = 0.5625, (1 - p_t)^3 = 0.421875
    assert L.focal_loss(logits, negative, **one).item() == pytest.approx(
        0.75 * 0.5625 * 1.386294, rel=1e-5
    )
    poly = L.poly1_focal_loss(logits, negative, epsilon=-1.0, **one)
    assert poly.item() == pytest.approx(0.75 * (0.5625 * 1.386294 - 0.421875), rel=1e-5)
    # xi = 1 at the start: (1 + 0.75)^3 = 5.359375 on the positive, focal on the negative
    start = dict(progress=0.0, alpha=None, **one)
    assert L.cyclical_focal_loss(logits, positive, **start).item() == pytest.approx(
        5.359375 * 0.287682, rel=1e-5
    )
    assert L.cyclical_focal_loss(logits, negative, **start).item() == pytest.approx(
        0.5625 * 1.386294, rel=1e-5
    )
    # Softmax over log 3 and 0 has the same p; epsilon = 2: 0.287682 + 2 * 0.25
    two = torch.tensor([[math.log(3.0), 0.0]])
    assert L.poly1_cross_entropy(two, positive, epsilon=2.0).item() == pytest.approx(
        0.787682, rel=1e-5
    )
    # label smoothing 0.1, K = 2: 0.95 (0.287682 + 2 * 0.25) + 0.05 (1.386294 + 2 * 0.75)
    smooth = L.poly1_cross_entropy(two, positive, epsilon=2.0, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(0.95 * 0.787682 + 0.05 * 2.886294, rel=1e-5)
    # cyclical with smoothing at xi = 1/3: label 0.95 w, other 0.05 (2/3 * 0.25^2 + 1/3) CE
    cyclical = L.cyclical_focal_loss(
        two, positive, progress=0.5, use_sigmoid=False, label_smoothing=0.1
    )
    label = (2 / 3 * 0.0625 + 1 / 3 * 5.359375) * 0.287682
    other = (2 / 3 * 0.0625 + 1 / 3) * 1.386294
    assert cyclical.item() == pytest.approx(0.95 * label + 0.05 * other, rel=1e-5)


@pytest.mark.parametrize("gamma", GAMMAS[2:])
def test_focal_is_fvcores_with_gradient(gamma):
    logits, labels = inputs()
    logits.requires_grad_()
    one_hot = torch.from_numpy(reference.one_hot(labels, 5))
    ours = L.focal_loss(logits, labels, use_sigmoid=True, gamma=gamma, reduction="sum")
    theirs = sigmoid_focal_loss(logits.float(), one_hot.float(), 0.25, gamma, "sum").double()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)), rtol=1e-4, atol=1e-6
    )
    soft = torch.rand_like(logits)
    ours = L.focal_loss(logits, soft, use_sigmoid=True, gamma=gamma, reduction="none")
    theirs = sigmoid_focal_loss(logits.float(), soft.float(), 0.25, gamma).double()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_softmax_at_epsilon_0_is_torchs_cross_entropy(label_smoothing):
    logits, labels = inputs(softmax=True)
    ours = L.poly1_cross_entropy(logits, labels, epsilon=0.0, label_smoothing=label_smoothing)
    torch.testing.assert_close(
        ours, F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    )
    if not label_smoothing:
        soft = torch.softmax(torch.randn_like(logits), dim=1)
        ours = L.poly1_cross_entropy(logits, soft, epsilon=0.0)
        torch.testing.assert_close(ours, F.cross_entropy(logits, soft))


def test_label_smoothing_is_a_soft_target_for_poly1():
    logits, labels = inputs(softmax=True)
    smooth = 0.9 * torch.from_numpy(reference.one_hot(labels, 5)) + 0.1 / 5
    torch.testing.assert_close(
        L.poly1_cross_entropy(logits, labels, epsilon=-1.0, label_smoothing=0.1),
        L.poly1_cross_entropy(logits, smooth, epsilon=-1.0),
    )


@pytest.mark.parametrize("softmax", [False, True])
def test_hard_targets_of_the_logits_shape_are_labels(softmax):
    logits, labels = inputs(softmax=softmax)
    hard = torch.from_numpy(reference.one_hot(labels, 5))
    for param in losses(softmax):
        function, _ = param.values
        torch.testing.assert_close(
            function(logits, hard, reduction="none"), function(logits, labels, reduction="none")
        )


def test_sigmoid_cyclical_is_the_softmax_form_for_one_positive_class():
    # sigmoid(x) is the first entry of softmax(x, 0): where the target is 1 the forms are one.
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    labels = torch.zeros(9, dtype=torch.long)
    args = dict(progress=0.8, gamma_hc=2.5, gamma_lc=1.5, factor=2.0, reduction="none")
    sigmoid = L.cyclical_focal_loss(x[:, None], labels, use_sigmoid=True, **args)
    softmax = L.cyclical_focal_loss(torch.stack([x, 0 * x], 1), labels, use_sigmoid=False, **args)
    torch.testing.assert_close(sigmoid[:, 0], softmax)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_gradients_in_float64(softmax, gamma, epsilon):
    logits, labels = inputs(n=4, c=3, softmax=softmax)
    logits.requires_grad_()
    weight = torch.rand(4, dtype=torch.float64)
    soft = torch.softmax(torch.randn(4, 3, dtype=torch.float64), dim=1)

    def loss(target, reduction):
        return lambda x: L.poly1_focal_loss(
            x, target, weight, epsilon=epsilon, gamma=gamma, use_sigmoid=not softmax,
            alpha=[0.2, 0.5, 0.9], class_weight=[1.0, 2.0, 0.5], reduction=reduction,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss(labels, "none"), logits)
    assert torch.autograd.gradcheck(loss(soft, "sum"), logits)
    assert torch.autograd.gradgradcheck(loss(labels, "sum"), logits)


@pytest.mark.parametrize("use_sigmoid", [True, False])
@pytest.mark.parametrize("progress", [0.0, 0.2, 0.25, 0.9])
def test_gradient_of_the_cyclical_loss(use_sigmoid, progress):
    logits, labels = inputs(n=4, c=3, softmax=not use_sigmoid)
    logits.requires_grad_()
    setting = dict(use_sigmoid=use_sigmoid, label_smoothing=0.0 if use_sigmoid else 0.1)
    assert torch.autograd.gradcheck(
        lambda x: L.cyclical_focal_loss(x, labels, progress=progress, **setting), logits
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_extreme_logits_stay_finite(dtype, softmax, gamma):
    row = torch.tensor([1e4, -1e4, 0.0, 88.0, -104.0, 17.5, 9.39]).to(dtype)
    logits = torch.stack([row, row.flip(0), -row, 0 * row]).requires_grad_()
    for labels in (torch.tensor([0, 1, 3, 6]), torch.tensor([1, 0, 6, 2])):
        for weight in (None, torch.zeros(4)):
            loss = L.poly1_focal_loss(
                logits,
                labels,
                weight,
                epsilon=-1.0,
                gamma=gamma,
                use_sigmoid=not softmax,
                reduction="sum",
            ) + L.cyclical_focal_loss(
                logits,
                labels,
                weight,
                progress=0.6,
                use_sigmoid=not softmax,
                gamma_lc=gamma,
                reduction="sum",
            )
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.dtype == dtype
            assert gradient.isfinite().all()
            assert weight is None or (loss == 0 and (gradient == 0).all())
    soft = torch.rand(4, 7)
    soft = (soft / soft.sum(1, keepdim=True)).clamp(max=1)
    loss = L.focal_loss(logits, soft, gamma=gamma, use_sigmoid=not softmax, reduction="sum")
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)]
)
@pytest.mark.parametrize("softmax", [False, True])
def test_half_precision_is_computed_in_float32(dtype, tolerance, softmax):
    logits, labels = inputs(n=300, softmax=softmax)
    logits = logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = L.poly1_focal_loss(
            logits, labels, epsilon=1.0, use_sigmoid=not softmax, reduction="none", alpha=None
        )
    form = reference.softmax_loss if softmax else reference.sigmoid_loss
    expected = form(logits.double(), labels, gamma=2, epsilons=(1.0,))
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss, expected, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("epsilon", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_no_loss_rewards_an_error(epsilon, gamma):
    # alpha_t on both terms: for every epsilon >= -1 the loss falls with p_t and is never negative.
    logits = torch.linspace(-12, 12, 200, dtype=torch.float64)[:, None]
    for label, sign in ((0, 1), (1, -1)):
        loss = L.poly1_focal_loss(
            logits,
            torch.full((200,), label),
            epsilon=epsilon,
            gamma=gamma,
            use_sigmoid=True,
            reduction="none",
        )
        assert (loss >= 0).all()
        assert (sign * loss.diff(dim=0) <= 1e-12).all()


def test_weights_labels_and_reductions():
    logits, labels = inputs(n=6, c=3)
    labels[2], labels[4] = 3, -1
    args = dict(use_sigmoid=True, ignore_index=-1)
    plain = torch.from_numpy(reference.sigmoid_loss(logits, labels, alpha=0.25, gamma=2))
    plain[4] = 0
    row = torch.rand(6, dtype=torch.float64)
    per_class = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    expected = plain * row[:, None] * per_class
    common = dict(class_weight=per_class, **args)
    for weight in (row, row[:, None], row[:, None].expand(6, 3), row.repeat_interleave(3)):
        torch.testing.assert_close(
            L.focal_loss(logits, labels, weight, reduction="none", **common), expected
        )
    total = expected.sum()
    torch.testing.assert_close(L.focal_loss(logits, labels, row, reduction="sum", **common), total)
    # five rows of three columns are not ignored
    torch.testing.assert_close(L.focal_loss(logits, labels, row, **common), total / 15)
    for avg_factor in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        loss = L.focal_loss(logits, labels, row, avg_factor=avg_factor, **common)
        assert loss.shape == ()
        torch.testing.assert_close(loss, total / 7)
    # the ignored row has no gradient
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(L.focal_loss(logits, labels, **common), logits)
    assert (gradient[4] == 0).all() and (gradient[3] != 0).all()


def test_alpha_of_each_class():
    logits, labels = inputs(c=3)
    alpha = [0.1, 0.5, 0.9]
    expected = reference.sigmoid_loss(logits, labels, alpha=alpha, gamma=2)
    common = dict(alpha=alpha, reduction="none")
    found = L.focal_loss(logits, labels, use_sigmoid=True, **common)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    logits, labels = inputs(c=3, softmax=True)
    expected = reference.softmax_loss(logits, labels, gamma=2) * np.array(alpha)[labels]
    found = L.focal_loss(logits, labels, use_sigmoid=False, **common)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_weights_of_the_softmax_form():
    logits, labels = inputs(n=6, c=3, softmax=True)
    labels[1] = 255
    per_class = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    plain = torch.from_numpy(reference.softmax_loss(logits, labels.clamp(max=2), epsilons=(-1.0,)))
    expected = plain * per_class[labels.clamp(max=2)]
    expected[1] = 0
    common = dict(epsilon=-1.0, class_weight=[1.0, 3.0, 0.5], ignore_index=255)
    torch.testing.assert_close(
        L.poly1_cross_entropy(logits, labels, reduction="none", **common), expected
    )
    torch.testing.assert_close(L.poly1_cross_entropy(logits, labels, **common), expected.sum() / 5)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_input_is_a_zero_of_the_graph(softmax, reduction):
    logits = torch.zeros(0, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    for target in (labels, torch.zeros(0, 4)):
        loss = L.focal_loss(logits, target, use_sigmoid=not softmax, reduction=reduction)
        loss.backward()
        assert loss.item() == 0
    assert logits.grad is not None and logits.grad.shape == (0, 4)


def test_rows_that_are_all_ignored_give_zero():
    logits, _ = inputs(n=3)
    logits.requires_grad_()
    loss = L.focal_loss(logits, torch.full((3,), -100), use_sigmoid=True, ignore_index=-100)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_one_class_and_one_column():
    logits = torch.tensor([[2.0], [-1.0]], requires_grad=True)
    loss = L.poly1_cross_entropy(logits, torch.tensor([0, 0]), epsilon=-1.0)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_no_one_hot_of_the_logits_size_for_labels():
    # Whatever torch creates while the loss is computed, nothing has the logits' size and an
    # integer or boolean dtype.
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                t
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, torch.Tensor)
            )
            return out

    logits, labels = torch.randn(500, 40, requires_grad=True), torch.randint(0, 40, (500,))
    for use_sigmoid in (True, False):
        with Watch():
            L.poly1_focal_loss(logits, labels, epsilon=1.0, use_sigmoid=use_sigmoid).backward()
        assert any(t.numel() == logits.numel() for t in made)
        assert not [t for t in made if t.numel() == logits.numel() and not t.is_floating_point()]


BAD = [
    (dict(gamma=-1.0), "gamma=-1.0: expected a finite number >= 0"),
    (dict(gamma=float("nan")), "gamma=nan"),
    (dict(epsilon=-2.0), "epsilon=-2.0: expected a finite number >= -1"),
    (dict(alpha=1.5), r"alpha holds 1.5: expected finite numbers in \[0, 1\]"),
    (dict(alpha=[0.5, 0.5]), "alpha has 2 values: expected 5"),
    (dict(class_weight=[1.0] * 4), "class_weight has 4 values: expected 5"),
    (dict(class_weight=[-1.0] * 5), "class_weight holds -1.0"),
    (dict(class_weight=2.0), "class_weight=2.0: expected one number per class"),
    (dict(reduction="average"), "reduction='average': expected one of none, mean, sum"),
    (dict(reduction="sum", avg_factor=3), "avg_factor is given with reduction='sum'"),
    (dict(avg_factor=torch.ones(2)), r"avg_factor has shape \(2,\)"),
    (dict(weight=torch.ones(39)), r"weight has shape \(39,\): expected \(N,\)"),
    (dict(weight=torch.ones(40, 2)), r"weight has shape \(40, 2\)"),
    (
        dict(target=torch.full((40,), 6)),
        r"label 6 is out of range \(40 of 40 labels are\): expected 0 to 5 \(5 is",
    ),
    (dict(target=torch.full((40,), -1)), "label -1 is out of range"),
    (dict(target=torch.zeros(40, 1, dtype=torch.long)), r"target \(40, 1\) torch.int64: expected"),
    (dict(target=torch.zeros(40)), "expected labels"),
    (dict(target=torch.full((40, 5), 1.2)), "soft targets range from 1.2 to 1.2: expected 0 to 1"),
    (dict(target=torch.full((40, 5), float("nan"))), "soft targets range from nan"),
    (dict(logits=torch.zeros(40, 5, dtype=torch.long)), "expected floating-point logits"),
    (dict(logits=torch.zeros(40, 5, 2)), r"expected logits \(N, C\) with integer labels"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[case[1][:40] for case in BAD])
def test_bad_input_is_one_sentence(change, message):
    logits, labels = inputs()
    arguments = dict(logits=logits, target=labels, epsilon=1.0, use_sigmoid=True) | change
    with pytest.raises(ValueError, match=message):
        L.poly1_focal_loss(**arguments)


def test_bad_label_smoothing_and_labels_of_the_softmax_form():
    logits, labels = inputs()
    with pytest.raises(ValueError, match=r"label 5 is out of range .* expected 0 to 4$"):
        L.poly1_cross_entropy(logits, labels, epsilon=1.0)
    with pytest.raises(ValueError, match="label_smoothing=0.1 is given with use_sigmoid=True"):
        L.poly1_cross_entropy(logits, labels, epsilon=1.0, use_sigmoid=True, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing=1.0: expected a number in"):
        L.poly1_cross_entropy(logits, labels % 5, epsilon=1.0, label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"epsilons\[1\]=-0.6: expected a finite number >= -0.5"):
        L.poly_n_loss(logits, labels, epsilons=(0.0, -0.6), use_sigmoid=True)


@pytest.mark.parametrize("path", ["auto", "composed"])
@pytest.mark.parametrize("wrong", [-1, 4, -7, 2**40])
@pytest.mark.parametrize("weights", ["no weights", "class", "ignore", "none"])
def test_the_softmax_form_says_which_label_is_out_of_range(path, wrong, weights):
    """Where the labels are not looked at before, the look-up of the label fails."""
    target = torch.tensor([0, 3, wrong])
    common = {
        "class": dict(class_weight=[0.5, 1.0, 1.0, 2.0]),
        "ignore": dict(ignore_index=255),
        "none": dict(reduction="none"),
    }.get(weights, {})
    per_class = dict(alpha=[0.1, 0.2, 0.3, 0.4]) if weights == "class" else {}
    before = use_path(path)
    try:
        for loss in (
            partial(L.focal_loss, use_sigmoid=False, **per_class),
            partial(L.poly1_focal_loss, epsilon=1.0, use_sigmoid=False, **per_class),
            partial(L.poly1_cross_entropy, epsilon=1.0, label_smoothing=0.1),
            partial(L.poly_n_loss, epsilons=[1.0], use_sigmoid=False),
            partial(L.cyclical_focal_loss, progress=0.5, use_sigmoid=False),
        ):
            with pytest.raises(UserError, match=rf"^label {wrong} is out of range \(1 of 3"):
                loss(torch.zeros(3, 4), target, **common)
    finally:
        use_path(before)


def test_a_column_of_logits_never_broadcasts_over_a_row_of_targets():
    logits = torch.zeros(7, 1)
    assert L.focal_loss(
        logits, torch.zeros(7, dtype=torch.long), use_sigmoid=True, reduction="none"
    ).shape == (7, 1)
    for target in (torch.zeros(7), torch.zeros(1, 7), torch.zeros(7, 7)):
        with pytest.raises(ValueError, match="expected"):
            L.focal_loss(logits, target, use_sigmoid=True)


def test_integers_of_the_logits_shape_are_soft_targets_unless_they_could_be_labels():
    logits = torch.tensor([[4.0]])
    # As a label 0 is the class, as a soft target it is the negative: 0.018 or 4.02.
    focal = dict(use_sigmoid=True, gamma=0.0, alpha=None, reduction="sum")
    assert L.focal_loss(logits, torch.tensor([0]), **focal).item() == pytest.approx(
        math.log1p(math.exp(-4))
    )
    for dtype in (torch.int64, torch.int32, torch.uint8):
        for shape in ((1, 1), (1, 1, 6), (2, 1, 3, 4), (2, 3, 1)):  # a map's column is its second
            with pytest.raises(ValueError, match=r"expected int64 labels \(N,\), or floating-poi"):
                L.focal_loss(torch.full(shape, 4.0), torch.zeros(shape, dtype=dtype), **focal)
    negative = math.log1p(math.exp(4))
    for target in (torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool)):
        assert L.focal_loss(logits, target, **focal).item() == pytest.approx(negative)
    two = torch.tensor([[4.0, -4.0]])
    multi_hot = torch.tensor([[1, 1]])
    assert L.focal_loss(two, multi_hot, **focal).item() == pytest.approx(
        negative + math.log1p(math.exp(-4)), rel=1e-6
    )
    with pytest.raises(ValueError, match="soft targets range from 0 to 3: expected 0 to 1"):
        L.focal_loss(two, torch.tensor([[0, 3]]), **focal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_rounding_adds_to_a_soft_target_is_taken_off(dtype):
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    over = torch.tensor([[1.0 + 1.2e-7, -1e-8, 0.5]], dtype=torch.float64)
    if dtype.itemsize < 4:
        over[0, 0] = 1 + 2**-10
    exact = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    form = dict(use_sigmoid=True, reduction="none")
    expected = L.focal_loss(logits, exact, **form)
    torch.testing.assert_close(L.focal_loss(logits, over.to(dtype), **form), expected)
    compiled = torch.compile(lambda x, y: L.focal_loss(x, y, **form), backend="eager")
    torch.testing.assert_close(compiled(logits, over.to(dtype)), expected)
    # What rounding does not explain stays visible where nothing can be refused.
    assert compiled(logits, torch.tensor([[1.2, 0.0, 0.5]], dtype=dtype))[0, 0].isnan()


def test_rows_of_soft_targets_sum_to_one_in_the_softmax_form():
    logits = torch.zeros(2, 2)
    good = torch.tensor([[0.3, 0.7], [0.5, 0.5]])
    expected = pytest.approx(math.log(2))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        loss = L.poly1_cross_entropy(logits, good.to(dtype), epsilon=0.0)
        assert loss.item() == pytest.approx(math.log(2), rel=1e-2)
    assert L.poly1_cross_entropy(logits, good, epsilon=0.0).item() == expected
    for bad in (good * 0.9, good * 1.1, torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="rows of soft targets sum to between .* expected 1"):
            L.poly1_cross_entropy(logits, bad, epsilon=0.0)
    assert L.focal_loss(logits, good * 0.9, use_sigmoid=True).isfinite()


def test_a_soft_target_has_no_gradient():
    logits = torch.zeros(2, 2, requires_grad=True)
    target = torch.full((2, 2), 0.5, requires_grad=True)
    for use_sigmoid in (True, False):
        loss = L.focal_loss(logits, target, use_sigmoid=use_sigmoid)
        _, gradient = torch.autograd.grad(loss, (logits, target), allow_unused=True)
        assert gradient is None


@pytest.mark.parametrize("use_sigmoid", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_ignored_rows_may_hold_anything(junk, reduction, use_sigmoid):
    logits = torch.tensor([[1.0, 2.0], [0.3, -0.5], [0.0, 1.0]], requires_grad=True)
    labels, weight = torch.tensor([0, 255, 1]), torch.tensor([1.0, junk, 2.0])
    form = dict(use_sigmoid=use_sigmoid, reduction=reduction)
    for w in (None, weight):
        held = torch.where(torch.tensor([[0], [1], [0]]) == 1, junk, logits)
        kept = L.poly1_focal_loss(
            logits[[0, 2]], labels[[0, 2]], None if w is None else w[[0, 2]], epsilon=1.0, **form
        )
        loss = L.poly1_focal_loss(held, labels, w, epsilon=1.0, ignore_index=255, **form)
        if reduction == "none":
            assert (loss[1] == 0).all()
            loss = loss[[0, 2]]
        torch.testing.assert_close(loss, kept)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        (expected,) = torch.autograd.grad(kept.sum(), logits)
        torch.testing.assert_close(gradient, expected)
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_numbers_of_numpy_are_numbers(use_sigmoid):
    logits, labels = inputs(c=3, softmax=not use_sigmoid)
    settings = dict(use_sigmoid=use_sigmoid, epsilon=0.5, gamma=1.5)
    expected = L.poly1_focal_loss(
        logits, labels, alpha=[0.25, 0.5, 0.75], class_weight=[1.0, 2.0, 0.5], **settings
    )
    for dtype in (np.float32, np.float64):
        found = L.poly1_focal_loss(
            logits,
            labels,
            use_sigmoid=use_sigmoid,
            epsilon=dtype(0.5),
            gamma=np.array(1.5, dtype),
            alpha=np.array([0.25, 0.5, 0.75], dtype),
            class_weight=[dtype(1), dtype(2), dtype(0.5)],
        )
        torch.testing.assert_close(found, expected)
    # -1/3 in float32 is below -1/3, and a sum of tenths is above 1.
    poly = L.poly_n_loss(
        logits, labels, use_sigmoid=use_sigmoid, epsilons=np.float32([0, 0, -1 / 3])
    )
    expected = L.poly_n_loss(logits, labels, use_sigmoid=use_sigmoid, epsilons=(0, 0, -1 / 3))
    torch.testing.assert_close(poly, expected)
    L.focal_loss(logits, labels, use_sigmoid=use_sigmoid, alpha=np.float32(0.1) * 10)
    form = np.bool_(use_sigmoid)
    assert L.focal_loss(logits, labels, use_sigmoid=form) == L.focal_loss(
        logits, labels, use_sigmoid=use_sigmoid
    )
    with pytest.raises(ValueError, match="gamma=-1.0: expected a finite number >= 0"):
        L.focal_loss(logits, labels, use_sigmoid=use_sigmoid, gamma=np.float32(-1))
