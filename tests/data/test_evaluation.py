"""faster-coco-eval against pycocotools, on random sets."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polyfocal.data import evaluation
from polyfocal.data.annotations import Annotations, annotations_of
from polyfocal.data.evaluation import CocoResult, evaluate

SIDE = 200


def rle(box: list[float]) -> dict:
    x, y, width, height = (round(value) for value in box)
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[max(y, 0) : y + max(height, 1), max(x, 0) : x + max(width, 1)] = 1
    made = coco_mask.encode(mask)
    return {**made, "counts": made["counts"].decode()}


def random_set(
    seed: int, pictures: int = 12, categories: int = 4
) -> tuple[Annotations, list[dict]]:
    """Objects of all sizes, crowds, polygons; detections near and far, some inside out; ties."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:pictures].tolist()
    names = [{"id": int(id_), "name": f"c{id_}"} for id_ in rng.permutation(90)[:categories]]
    annotations, found = [], []
    for _ in range(int(rng.integers(20, 120))):
        size = np.exp(rng.uniform(1, 5, 2))  # 3 to 148 pixels
        box = [*rng.uniform(0, SIDE - size).tolist(), *size.tolist()]
        x, y, width, height = box
        polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
        one = {
            "image_id": ids[rng.integers(pictures)],
            # Without an object of the last category: its numbers are none.
            "category_id": names[rng.integers(categories - 1)]["id"],
            "bbox": box,
        }
        crowd = int(rng.random() < 0.15)
        annotations.append(
            {
                **one,
                "id": len(annotations),
                "area": width * height * rng.uniform(0.5, 1),
                "iscrowd": crowd,
                "segmentation": rle(box) if crowd or rng.random() < 0.5 else [polygon],
            }
        )
        for _ in range(int(rng.integers(0, 5))):
            moved = (np.array(box) + rng.normal(0, 3, 4)).tolist()
            if rng.random() > 0.05:
                moved[2:] = [max(value, 0.5) for value in moved[2:]]
            other = (
                names[rng.integers(categories)]["id"] if rng.random() < 0.2 else one["category_id"]
            )
            found.append(
                {
                    "image_id": one["image_id"],
                    "category_id": other,
                    "bbox": moved,
                    "segmentation": rle([*moved[:2], *map(abs, moved[2:])]),
                    "score": float(rng.integers(1, 12)) / 12,
                }
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": id_, "width": SIDE, "height": SIDE} for id_ in ids],
        "annotations": annotations,
        "categories": names,
    }
    return annotations_of(coco), found


def with_pycocotools(monkeypatch: pytest.MonkeyPatch, *args: object) -> CocoResult:
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_evaluator", lambda: (COCO, COCOeval))
        return evaluate(*args)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("max_dets", [10, 100, 300])
@pytest.mark.parametrize("seed", range(5))
def test_the_faster_evaluation_has_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, seed: int, max_dets: int, iou_type: str
) -> None:
    pytest.importorskip("faster_coco_eval")
    # One picture has more than 10 detections of a category.
    truth, found = random_set(seed, pictures=2 if max_dets == 10 else 12)
    assert evaluation._evaluator()[1] is not COCOeval
    kept = [category["id"] for category in truth.categories][:2] if seed == 4 else None
    for detections in (found, []):
        fast = evaluate(truth, detections, iou_type, max_dets, kept)
        slow = with_pycocotools(monkeypatch, truth, detections, iou_type, max_dets, kept)
        assert fast.stats == pytest.approx(slow.stats, abs=1e-12, nan_ok=True)
        assert fast.per_class == pytest.approx(slow.per_class, abs=1e-12, nan_ok=True)
        np.testing.assert_allclose(fast.precision, slow.precision, atol=1e-12)
        assert detections == [] or 0.01 < slow.stats["mAP"] < 0.98
