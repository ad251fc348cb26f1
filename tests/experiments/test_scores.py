"""The score that costs least: closed forms, the slope of the formula, and the page's table."""

import re
from pathlib import Path

import pytest
import torch

from polyfocal import (
    CyclicalFocalLoss,
    FocalLoss,
    Poly1CrossEntropyLoss,
    Poly1FocalLoss,
    ProductOfExpertsLoss,
)
from polyfocal.errors import UserError
from polyfocal.experiments.loss_curves import best_scores, curves_of, draw_scores

PAGE = (Path(__file__).parents[2] / "docs" / "scores.md").read_text(encoding="utf-8")
SHARES = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
LOSSES = {
    "cross-entropy": FocalLoss(gamma=0.0, alpha=None, use_sigmoid=True),
    "cross-entropy, alpha 0.25": FocalLoss(gamma=0.0, alpha=0.25, use_sigmoid=True),
    "focal, gamma 2, no alpha": FocalLoss(gamma=2.0, alpha=None, use_sigmoid=True),
    "focal, gamma 2, alpha 0.25 (the default)": FocalLoss(use_sigmoid=True),
    "Poly-1 focal, epsilon 1": Poly1FocalLoss(epsilon=1.0, use_sigmoid=True),
    "Poly-1 focal, epsilon −1": Poly1FocalLoss(epsilon=-1.0, use_sigmoid=True),  # noqa: RUF001
    "Poly-1 cross-entropy, epsilon 1": Poly1CrossEntropyLoss(epsilon=1.0, use_sigmoid=True),
    "Poly-1 cross-entropy, epsilon −1": Poly1CrossEntropyLoss(  # noqa: RUF001
        epsilon=-1.0, use_sigmoid=True
    ),
}


def test_of_cross_entropy_it_is_the_part_that_is_right():
    torch.testing.assert_close(
        best_scores(LOSSES["cross-entropy"], SHARES), SHARES, atol=1e-4, rtol=0
    )


def test_alpha_weighs_the_parts():
    right, wrong = 0.25 * SHARES, 0.75 * (1 - SHARES)
    found = best_scores(LOSSES["cross-entropy, alpha 0.25"], SHARES)
    torch.testing.assert_close(found, right / (right + wrong), atol=1e-4, rtol=0)


def test_of_the_focal_loss_it_is_where_the_mean_has_no_slope():
    """Of eta (1 - p)^2 log p + (1 - eta) p^2 log(1 - p), differentiated by hand."""
    p = best_scores(LOSSES["focal, gamma 2, no alpha"], SHARES)
    right = 2 * (1 - p) * torch.log(p) - (1 - p) ** 2 / p
    wrong = -2 * p * torch.log(1 - p) + p**2 / (1 - p)
    slope = SHARES * right + (1 - SHARES) * wrong
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_of_the_page(name):
    row = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", PAGE, re.M)
    shown = [float(text) for text in row[1].split(" | ")]
    found = best_scores(LOSSES[name], SHARES).tolist()
    assert shown == pytest.approx(found, abs=0.0051)


def test_what_has_no_such_score_is_refused(tmp_path):
    for loss in (FocalLoss(use_sigmoid=False), ProductOfExpertsLoss(use_sigmoid=True)):
        with pytest.raises(UserError, match="scores are drawn for losses of the sigmoid form"):
            best_scores(loss, SHARES)
    curves = curves_of("cyclical", CyclicalFocalLoss(use_sigmoid=True), [0.0, 0.25], [])
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    draw_scores(curves, tmp_path / "scores.svg")
    text = (tmp_path / "scores.svg").read_text()
    assert text.count("cyclical, progress") == 2
    with pytest.raises(UserError, match=r"ends in .png or .svg"):
        draw_scores(curves, tmp_path / "scores.jpg")
