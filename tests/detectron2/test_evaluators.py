"""The evaluators on detections that are known."""

import json

import pytest

pytest.importorskip("detectron2_models")

import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2_models import CONFIGS

from polyfocal.coco import load_split
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.detectron2 import CalibrationEvaluator
from polyfocal.detectron2.data import CocoEvaluator, register_split
from polyfocal.detectron2.experiment import Data
from polyfocal.detectron2.lazy_experiment import LazyExperiment


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    settings = DigitScenes(num_train=1, num_val=3, size=64, digits=(2, 3), digit_size=(20, 40))
    folder = write_digit_scenes(tmp_path_factory.mktemp("data") / "digits", settings)
    return load_split(folder, "val")


def run(evaluator, split):
    """Every object is found exactly, with the score 0.8."""
    labels = {id_: label for label, id_ in enumerate(split.category_ids)}
    content = json.loads(split.annotation_file.read_text())
    DatasetCatalog.get(evaluator.dataset_name)  # fills in the metadata
    assert MetadataCatalog.get(evaluator.dataset_name).thing_dataset_id_to_contiguous_id == labels
    evaluator.reset()
    for image in content["images"]:
        objects = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        found = Instances((image["height"], image["width"]))
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(boxes)
        found.pred_classes = torch.tensor([labels[one["category_id"]] for one in objects])
        found.scores = torch.full((len(objects),), 0.8)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


def test_calibration_beside_average_precision(split, tmp_path):
    name = register_split(split)
    evaluator = CalibrationEvaluator(name, output_dir=str(tmp_path / "out"))
    numbers = run(evaluator, split)
    plain = run(CocoEvaluator(name), split)
    assert {key: numbers[key] for key in plain} == pytest.approx(plain, nan_ok=True)
    # In percent: all are right and as good as can be, and claim 80.
    for key in ("D-ECE", "D-ECE_box", "LaECE", "LaECE_0", "LaACE_0"):
        assert numbers[key] == pytest.approx(20, abs=1e-4)
    assert numbers["LRP"] == numbers["oLRP"] == pytest.approx(0, abs=1e-4)
    assert evaluator.coco_results["bbox"].stats["D-ECE"] == evaluator.calibration["bbox"].d_ece
    drawn = {file.name for file in (tmp_path / "out").iterdir()}
    assert drawn == {"bbox_reliability.png", "bbox_reliability_by_class.png"}


def test_calibration_stays_asked_for(split):
    experiment = LazyExperiment(CONFIGS / "retinanet_poly1.py")
    experiment.cfg.dataloader.evaluator = L(CalibrationEvaluator)(dataset_name="x", iou=0.75)
    name = register_split(split)
    data = Data(train="", val=name, num_train=0, num_classes=10, max_dets=300)
    experiment.use_data(data)
    ((_, (evaluator,)),) = experiment.build_evaluations().values()
    assert isinstance(evaluator, CalibrationEvaluator)
    assert (evaluator.dataset_name, evaluator.max_dets, evaluator.iou) == (name, 300, 0.75)
