"""Time of calibration, mistakes, intervals and AP at COCO val2017's size, simulated.

AP by pycocotools, and by faster-coco-eval if it is installed.
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polyfocal.calibration import DetectionCalibration
from polyfocal.calibration.tide import mistakes
from polyfocal.data import evaluation
from polyfocal.data.detections import Detections
from polyfocal.experiments.intervals import ap_intervals

PICTURES, CATEGORIES, OBJECTS, DETECTIONS = 5000, 80, 36_781, 100  # detections of a picture
NEAR = 0.7  # part of the detections that lie near an object and have its category


def simulate() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, PICTURES, OBJECTS)
    category = rng.zipf(1.5, OBJECTS) % CATEGORIES
    box = np.column_stack(
        [rng.uniform(0, (500, 350), (OBJECTS, 2)), np.exp(rng.uniform(2.3, 5.4, (OBJECTS, 2)))]
    )
    truth = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(PICTURES)
        ],
        "categories": [{"id": c, "name": str(c)} for c in range(CATEGORIES)],
        "annotations": [
            {
                "id": k + 1,
                "image_id": int(picture[k]),
                "category_id": int(category[k]),
                "bbox": box[k].tolist(),
                "area": float(box[k, 2] * box[k, 3]),
                "iscrowd": int(rng.random() < 0.01),
            }
            for k in range(OBJECTS)
        ],
    }
    results = []
    for i in range(PICTURES):
        here = np.flatnonzero(picture == i)
        for _ in range(DETECTIONS):
            if len(here) and rng.random() < NEAR:
                k = rng.choice(here)
                found, label = box[k] * np.exp(rng.normal(0, 0.2, 4)), int(category[k])
            else:
                found = np.array([*rng.uniform(0, (500, 350)), 50, 50])
                label = int(rng.integers(CATEGORIES))
            results.append(
                {
                    "image_id": i,
                    "category_id": label,
                    "bbox": found.tolist(),
                    "score": float(rng.beta(1, 4)),
                }
            )
    return truth, results


def timed(what: str, measure: Callable[[], Any]) -> Any:
    """What a function returns, with its time on the console."""
    start = time.perf_counter()
    found = measure()
    print(f"{what} {time.perf_counter() - start:.1f} s")
    return found


def main() -> None:
    """Measure each once."""
    content, results = simulate()
    truth = COCO()
    truth.dataset = content
    print(f"{len(results)} detections, {OBJECTS} objects in {PICTURES} pictures")

    def calibrate() -> None:
        metric = DetectionCalibration()
        metric.update(truth, results)
        metric.compute()

    timed("calibration", calibrate)
    timed("mistakes", lambda: mistakes(truth, results))
    detections = Detections("the results", results)
    timed("intervals of 1000 draws", lambda: ap_intervals(truth, [detections]))
    print(f"most memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    fastest = evaluation._evaluator()
    found = timed(f"AP by {fastest[1].__name__}", lambda: evaluation.evaluate(truth, results))
    if fastest[1] is not COCOeval:
        evaluation._evaluator = lambda: (COCO, COCOeval)
        slow = timed("AP by COCOeval", lambda: evaluation.evaluate(truth, results))
        print(f"mAP {found.stats['mAP']!r} and {slow.stats['mAP']!r}")


if __name__ == "__main__":
    main()
