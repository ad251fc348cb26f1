"""Post-hoc calibration: a map from a detector's scores to better scores, fitted on a split.

A calibrator is fitted on scores and on what they should have been, and kept as JSON beside the
checkpoint. All maps rise strictly. So the order within a class stays as it was, and AP with it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from polyfocal.calibration.classification import Floats, as_array, in_unit_interval
from polyfocal.calibration.detection import LAECE_IOU, MatchedDetections
from polyfocal.data.annotations import Annotations
from polyfocal.data.detections import Detections
from polyfocal.data.files import read_json, write_text
from polyfocal.errors import UserError

Method = Literal["temperature", "platt", "isotonic"]
Target = Literal["iou", "precision"]
METHODS, TARGETS = get_args(Method), get_args(Target)

_FORMAT = "polyfocal calibrator 1"
CLIP = 1e-6  # scores of 0 and 1 have no finite logit
SLOPE = 1e-4  # of the line that is mixed into an isotonic map, so that it rises strictly
_FEWEST = 10  # detections that a class needs for its own map

Parameters = dict[str, list[float]]


@dataclass(frozen=True)
class Calibrator:
    """A fitted map of scores.

    - ``temperature``: sigmoid(logit(s) / T).
    - ``platt``: sigmoid(a logit(s) + b), a > 0.
    - ``isotonic``: the non-decreasing step map of least squares, joined by lines, with 1e-4 of the
      identity mixed in.

    Attributes:
        method: One of the three.
        target: What scores should be: ``"iou"``, the IoU with the object that was found (0 if
            none of IoU >= 0.1 was), or ``"precision"``, the probability to be right.
        shared: The parameters for all classes together.
        classes: The parameters of each class by its name; other classes take the shared ones.
    """

    method: str
    target: str
    shared: Parameters
    classes: dict[str, Parameters] = field(default_factory=dict)

    def apply(self, scores: ArrayLike, classes: Sequence[str]) -> Floats:
        """Calibrated scores.

        Args:
            scores: (N,) in [0, 1], an array or a torch tensor.
            classes: Name of the class of each score.

        Returns:
            (N,) float64 in [0, 1].

        Raises:
            UserError: A score is not in [0, 1].
        """
        given = as_array(scores).astype(np.float64).reshape(-1)
        s = in_unit_interval(given)
        if s is None:
            bad = given[~((given >= 0) & (given <= 1))][0]
            raise UserError(f"scores must be in [0, 1] to be calibrated, got {bad}.")
        calibrated = np.empty_like(s)
        names = np.asarray(classes, dtype=object)
        for name in set(classes):
            rows = names == name
            calibrated[rows] = _MAPS[self.method](s[rows], self.classes.get(name, self.shared))
        return calibrated

    def apply_to(self, results: Detections, truth: Annotations) -> Detections:
        """Measured detections with new scores, and everything else that they had.

        Args:
            results: Results that fit the ground truth.
            truth: Names the classes.
        """
        names = {category["id"]: category["name"] for category in truth.categories}
        entries = results.entries
        scores = self.apply(
            [one["score"] for one in entries], [names[one["category_id"]] for one in entries]
        )
        calibrated = zip(entries, scores.tolist(), strict=True)
        return Detections(results.source, [{**one, "score": score} for one, score in calibrated])

    def save(self, file: str | Path) -> None:
        """Write the calibrator as JSON.

        Raises:
            UserError: The file cannot be written.
        """
        content = {
            "format": _FORMAT,
            "method": self.method,
            "target": self.target,
            "shared": self.shared,
            "classes": self.classes,
        }
        write_text(file, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "Calibrator":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: The file is not a calibrator.
        """
        content = read_json(Path(file))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(
                f"{file} is not a calibrator: it must hold a JSON object with the format "
                f"{_FORMAT!r}, as polyfocal calibration --save writes it."
            )
        method: Any = content.get("method")
        target: Any = content.get("target")
        if method not in METHODS or target not in TARGETS:
            raise UserError(
                f"{file} has the method {method!r} and the target {target!r}; they must be among "
                f"{', '.join(METHODS)} and {', '.join(TARGETS)}."
            )
        shared: Any = content.get("shared")
        classes = content.get("classes")
        if not isinstance(classes, dict):
            raise UserError(f"{file} must have an object 'classes', got {classes!r}.")
        for name, parameters in {"the shared map": shared, **classes}.items():
            if not _fits(method, parameters):
                raise UserError(
                    f"{file} has parameters for {name} that the method {method} cannot use: they "
                    f"must be lists of finite numbers {', '.join(_KEYS[method])}."
                )
        return cls(method, target, shared, classes)


