"""What a loss is divided by when its gradients are added up: docs/scale_out.md says it."""

import copy
import re
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from torch import nn

from polyfocal import FocalLoss, LDAMLoss

PAGE = (Path(__file__).parents[2] / "docs" / "scale_out.md").read_text(encoding="utf-8")
LABELS = torch.tensor([0, 2, 2, 2, 0, 1, 1, 2])  # 2 is background: 1 and 3 positives in the halves


@pytest.fixture
def start():
    torch.manual_seed(0)
    return nn.Linear(4, 2), torch.randn(8, 4)


def weight_after(model, loss, parts, accumulate, divisors):
    """The weights after one step of MMEngine's wrapper on the parts, as a runner takes it."""
    model = copy.deepcopy(model)
    wrapper = OptimWrapper(
        torch.optim.SGD(model.parameters(), lr=0.5), accumulative_counts=accumulate
    )
    wrapper.initialize_count_status(model, 0, len(parts))
    for (rows, labels), divisor in zip(parts, divisors, strict=True):
        with wrapper.optim_context(model):
            value = loss(model(rows), labels, avg_factor=divisor)
        wrapper.update_params(value)
    return model.weight.detach()


def halves(rows):
    return [(rows[:4], LABELS[:4]), (rows[4:], LABELS[4:])]


def test_equal_divisors_give_the_step_of_the_whole_batch(start):
    """As a classifier's, whose loss is the mean of as many rows in each part."""
    model, rows = start
    loss = FocalLoss(use_sigmoid=True)
    whole = weight_after(model, loss, [(rows, LABELS)], 1, [None])
    parts = weight_after(model, loss, halves(rows), 2, [None, None])
    torch.testing.assert_close(parts, whole)


def test_a_divisor_of_all_parts_gives_it_too(start):
    """The mean over the parts of what each would be divided by."""
    model, rows = start
    loss = FocalLoss(use_sigmoid=True)
    whole = weight_after(model, loss, [(rows, LABELS)], 1, [4])
    parts = weight_after(model, loss, halves(rows), 2, [2, 2])
    torch.testing.assert_close(parts, whole)


def test_divisors_of_each_part_weigh_the_parts_as_the_page_says(start):
    """1 and 3 positives: the parts weigh (1 + 3) / (2 x 1) and (1 + 3) / (2 x 3) times as much."""
    model, rows = start
    loss = FocalLoss(use_sigmoid=True)
    parts = weight_after(model, loss, halves(rows), 2, [1, 3])
    by_hand = copy.deepcopy(model)
    first, second = (
        loss(by_hand(x), y, avg_factor=4) for x, y in halves(rows)
    )  # the two shares of the whole batch's loss
    (2 * first + 2 / 3 * second).backward()
    torch.testing.assert_close(parts, model.weight.detach() - 0.5 * by_hand.weight.grad)
    whole = weight_after(model, loss, [(rows, LABELS)], 1, [4])
    assert not torch.allclose(parts, whole)
    text = " ".join(PAGE.split())
    assert "1 and 3 positives" in text and "2 and 2/3 times" in text
    assert re.search(r"\(a_1 \+ \.\.\. \+ a_k\) / \(k a_i\)", text)


def test_an_average_of_the_weights_leaves_the_loss_alone():
    """EMA averages what is in a checkpoint, and a loss of weights by class is not."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.loss = LDAMLoss([5, 3, 1], class_weight=[1.0, 2.0, 3.0])

    model = Model()
    averaged = ExponentialMovingAverage(model, momentum=0.5, update_buffers=True)
    for _ in range(2):
        with torch.no_grad():
            model.fc.weight.add_(1.0)
        averaged.update_parameters(model)
    logits, labels = torch.randn(3, 3), torch.tensor([0, 1, 2])
    assert torch.equal(averaged.module.loss(logits, labels), model.loss(logits, labels))
    assert not torch.equal(averaged.module.fc.weight, model.fc.weight)
    assert not any("loss" in name for name in model.state_dict())
