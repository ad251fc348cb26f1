"""The metric against MMDetection's own, which runs pycocotools in its own way."""

import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, METRICS
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer

import polyfocal.mmdet  # noqa: F401
from polyfocal.calibration.posthoc import Calibrator
from polyfocal.errors import UserError
from polyfocal.mmdet.metrics import CocoMetric, check_ground_truth, number_from_one

CLASSES = ("cat", "dog", "cow")
SIZE = 64


def box_mask(x, y, w, h):
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


@pytest.fixture
def ground_truth(tmp_path):
    """Four pictures of cats and dogs; no cow anywhere."""
    annotations = []
    for image in range(4):
        for category, (x, y, w, h) in ((7, (4, 6, 20, 16)), (9, (30, 20, 12, 30))):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [x + image, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [
                        [x + image, y, x + image + w, y, x + image + w, y + h, x + image, y + h]
                    ],
                }
            )
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(4)
        ],
        "annotations": annotations,
        "categories": [
            {"id": id_, "name": name} for id_, name in zip((7, 9, 11), CLASSES, strict=True)
        ],
    }
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    return str(file)


def predictions():
    """Right, shifted, doubled and mislabelled detections."""
    found = {
        0: [((4, 6, 20, 16), 0, 0.9), ((30, 20, 12, 30), 1, 0.8)],
        1: [((8, 6, 20, 16), 0, 0.7), ((31, 24, 12, 26), 1, 0.95), ((6, 7, 19, 15), 0, 0.6)],
        2: [((6, 6, 20, 16), 1, 0.5), ((50, 50, 10, 10), 2, 0.9)],
        3: [],
    }
    for image, objects in found.items():
        boxes = torch.tensor(
            [[x, y, x + w, y + h] for (x, y, w, h), _, _ in objects], dtype=torch.float32
        )
        yield {
            "img_id": image,
            "ori_shape": (SIZE, SIZE),
            "pred_instances": {
                "bboxes": boxes.reshape(-1, 4),
                "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.long),
                "scores": torch.tensor([score for _, _, score in objects]),
                "masks": torch.from_numpy(
                    np.array([box_mask(*box) for box, _, _ in objects]).reshape(-1, SIZE, SIZE)
                ),
            },
        }


def evaluate(metric):
    metric.dataset_meta = {"classes": CLASSES}
    metric.process({}, list(predictions()))
    return metric.evaluate(size=4)


def test_agrees_with_mmdetections(ground_truth):
    kinds = ["bbox", "segm"]
    ours = evaluate(CocoMetric(ann_file=ground_truth, metric=kinds))
    stock = evaluate(MMDetCocoMetric(ann_file=ground_truth, metric=kinds))
    assert set(stock) < set(ours)
    for name, value in stock.items():
        assert ours[name] == pytest.approx(value, abs=6e-4), name  # MMDetection rounds to 3 digits
    assert 0.2 < ours["coco/bbox_mAP"] < 0.8 and ours["coco/bbox_mAP_l"] == -1
    assert {f"coco/{kind}_AR@{limit}" for kind in kinds for limit in (1, 10, 100)} < set(ours)
    # At 10 thresholds and in 4 pictures, with one detection of a class in each: a cat is found
    # exactly and one with IoU 17/23, above 5 thresholds; a dog exactly and one with 26/30, above 8.
    assert ours["coco/bbox_AR@1"] == pytest.approx(((10 + 5) / 40 + (10 + 8) / 40) / 2)


def test_results_by_class(ground_truth):
    metric = CocoMetric(ann_file=ground_truth, metric="bbox", classwise=True)
    numbers = evaluate(metric)
    result = metric.coco_results["bbox"]
    assert list(result.per_class) == list(CLASSES)
    assert np.isnan(result.per_class["cow"]) and numbers["coco/bbox_cow_precision"] == -1
    assert numbers["coco/bbox_cat_precision"] == result.per_class["cat"] > 0
    assert result.stats["mAP"] == numbers["coco/bbox_mAP"]


def test_is_built_by_its_name(ground_truth):

    metric = METRICS.build(dict(type="polyfocal.CocoMetric", ann_file=ground_truth, max_dets=300))
    assert isinstance(metric, CocoMetric) and "coco/bbox_AR@300" in evaluate(metric)