def fit(
    matched: MatchedDetections,
    method: Method,
    target: Target = "iou",
    iou: float = 0.5,
    per_class: bool = True,
) -> Calibrator:
    """Fit a calibrator to detections.

    Temperature and Platt minimise the cross-entropy of the target, isotonic the squared error.

    Args:
        matched: From :func:`polyfocal.calibration.match` at the thresholds 0.1 and ``iou``.
        method: Kind of the map.
        target: ``"iou"`` is what LaECE asks for, ``"precision"`` what D-ECE asks for.
        iou: IoU from which on a detection is right for the target ``"precision"``.
        per_class: One map per class with at least 10 detections and an object, beside the shared
            map.

    Raises:
        UserError: There is nothing to fit to, or there is no such method or target.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if target not in TARGETS:
        raise UserError(f"target must be one of {', '.join(TARGETS)}, got {target!r}.")
    matches = matched.matches[LAECE_IOU if target == "iou" else iou]
    kept = ~matches.ignored
    score, label = matched.score[kept], matched.label[kept]
    wanted = matches.iou[kept] if target == "iou" else matches.right[kept].astype(np.float64)
    if score.size < _FEWEST or not matched.num_objects.any():
        raise UserError(
            f"a calibrator needs at least {_FEWEST} detections and one object to be fitted to, got "
            f"{score.size} and {matched.num_objects.sum()}."
        )
    classes = {}
    for number, name in enumerate(matched.names if per_class else ()):
        rows = label == number
        if rows.sum() >= _FEWEST and matched.num_objects[number]:
            classes[name] = _FITS[method](score[rows], wanted[rows])
    return Calibrator(method, target, _FITS[method](score, wanted), classes)


def _logit(scores: Floats) -> Floats:
    clipped = np.clip(scores, CLIP, 1 - CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logits))


def _fit_logistic(scores: Floats, targets: Floats, *, offset: bool) -> tuple[float, float]:
    """Slope and offset of the least cross-entropy, which is convex in them."""
    x = _logit(scores)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        z = parameters[0] * x + parameters[1]
        slope = (_sigmoid(z) - targets) / len(x)
        value = float((np.logaddexp(0, z) - targets * z).mean())
        return value, np.array([slope @ x, slope.sum() * offset])

    limit = 100.0 if offset else 0.0
    # The slope is kept away from 0, where the map would no longer rise, and from infinity.
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=[(1e-2, 1e2), (-limit, limit)])
    return float(found.x[0]), float(found.x[1])


def _fit_temperature(scores: Floats, targets: Floats) -> Parameters:
    return {"temperature": [1 / _fit_logistic(scores, targets, offset=False)[0]]}


def _fit_platt(scores: Floats, targets: Floats) -> Parameters:
    slope, offset = _fit_logistic(scores, targets, offset=True)
    return {"slope": [slope], "offset": [offset]}


def _fit_isotonic(scores: Floats, targets: Floats) -> Parameters:
    from sklearn.isotonic import IsotonicRegression

    regression = IsotonicRegression(y_min=0, y_max=1).fit(scores, targets)
    return {"x": regression.X_thresholds_.tolist(), "y": regression.y_thresholds_.tolist()}


def _temperature(scores: Floats, parameters: Parameters) -> Floats:
    return _sigmoid(_logit(scores) / parameters["temperature"][0])


def _platt(scores: Floats, parameters: Parameters) -> Floats:
    return _sigmoid(parameters["slope"][0] * _logit(scores) + parameters["offset"][0])


def _isotonic(scores: Floats, parameters: Parameters) -> Floats:
    mapped = np.interp(scores, parameters["x"], parameters["y"])
    return (1 - SLOPE) * mapped + SLOPE * scores


_FITS = {"temperature": _fit_temperature, "platt": _fit_platt, "isotonic": _fit_isotonic}
_MAPS = {"temperature": _temperature, "platt": _platt, "isotonic": _isotonic}
_KEYS = {"temperature": ("temperature",), "platt": ("slope", "offset"), "isotonic": ("x", "y")}


def _fits(method: str, parameters: Any) -> bool:
    if not isinstance(parameters, dict) or set(parameters) != set(_KEYS[method]):
        return False
    lists = [parameters[key] for key in _KEYS[method]]
    if not all(isinstance(values, list) and values for values in lists):
        return False
    if not all(_is_number(value) for values in lists for value in values):
        return False
    if method == "isotonic":
        x, y = lists
        return len(x) == len(y) and _rises(x) and _rises(y) and y[0] >= 0 and y[-1] <= 1
    return all(len(values) == 1 for values in lists) and lists[0][0] > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value))


def _rises(values: Iterable[float]) -> bool:
    return bool((np.diff(np.array(list(values))) >= 0).all())
