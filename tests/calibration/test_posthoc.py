"""Calibrators against scikit-learn's own regressions, and maps that are known."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from polyfocal.calibration import MatchedDetections, Matches
from polyfocal.calibration.posthoc import METHODS, Calibrator, fit
from polyfocal.errors import UserError


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def detections(seed=0, size=4000, temperature=2.0, offset=0.0, classes=("cat", "dog")):
    """Detections whose probability to be right is sigmoid(logit(score) / temperature + offset)."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.01, 0.99, size)
    right = rng.random(size) < sigmoid(np.log(score / (1 - score)) / temperature + offset)
    matches = Matches(np.where(right, 1.0, 0.0), np.zeros(size, dtype=bool))
    return MatchedDetections(
        names=classes,
        num_objects=np.full(len(classes), 1000),
        index=np.arange(size),
        score=score,
        label=rng.integers(0, len(classes), size),
        box=np.zeros((size, 4)),
        matches={0.1: matches, 0.5: matches},
    )


def test_temperature_is_found():
    # A logistic regression without offset or penalty is the same problem, solved otherwise.
    made = detections(temperature=2.0)
    calibrator = fit(made, "temperature", per_class=False)
    (temperature,) = calibrator.shared["temperature"]
    logit = np.log(made.score / (1 - made.score))[:, None]
    model = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit(
        logit, made.matches[0.1].right
    )
    assert temperature == pytest.approx(1 / model.coef_[0, 0], rel=1e-3)
    assert temperature == pytest.approx(2, rel=0.1) and not calibrator.classes


def test_platt_is_found():
    made = detections(temperature=2.0, offset=-1.0)
    shared = fit(made, "platt", "precision").shared
    logit = np.log(made.score / (1 - made.score))[:, None]
    model = LogisticRegression(C=1e12, tol=1e-10).fit(logit, made.matches[0.5].right)
    assert shared["slope"][0] == pytest.approx(model.coef_[0, 0], rel=1e-3)
    assert shared["offset"][0] == pytest.approx(model.intercept_[0], rel=1e-3)


def test_isotonic_is_scikit_learns_but_for_the_slope():
    made = detections(size=300)
    calibrator = fit(made, "isotonic", per_class=False)
    scores = np.linspace(0, 1, 57)
    model = IsotonicRegression(out_of_bounds="clip").fit(made.score, made.matches[0.1].iou)
    ours = calibrator.apply(scores, ["cat"] * 57)
    assert ours == pytest.approx(0.9999 * model.predict(scores) + 0.0001 * scores, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_rises_strictly_in_each_class_and_is_kept_in_a_file(method, tmp_path):
    made = detections(size=500)
    calibrator = fit(made, method)
    assert list(calibrator.classes) == ["cat", "dog"]
    scores = np.sort(np.random.default_rng(1).uniform(0.001, 0.999, 200))
    for name in ("cat", "dog", "unknown"):
        mapped = calibrator.apply(scores, [name] * 200)
        assert (np.diff(mapped) > 0).all() and mapped.min() >= 0 and mapped.max() <= 1
    mixed = calibrator.apply([0.3, 0.3, 0.3], ["cat", "dog", "unknown"])
    assert len(set(mixed)) == 3
    assert mixed[2] == calibrator.apply([0.3], ["other"])[0]

    calibrator.save(tmp_path / "calibrator.json")
    assert Calibrator.load(tmp_path / "calibrator.json") == calibrator
    assert [file.name for file in tmp_path.iterdir()] == ["calibrator.json"]


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_detections(method):
    # All wrong, all of one score, scores of 0 and 1: still a map that is finite and in [0, 1].
    for score in (np.full(50, 0.5), np.repeat([0.0, 1.0], 25)):
        made = detections(size=50)
        made = MatchedDetections(
            **{
                **vars(made),
                "score": score,
                "matches": {0.1: Matches(np.zeros(50), np.zeros(50, dtype=bool))},
            }
        )
        mapped = fit(made, method).apply([0, 0.25, 0.5, 1], ["cat"] * 4)
        assert np.isfinite(mapped).all() and mapped.min() >= 0 and mapped.max() <= 1
        assert (np.diff(mapped) >= 0).all()


def test_a_rare_class_takes_the_shared_map():
    made = detections(size=100)
    label = np.where(np.arange(100) < 9, 1, 0)
    calibrator = fit(MatchedDetections(**{**vars(made), "label": label}), "platt")
    assert list(calibrator.classes) == ["cat"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "is not a calibrator: it must hold"),
        ({"method": "magic"}, "has the method 'magic'"),
        ({"classes": None}, "must have an object 'classes', got None"),
        ({"shared": {"temperature": [math.inf]}}, "parameters for the shared map"),
        ({"shared": {"temperature": [-1.0]}}, "parameters for the shared map"),
        ({"classes": {"cat": {"slope": [1.0]}}}, "parameters for cat .* temperature"),
    ],
)
def test_bad_files(change, sentence, tmp_path):
    file = tmp_path / "c.json"
    fit(detections(size=50), "temperature").save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=sentence):
        Calibrator.load(file)


def test_scores_may_be_tensors():
    calibrator = fit(detections(), "platt")
    scores = torch.linspace(0, 1, 33)
    wanted = calibrator.apply(scores.numpy(), ["cat"] * 33)
    for given in (scores, scores.requires_grad_(), scores.to(torch.bfloat16), list(scores)):
        assert calibrator.apply(given, ["cat"] * 33) == pytest.approx(wanted)


def test_bad_use(tmp_path):
    with pytest.raises(UserError, match="at least 10 detections and one object"):
        fit(detections(size=3), "platt")
    with pytest.raises(UserError, match="method must be one of temperature, platt, isotonic"):
        fit(detections(size=50), "magic")
    calibrator = fit(detections(size=50), "platt")
    with pytest.raises(UserError, match=r"scores must be in \[0, 1\] to be calibrated, got 1.5"):
        calibrator.apply([1.5], ["cat"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        calibrator.save(tmp_path / "file" / "c.json")
