"""Weights of classes from counts, against scikit-learn, exact fractions and numbers by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import polyfocal
from polyfocal.errors import UserError
from polyfocal.losses.class_weights import use_counts
from polyfocal.losses.functional import class_alphas, class_weights, focal_loss
from polyfocal.losses.settings import Numbers

COUNTS = [5, 50, 1, 944]


def test_balanced_is_scikit_learns():
    of_sklearn = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels = np.repeat(np.arange(4), COUNTS)
    expected = of_sklearn("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(class_weights(COUNTS, "balanced"), expected, rtol=1e-12)


def test_sqrt_by_hand():
    assert class_weights([1, 4, 25], "sqrt").tolist() == pytest.approx(
        [10**0.5, 10**0.5 / 2, 10**0.5 / 5]
    )


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999999])
def test_effective_number(beta):
    """(1 - beta) / (1 - beta^n), scaled to the number of classes, in exact arithmetic."""
    b = Fraction(beta)
    inverse = [(1 - b) / (1 - b**n) for n in (3, 40, 1)]
    expected = [float(3 * one / sum(inverse)) for one in inverse]
    found = class_weights([3, 40, 1], "effective", beta)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert found.sum().item() == pytest.approx(3)


def test_effective_number_by_hand():
    # Effective numbers 1, 1.9 and 2.71: of one, two and three samples with beta 0.9.
    inverse = [1, 1 / 1.9, 1 / 2.71]
    expected = [3 * one / sum(inverse) for one in inverse]
    assert class_weights([1, 2, 3], "effective", 0.9).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("method", ["balanced", "effective", "sqrt"])
def test_a_class_without_samples_weighs_1_and_changes_no_other(method):
    without = class_weights([7, 3], method)
    assert class_weights([7, 0, 3], method).tolist() == [without[0], 1.0, without[1]]


def test_alpha_weighs_positives_beside_negatives():
    weights = torch.tensor([1.0, 3.0, 0.5])
    alphas = class_alphas(weights, use_sigmoid=True)
    assert alphas.tolist() == pytest.approx([0.25, 0.5, 1 / 7])
    assert (alphas / (1 - alphas)).tolist() == pytest.approx((weights / 3).tolist())
    assert class_alphas(weights, use_sigmoid=False).tolist() == pytest.approx([1 / 3, 1, 1 / 6])


@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_numbers_take_the_place_of_a_method(use_sigmoid):
    counts = {"cat": 30, "dog": 10}
    config = dict(
        use_sigmoid=use_sigmoid,
        class_weight="balanced",
        alpha=dict(method="effective", beta=0.0),
    )
    background = not use_sigmoid
    said = use_counts(config, "loss", counts, use_sigmoid=use_sigmoid, background=background)
    extra = [1.0] if background else []
    assert config["class_weight"] == [0.666667, 2.0, *extra]
    assert config["alpha"] == ([0.25, 0.25] if use_sigmoid else [1.0, 1.0, 1.0])
    last = ", background 1" if background else ""
    assert said[0] == (
        f"loss.class_weight is balanced of the training data: cat 0.667, dog 2{last}."
    )
    assert said[1].startswith("loss.alpha is effective (beta 0) of the training data: cat ")
    loss = polyfocal.FocalLoss(reduction="none", **config)
    logits, labels = torch.zeros(2, 2 + background), torch.tensor([0, 1])
    plain = focal_loss(
        logits,
        labels,
        use_sigmoid=use_sigmoid,
        alpha=0.25 if use_sigmoid else None,
        reduction="none",
    )
    factor = torch.tensor([0.666667, 2.0])
    torch.testing.assert_close(loss(logits, labels), plain * factor)


def test_without_a_training_nothing_is_left_of_it():
    config = dict(class_weight="sqrt", alpha=[0.3, 0.4])
    assert use_counts(config, "loss", None, use_sigmoid=True, background=False) == []
    assert config == dict(class_weight=None, alpha=[0.3, 0.4])


def test_many_classes_are_said_in_one_line():
    counts = {f"class {n}": 1 + n for n in range(30)}
    (said,) = use_counts(
        dict(class_weight="balanced"), "loss", counts, use_sigmoid=True, background=False
    )
    assert said.endswith("from 0.517 (class 29) to 15.5 (class 0).")


@pytest.mark.parametrize("name", ["class_weight", "alpha"])
@pytest.mark.parametrize("value", ["balanced", dict(method="effective", beta=0.99)])
def test_a_bare_loss_says_where_a_method_works(name, value):
    sentence = f"{name}='.*' is computed from the training data, which a loss alone does not have"
    with pytest.raises(UserError, match=sentence):
        polyfocal.FocalLoss(use_sigmoid=True, **{name: value})
    loss = polyfocal.FocalLoss(use_sigmoid=True)
    with pytest.raises(UserError, match=sentence):
        setattr(loss, name, value)
    with pytest.raises(UserError, match=sentence):
        focal_loss(torch.zeros(1, 2), torch.tensor([0]), use_sigmoid=True, **{name: value})


def test_every_loss_with_numbers_per_class_says_it():
    for cls in polyfocal.losses.LOSSES.values():
        for name in ("class_weight", "alpha"):
            setting = cls.settings.get(name)
            if isinstance(setting, Numbers):
                with pytest.raises(UserError, match="tools/train.py"):
                    setting.checked(name, "sqrt", cls.__name__)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: class_weights([1], "balance"), "method='balance': expected one of balanced"),
        (lambda: class_weights([1], "effective", 1.0), r"beta=1.0: expected a number in \[0, 1\)"),
        (lambda: class_weights([0, 0]), "one of them above 0"),
        (lambda: class_weights([-1, 2]), "class_counts holds -1"),
        (
            lambda: polyfocal.FocalLoss(use_sigmoid=True, class_weight="blanced"),
            "class_weight='blanced': expected numbers, one per class, or one of balanced, eff",
        ),
        (
            lambda: use_counts(
                dict(class_weight=dict(method="balanced", beta=0.9)),
                "loss",
                {"a": 1},
                use_sigmoid=True,
                background=False,
            ),
            "class_weight has 'beta' beside method='balanced': expected method",
        ),
        (
            lambda: use_counts(
                dict(alpha=dict(method="effective", beta=2)),
                "loss",
                {"a": 1},
                use_sigmoid=True,
                background=False,
            ),
            "beta=2",
        ),
    ],
)
def test_refuses(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