def test_only_writes_the_results(ground_truth, tmp_path):
    prefix = str(tmp_path / "out")
    assert not evaluate(CocoMetric(ann_file=ground_truth, format_only=True, outfile_prefix=prefix))
    boxes = json.loads((tmp_path / "out.bbox.json").read_text())
    assert [box["category_id"] for box in boxes] == [7, 9, 7, 9, 7, 9, 11]
    assert boxes[1]["bbox"] == [30, 20, 12, 30]


def test_masks_that_are_not_there(ground_truth):
    metric = CocoMetric(ann_file=ground_truth, metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": CLASSES}
    samples = list(predictions())
    for sample in samples:
        del sample["pred_instances"]["masks"]
    metric.process({}, samples)
    with pytest.raises(UserError, match="predicts no masks, so 'segm' cannot be evaluated"):
        metric.evaluate(size=4)


def test_calibration_beside_average_precision(ground_truth, tmp_path):
    MessageHub.get_instance("calibration")  # at iteration 0, whatever was trained before
    visualizer = Visualizer.get_instance(
        "calibration", vis_backends=[dict(type="LocalVisBackend")], save_dir=str(tmp_path)
    )
    kinds = ["bbox", "segm"]
    metric = METRICS.build(
        dict(type="polyfocal.CalibrationMetric", ann_file=ground_truth, metric=kinds)
    )
    ours = evaluate(metric)
    plain = evaluate(CocoMetric(ann_file=ground_truth, metric=kinds))
    added = {"D-ECE", "D-ECE_box", "LaECE", "LaECE_0", "LaACE_0", "LRP", "oLRP"}
    assert set(ours) == set(plain) | {f"coco/{kind}_{name}" for kind in kinds for name in added}
    assert {name: ours[name] for name in plain} == plain
    assert metric.coco_results["segm"].stats["LaECE"] == ours["coco/segm_LaECE"]
    # Of cats, 4 objects: right at IoU 0.5 are the exact one (score 0.9) and the better of two for
    # one object (0.7, IoU 17/23); the other (0.6) is wrong, and two are missed.
    location = (1 - 17 / 23) / 0.5
    assert metric.calibration["bbox"].classes["cat"].lrp == pytest.approx((location + 1 + 2) / 5)
    drawn = {file.name for file in tmp_path.rglob("*.png")}
    assert {f"{kind}_reliability_by_class_0.png" for kind in kinds} < drawn
    assert len(drawn) == 4 and visualizer is Visualizer.get_current_instance()


def test_scores_are_calibrated_before_they_are_measured(tmp_path):
    sure = Calibrator("platt", "iou", {"slope": [1.0], "offset": [0.0]})
    unsure = {"slope": [1.0], "offset": [-2.0]}
    Calibrator("platt", "iou", sure.shared, {"dog": unsure}).save(tmp_path / "c.json")

    class Detector(torch.nn.Module):
        def test_step(self, data):
            instances = InstanceData(
                labels=torch.tensor([0, 1]),
                scores=torch.tensor([0.5, 0.5]),
                bboxes=torch.ones(2, 4),
            )
            return [DetDataSample(pred_instances=instances)] * data

        val_step = test_step

    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": CLASSES}))
    runner = SimpleNamespace(model=Detector(), val_dataloader=loader, test_dataloader=loader)
    hook = HOOKS.build(dict(type="polyfocal.CalibrateScoresHook", file=str(tmp_path / "c.json")))
    for name in ("val", "test"):
        step = f"{name}_step"
        getattr(hook, f"before_{name}")(runner)
        (sample,) = getattr(runner.model, step)(1)
        assert sample.pred_instances.scores.dtype == torch.float32
        assert sample.pred_instances.scores.tolist() == pytest.approx([0.5, 1 / (1 + np.exp(2))])
        getattr(hook, f"after_{name}")(runner)
        (sample,) = getattr(runner.model, step)(1)
        assert sample.pred_instances.scores.tolist() == [0.5, 0.5]


def from_samples(ground_truth):
    """The same predictions, with the ground truth as MMDetection's samples carry it."""
    content = json.loads(Path(ground_truth).read_text())
    labels = {7: 0, 9: 1, 11: 2}
    for sample in predictions():
        sample["instances"] = [
            {
                "bbox": [x, y, x + w, y + h],
                "bbox_label": labels[one["category_id"]],
                "ignore_flag": one["iscrowd"],
                "mask": one["segmentation"],
            }
            for one in content["annotations"]
            if one["image_id"] == sample["img_id"]
            for x, y, w, h in [one["bbox"]]
        ]
        yield sample


@pytest.mark.parametrize("kind", ["CocoMetric", "CalibrationMetric"])
def test_ground_truth_from_the_samples(ground_truth, kind, monkeypatch):
    """As from the file, and as MMDetection's own; perfect detections give 1. Outside of a run."""
    monkeypatch.setattr(Visualizer, "_instance_dict", OrderedDict())
    kinds = ["bbox", "segm"]
    numbers = []
    for made in (
        METRICS.build(dict(type=f"polyfocal.{kind}", metric=kinds)),
        METRICS.build(dict(type=f"polyfocal.{kind}", metric=kinds, ann_file=ground_truth)),
        MMDetCocoMetric(metric=kinds),
    ):
        made.dataset_meta = {"classes": CLASSES}
        made.process({}, list(from_samples(ground_truth)))
        numbers.append(made.evaluate(size=4))
    ours, file, stock = numbers
    assert ours == pytest.approx(file, nan_ok=True)
    for name, value in stock.items():
        assert ours[name] == pytest.approx(value, abs=6e-4), name
    perfect = METRICS.build(dict(type=f"polyfocal.{kind}"))
    perfect.dataset_meta = {"classes": CLASSES}
    samples = list(from_samples(ground_truth))
    for sample in samples:
        objects = sample["instances"]
        sample["pred_instances"] = {
            "bboxes": torch.tensor([one["bbox"] for one in objects], dtype=torch.float32),
            "labels": torch.tensor([one["bbox_label"] for one in objects]),
            "scores": torch.ones(len(objects)),
        }
    perfect.process({}, samples)
    assert perfect.evaluate(size=4)["coco/bbox_mAP"] == pytest.approx(1)


def test_no_ground_truth_anywhere_is_said_before_training(ground_truth):
    metric = CocoMetric()
    metric.dataset_meta = {"classes": CLASSES}
    with pytest.raises(UserError, match="no ann_file and the samples bring no ground truth"):
        metric.process({}, list(predictions()))
    for with_truth in (True, False):
        sample = DetDataSample(metainfo={"instances": []} if with_truth else {})
        dataset = [{"data_samples": sample}]
        check_ground_truth([CocoMetric(ann_file=ground_truth)], dataset)
        if with_truth:
            check_ground_truth([metric, MMDetCocoMetric()], dataset)
            continue
        for one in (metric, MMDetCocoMetric()):
            with pytest.raises(UserError, match="add 'instances' to the meta_keys"):
                check_ground_truth([one], dataset)


def test_names_of_the_numbers_are_known_before(ground_truth):
    for kind in ("CocoMetric", "CalibrationMetric"):
        settings = dict(ann_file=ground_truth, metric=["bbox", "segm"], classwise=True)
        metric = METRICS.build(dict(type=f"polyfocal.{kind}", **settings, max_dets=50, prefix="p"))
        names = metric.names(CLASSES)
        assert not getattr(metric, "calibration", None), "nothing is measured yet"
        assert set(names) == set(evaluate(metric))


def test_ids_that_begin_at_0_in_mmdetections_own_metric(tmp_path):
    """One object found exactly: AP 1, and not 0 since pycocotools takes the id 0 for no match."""
    content = {
        "images": [{"id": 0, "file_name": "0.png", "width": SIZE, "height": SIZE}],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 0, "bbox": [4, 6, 20, 16], "area": 320}
            | {"iscrowd": 0}
        ],
        "categories": [{"id": 0, "name": "cat"}],
    }
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    found = []
    for mended in (False, True):
        metric = MMDetCocoMetric(ann_file=str(file))
        if mended:
            number_from_one(metric._coco_api)
        metric.dataset_meta = {"classes": ("cat",)}
        metric.process({}, list(predictions())[:1])
        metric.results[0][1].update(
            bboxes=np.array([[4.0, 6, 24, 22]]), labels=np.array([0]), scores=np.array([0.9])
        )
        found.append(metric.evaluate(size=1)["coco/bbox_mAP"])
    assert found == [0, 1]
