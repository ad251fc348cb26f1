"""LDAM against its formula worked out by hand."""

import math

import pytest
import torch

from polyfocal.errors import UserError
from polyfocal.losses import ImbalancedNoisedTopKLoss, LDAMLoss

COUNTS = [16, 1]  # margins 0.25 and 0.5: the fourth root of 16 is 2


def test_formula():
    loss = LDAMLoss(COUNTS, max_margin=0.5, scale=2.0, reduction="none")
    scores = torch.tensor([[0.5, 0.0], [0.5, 0.0]])
    expected = [
        math.log(1 + math.exp(2 * 0.0 - 2 * (0.5 - 0.25))),
        math.log(1 + math.exp(2 * 0.5 - 2 * (0.0 - 0.5))),
    ]
    assert loss(scores, torch.tensor([0, 1])).tolist() == pytest.approx(expected)
    ignored = loss(scores, torch.tensor([0, 7]), ignore_index=7)
    assert ignored.tolist() == pytest.approx([expected[0], 0.0])
    assert loss.activation(scores)[0].tolist() == pytest.approx(
        [math.e / (math.e + 1), 1 / (math.e + 1)]
    )


def test_margins_follow_an_assigned_max_margin():
    loss = LDAMLoss(COUNTS, max_margin=0.25, scale=2.0, reduction="none")
    loss.max_margin = 0.5
    assert loss.margins.tolist() == pytest.approx([0.25, 0.5])
    scores, label = torch.tensor([[0.5, 0.0]]), torch.tensor([1])
    assert loss(scores, label).item() == pytest.approx(math.log(1 + math.exp(2.0)))
    topk = ImbalancedNoisedTopKLoss(1, 0.0, COUNTS, max_margin=0.25, scale=1.0)
    topk.max_margin = 0.5
    assert (topk.margins.tolist(), topk.margin) == (pytest.approx([0.25, 0.5]), 0.5)
    assert topk(scores, label).item() == pytest.approx(0.5)  # the label's score is the second one


def test_background_has_the_smallest_margin():
    loss = LDAMLoss(COUNTS, scale=2.0, reduction="none")
    scores = torch.tensor([[0.5, 0.0, 0.25]] * 3)
    # Each label's score without its margin: 0.5 - 0.25, 0 - 0.5, 0.25 - 0.25.
    changed = [[0.25, 0.0, 0.25], [0.5, -0.5, 0.25], [0.5, 0.0, 0.0]]
    expected = [math.log(sum(math.exp(2 * s) for s in row)) - 2 * row[y]
                for y, row in enumerate(changed)]  # fmt: skip
    assert loss(scores, torch.arange(3)).tolist() == pytest.approx(expected)


def test_gradient():
    loss = LDAMLoss([50, 7, 1], scale=3.0)
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: loss(s, torch.tensor([0, 1, 2, 1])), scores)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: LDAMLoss([0, 0]), "class_counts"),
        (lambda: LDAMLoss(COUNTS, max_margin=0.0), "max_margin=0.0"),
        (lambda: LDAMLoss(COUNTS, scale=-1.0), "scale=-1.0"),
        (lambda: LDAMLoss(COUNTS, use_sigmoid=True), "use_sigmoid"),
        (
            lambda: LDAMLoss(COUNTS)(torch.zeros(1, 4), torch.tensor([0])),
            r"2 class counts \(margins\) for logits of 4 columns: expected 4, or 3 if the last",
        ),
        (
            lambda: LDAMLoss(COUNTS)(torch.zeros(1, 2, 5), torch.zeros(1, 5).long()),
            r"LDAMLoss has logits \(1, 2, 5\) and a target \(1, 5\): expected logits \(N, C\)",
        ),
    ],
)
def test_refuses(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
