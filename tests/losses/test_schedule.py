"""The cyclical weight against the values of the paper's own schedule."""

import math

import pytest

from polyfocal.losses.schedule import cyclical_weight


def paper_epochs(epochs, factor):
    """xi per epoch by the published rule for e = 0, ..., E - 1, in integers where it counts."""
    weights = []
    for e in range(epochs):
        if factor * e < epochs:
            weights.append(1 - factor * e / (epochs - 1))
        elif factor == 1:
            weights.append(0.0)
        else:
            weights.append((factor * e / (epochs - 1) - 1) / (factor - 1))
    return weights


@pytest.mark.parametrize("epochs", [12, 30, 200])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_is_the_papers_schedule_at_its_epochs(epochs, factor):
    ours = [cyclical_weight(e / (epochs - 1), factor) for e in range(epochs)]
    assert ours == pytest.approx(paper_epochs(epochs, factor), abs=1e-12)


def test_values_worked_out_by_hand():
    # E = 12, f = 4: 1, 7/11, 3/11, then (4e/11 - 1)/3 = 1/33, 5/33, ..., 1
    values = [cyclical_weight(e / 11, 4) for e in range(12)]
    expected = [1, 7 / 11, 3 / 11] + [(4 * e - 11) / 33 for e in range(3, 12)]
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("factor", [1, 1.5, 2, math.pi, 4, 100])
def test_stays_in_0_to_1_for_any_progress(factor):
    for step in range(-50, 1051):
        assert 0 <= cyclical_weight(step / 1000, factor) <= 1
    assert cyclical_weight(-3.0, factor) == cyclical_weight(0.0, factor) == 1
    # a training of one epoch or one iteration has progress 0, and more than all is all
    assert cyclical_weight(7.0, factor) == cyclical_weight(1.0, factor) == (0 if factor == 1 else 1)


@pytest.mark.parametrize("factor", [0.5, -1, math.nan, math.inf])
def test_bad_factor(factor):
    with pytest.raises(ValueError, match="expected a finite number >= 1"):
        cyclical_weight(0.5, factor)


def test_bad_progress():
    with pytest.raises(ValueError, match="progress is NaN"):
        cyclical_weight(math.nan, 4)
