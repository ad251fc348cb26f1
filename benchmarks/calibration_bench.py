"""Time of the calibration numbers and of pycocotools' AP at COCO val2017's size, simulated."""

import contextlib
import io
import time
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polyfocal.calibration import DetectionCalibration

PICTURES, CATEGORIES, OBJECTS, DETECTIONS = 5000, 80, 36_000, 100  # detections of a picture
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


def main() -> None:
    """Measure both once."""
    content, results = simulate()
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        start = time.perf_counter()
        metric = DetectionCalibration()
        metric.update(truth, results)
        metric.compute()
        calibration = time.perf_counter() - start
        start = time.perf_counter()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        pycocotools = time.perf_counter() - start
    print(f"{len(results)} detections, {OBJECTS} objects in {PICTURES} pictures")
    print(f"calibration {calibration:.1f} s, pycocotools' AP {pycocotools:.1f} s")


if __name__ == "__main__":
    main()
