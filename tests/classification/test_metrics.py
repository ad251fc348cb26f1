"""Accuracy of all kinds against scikit-learn's, and against numbers worked out by hand."""

import numpy as np
import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import torch
from mmengine.structures import BaseDataElement
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from polyfocal.classification import ClassificationMetric
from polyfocal.errors import UserError


def measure(scores, labels, **settings):
    metric = ClassificationMetric(**settings)
    assert metric.table() is None
    samples = [
        BaseDataElement(metainfo={"label": int(y)}, scores=torch.tensor(row)).to_dict()
        for row, y in zip(scores, labels, strict=True)
    ]
    metric.process(None, samples[:3])
    metric.process(None, samples[3:])
    measured = metric.evaluate(len(samples))
    assert measured == {f"classification/{k}": v for k, v in metric.measured.items()}
    assert metric.table().row_count == 1
    return metric.measured


def test_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(6), rng.choice(6, 294, p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02])])
    logits = rng.normal(size=(300, 6))
    logits[np.arange(300), labels] += 1
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    measured = measure(scores, labels, topk=3)
    assert measured["top1"] == pytest.approx(top_k_accuracy_score(labels, scores, k=1))
    assert measured["top3"] == pytest.approx(top_k_accuracy_score(labels, scores, k=3))
    assert measured["macro_top1"] == pytest.approx(
        balanced_accuracy_score(labels, scores.argmax(1))
    )
    by_class = [
        top_k_accuracy_score(labels[labels == c], scores[labels == c], k=3, labels=range(6))
        for c in range(6)
    ]
    assert measured["macro_top3"] == pytest.approx(np.mean(by_class))
    assert not {"many", "medium", "few"} & set(measured)


def test_by_frequency_and_calibration():
    scores = [[0.75, 0.25, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.75, 0.25]]
    scores += [[0.0, 0.0, 0.25, 0.75]] * 2
    measured = measure(scores, [0, 0, 2, 3, 2], topk=2, class_counts=[101, 9, 20, 100])
    # class 0: 1 of 2; class 2: 1 of 2; class 3: 1 of 1; class 1 has nothing to test.
    assert measured["many"] == 0.5 and measured["medium"] == 0.75 and "few" not in measured
    assert measured["macro_top1"] == pytest.approx(2 / 3) and measured["top2"] == 1.0
    assert measured["ece"] == pytest.approx(0.75 - 0.6)
    shifted = measure(scores, [0, 0, 2, 3, 2], class_counts=[101, 9, 20, 100], shots=(21, 100))
    assert shifted["few"] == 0.5 and shifted["medium"] == 1.0


def test_knowing_nothing_is_not_right():
    measured = measure([[0.25] * 4] * 4, [0, 1, 2, 3], topk=3)
    assert measured["top1"] == measured["top3"] == 0


def test_a_training_that_diverged_gets_nothing_right():
    measured = measure([[np.nan, 0.5], [0.2, 0.8], [0.3, 0.7], [0.9, 0.1]], [0, 1, 1, 1], topk=2)
    assert (measured["top1"], measured["top2"]) == (0.5, 0.75) and "ece" not in measured


def test_bad_topk():
    with pytest.raises(UserError, match="topk=0"):
        ClassificationMetric(topk=0)
