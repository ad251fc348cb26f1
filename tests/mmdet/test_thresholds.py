"""Score thresholds per class at a test: what is measured, what is drawn, what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from cells import cells
from mmdet.structures import DetDataSample
from mmengine.registry import HOOKS
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer
from prepared import prepare_experiment
from rich.console import Console

import polyfocal.mmdet  # noqa: F401
from polyfocal.calibration.thresholds import Thresholds
from polyfocal.errors import UserError
from polyfocal.mmdet.metrics import CocoMetric

CLASSES = ("cat", "dog", "cow")


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "thresholds.json"
    Thresholds(0.5, 0.3, {"cat": 0.65, "dog": 0.5}).save(place)
    return str(place)


def sample(boxes, labels, scores):
    instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        scores=torch.tensor(scores),
    )
    return DetDataSample(pred_instances=instances)


def test_the_metric_measures_at_them(tmp_path, file):
    """cat: 0.9 and 0.7 right of 2 objects, 0.6 is left out; dog: 0.8 right, 0.5 wrong of 1."""
    box, other, far = [0, 0, 10, 10], [30, 30, 50, 50], [50, 5, 60, 9]
    truth = {
        "images": [{"id": 0, "file_name": "a.png", "width": 64, "height": 64}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES)],
        "annotations": [
            {
                "id": n,
                "image_id": 0,
                "category_id": category,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for n, (category, (x0, y0, x1, y1)) in enumerate(
                [(0, box), (0, other), (1, [20, 0, 28, 9])], start=1
            )
        ],
    }
    annotations = tmp_path / "truth.json"
    annotations.write_text(json.dumps(truth))
    found = sample(
        [box, other, far, [20, 0, 28, 9], far, far],
        [0, 0, 0, 1, 1, 2],
        [0.9, 0.7, 0.6, 0.8, 0.5, 0.2],
    )
    found.set_metainfo(dict(img_id=0, ori_shape=(64, 64)))
    metric = CocoMetric(ann_file=str(annotations), thresholds=file)
    metric.dataset_meta = {"classes": CLASSES}
    metric.process({}, [found.to_dict()])
    numbers = metric.evaluate(size=1)
    assert numbers["coco/bbox_precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert numbers["coco/bbox_recall"] == 1
    assert numbers["coco/bbox_F1"] == pytest.approx((1 + 2 / 3) / 2)
    # AP is that of all detections, the cat of 0.6 among them.
    plain = CocoMetric(ann_file=str(annotations))
    plain.dataset_meta = {"classes": CLASSES}
    plain.process({}, [found.to_dict()])
    for name, value in plain.evaluate(size=1).items():
        assert numbers[name] == value
    assert {"coco/bbox_F1", "coco/bbox_recall"} < set(metric.names(CLASSES))
    console = Console(width=120)
    with console.capture() as shown:
        console.print(metric.table())
    assert "At the thresholds, IoU 0.5" in shown.get() and "0.650" in shown.get()


def test_what_is_drawn(tmp_path, file, monkeypatch):
    root = cells(tmp_path / "cells")
    Visualizer.get_instance("thresholds")
    drawn = []
    hook = HOOKS.build(
        dict(
            type="polyfocal.DrawAboveThresholdsHook",
            thresholds=file,
            draw=True,
            score_thr=0.9,
            test_out_dir="shown",
        )
    )
    hook._visualizer = SimpleNamespace(add_datasample=lambda *_, **kw: drawn.append(kw))
    found = sample([[0, 0, 9, 9]] * 4, [0, 0, 1, 2], [0.7, 0.6, 0.55, 0.31])
    found.set_metainfo(dict(img_path=str(root / "images" / "val" / "cell_0.png")))
    before = copy.deepcopy(found)
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        timestamp="now",
        iter=0,
        test_dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": CLASSES})),
    )
    runner.val_dataloader = runner.test_dataloader
    hook.after_test_iter(runner, 0, {}, [found])
    hook.after_val_iter(runner, 0, {}, [found])
    for call in drawn:
        kept = call["data_sample"].pred_instances
        assert kept.scores.tolist() == pytest.approx([0.7, 0.55, 0.31])
        assert call["pred_score_thr"] == 0
    assert len(drawn) == 2
    assert torch.equal(found.pred_instances.scores, before.pred_instances.scores)


def test_a_test_takes_the_file(tmp_path, file):
    root = cells(tmp_path / "cells")
    config = tmp_path / "config.py"
    config.write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n")
    experiment = prepare_experiment(config, data=root, train=False)
    experiment.draw_all("shown")
    experiment.use_thresholds(file)
    assert experiment.config.test_evaluator.thresholds == file
    drawing = experiment.config.default_hooks.visualization
    assert drawing.type == "polyfocal.DrawAboveThresholdsHook"
    assert (drawing.draw, drawing.test_out_dir) == (True, "shown")
    with pytest.raises(UserError, match="cannot be read|no such file|not there|No such file"):
        experiment.use_thresholds(str(tmp_path / "none.json"))
    experiment.config.test_evaluator = dict(type="DumpDetResults", out_file_path="a.pkl")
    with pytest.raises(UserError, match="no metric in the test_evaluator of .*config.py is"):
        experiment.use_thresholds(file)
