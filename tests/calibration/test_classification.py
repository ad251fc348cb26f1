"""Against values worked out by hand, and those of netcal 1.4.0 and torchmetrics 1.9.0."""

import math

import numpy as np
import pytest
import torch

from polyfocal.calibration import ClassificationCalibration
from polyfocal.errors import UserError


def measure(p, y, num_bins=15):
    metric = ClassificationCalibration(num_bins)
    metric.update(p, y)
    return metric.compute()


# Recorded once from netcal's ECE and MCE (detection=True on the confidence of the most probable
# class; equal_intervals=False for the bins of equal count; on each class for the classwise error).
# torchmetrics' multiclass_calibration_error, with norm l1 and max, gives the same to float32.
@pytest.mark.parametrize(
    ("seed", "size", "classes", "num_bins", "ece", "mce", "adaptive", "classwise"),
    [
        (0, 500, 5, 15, 0.3471479737539, 0.7860113196572, 0.3471479737539, 0.1702121965437),
        (1, 40, 3, 10, 0.3543936450319, 0.8424805306786, 0.3937990129155, 0.3214076830053),
        (2, 200, 4, 1, 0.3945664175788, 0.3945664175788, 0.3945664175788, 0.0349161842908),
    ],
)
def test_equals_netcal_and_torchmetrics(
    seed, size, classes, num_bins, ece, mce, adaptive, classwise
):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes) * 0.5, size)
    result = measure(p, rng.integers(0, classes, size), num_bins)
    assert result.ece == pytest.approx(ece, abs=1e-12)
    assert result.mce == pytest.approx(mce, abs=1e-12)
    assert result.adaptive_ece == pytest.approx(adaptive, abs=1e-12)
    assert result.classwise_ece == pytest.approx(classwise, abs=1e-12)


def test_by_hand():
    # Bins of width 1/2: confidences 0.9 (right), 0.6 (wrong), 0.5 (right) are all in the upper one.
    result = measure([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], [0, 0, 0], num_bins=2)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.bins.count.tolist() == [0, 3]
    assert result.ece == result.mce == pytest.approx(abs(2 / 3 - (0.9 + 0.6 + 0.5) / 3))
    assert result.brier == pytest.approx((2 * 0.1**2 + 2 * 0.6**2 + 2 * 0.5**2) / 3)
    assert result.nll == pytest.approx(-math.log(0.9 * 0.4 * 0.5) / 3)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["tensor", "with a graph", "list of tensors"])
def test_torch_tensors_measure_as_their_values(dtype, kind):
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = (3 * logits).softmax(1).to(getattr(torch, dtype))
    y = torch.randint(30, (200,), generator=torch.Generator().manual_seed(1))
    wanted = None if dtype == "bfloat16" else measure(p.numpy(), y.numpy())
    given = p.requires_grad_(kind == "with a graph")
    found = measure(list(given) if kind == "list of tensors" else given, y)
    rounded = p.detach().double().numpy()
    confidence = rounded.max(axis=1)
    assert found.accuracy == (rounded.argmax(axis=1) == y.numpy()).mean()
    assert found.brier == pytest.approx(
        ((rounded - np.eye(30)[y.numpy()]) ** 2).sum(axis=1).mean(), abs=1e-12
    )
    assert found.bins.confidence[found.bins.count > 0] @ found.bins.count[
        found.bins.count > 0
    ] == pytest.approx(confidence.sum())
    assert wanted is None or (found.ece, found.mce) == (wanted.ece, wanted.mce)


def test_sums_of_rounded_probabilities():
    # Seven of 1/7 add up to 0.998535 in bfloat16, to 1.000122 in float16: what rounding explains.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        p = torch.full((3, 7), 1 / 7, dtype=torch.float64).to(dtype)
        assert measure(p, [0, 1, 2]).accuracy == pytest.approx(1 / 3)
    p = np.full((3, 7), 1 / 7).astype(np.float16)
    assert measure(p, [0, 1, 2]).accuracy == pytest.approx(1 / 3)
    off = torch.tensor([[0.5, 0.48]])
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(UserError, match="must add up to 1, got 0.98"):
            measure(off.to(dtype), [0])
    # One ulp of single precision above 1 and below 0 is put back.
    over = np.array([[1 + 2**-23, -(2**-24)]])
    assert measure(over, [0]).ece == 0 and measure(over, [0]).bins.confidence[-1] == 1
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        measure([[1.001, -0.001]], [0])


def test_scores_of_0_and_1():
    result = measure([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [0, 1, 1], num_bins=10)
    assert result.bins.count.tolist() == [0] * 9 + [3]  # 1 is in the last bin
    assert result.ece == pytest.approx(1 / 3) and result.brier == pytest.approx(2 / 3)
    assert math.isfinite(result.nll) and result.nll > 200


def test_ties_stay_in_one_bin():
    # The same confidence in any order: the error may not depend on which samples come first.
    p = np.tile([0.7, 0.3], (10, 1))
    y = np.array([0] * 4 + [1] * 6)
    assert measure(p, y, 5).adaptive_ece == pytest.approx(0.3)
    assert measure(p, y[::-1], 5).adaptive_ece == pytest.approx(0.3)


def test_no_samples():
    result = measure(np.zeros((0, 3)), np.zeros(0, dtype=int))
    numbers = (result.accuracy, result.ece, result.adaptive_ece, result.classwise_ece)
    assert all(math.isnan(x) for x in (*numbers, result.mce, result.brier, result.nll))


def test_parts_merge_to_the_whole():
    rng = np.random.default_rng(3)
    p, y = rng.dirichlet(np.ones(4), 60), rng.integers(0, 4, 60)
    first, second = ClassificationCalibration(), ClassificationCalibration()
    first.update(p[:10], y[:10])
    second.update(p[10:40], y[10:40])
    second.update(p[40:], y[40:])
    first.merge(second)
    together, whole = first.compute(), measure(p, y)
    assert together.ece == whole.ece and together.adaptive_ece == whole.adaptive_ece
    assert together.nll == whole.nll and together.classwise_ece == whole.classwise_ece


@pytest.mark.parametrize(
    ("p", "y", "sentence"),
    [
        ([[1.2, -0.2]], [0], r"in \[0, 1\], got 1.2"),
        ([[math.nan, 1.0]], [0], r"in \[0, 1\], got nan"),
        ([[0.2, 0.2]], [0], "add up to 1, got 0.4"),
        ([[0.5, 0.5]], [2], r"labels must be integers in \[0, 2\)"),
        ([[0.5, 0.5]], [0.5], "labels must be integers"),
        ([0.5, 0.5], [0, 1], r"probabilities must be \(N, C\)"),
    ],
)
def test_bad_input(p, y, sentence):
    with pytest.raises(UserError, match=sentence):
        measure(p, y)


def test_bad_use():
    with pytest.raises(UserError, match="num_bins must be an integer of 1 or more, got 0"):
        ClassificationCalibration(0)
    metric = ClassificationCalibration()
    with pytest.raises(UserError, match="no samples yet"):
        metric.compute()
    metric.update([[0.5, 0.5]], [0])
    with pytest.raises(UserError, match="have 3 classes; those before had 2"):
        metric.update([[0.5, 0.25, 0.25]], [0])
