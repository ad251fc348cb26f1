"""Two processes over gloo against one process with the whole batch or all the pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import numpy as np
import torch
from mmdet.testing import demo_mm_inputs
from mmdet_models import tiny_model
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

import polyfocal.mmdet  # noqa: F401
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.mmdet.metrics import CalibrationMetric, CocoMetric

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# Heads that reduce the number of positives over the processes, as most of MMDetection's do.
HEADS = {
    "fcos": dict(type="CyclicalFocalLoss", use_sigmoid=True, loss_weight=1.0),
    "atss": dict(type="Poly1FocalLoss", epsilon=1.0, use_sigmoid=True, loss_weight=1.0),
}
CLASSES = ("cat", "dog", "cow")
PICTURES = 5  # an odd number: one process gets a picture twice
SIZE = 64


def pictures(model, indices):
    """Some of four pictures with 4, 0, 3 and 1 objects, prepared as the model wants them."""
    torch.manual_seed(1)
    data = demo_mm_inputs(4, [[3, 96, 96]] * 4, num_classes=3, num_items=[4, 0, 3, 1])
    data = {name: [values[i] for i in indices] for name, values in data.items()}
    return model.data_preprocessor(data, training=True)


def gradients(model, loss):
    """The gradient of each parameter after a step on the model's losses."""
    sum(sum(v) if isinstance(v, list) else v for k, v in loss.items() if "loss" in k).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def head_of_two(name):
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = tiny_model(name, HEADS[name])
    model.train()
    if name == "fcos":
        model.bbox_head.loss_cls.set_progress(0.6)
    return model


def write_truth(file):
    """Two to four objects in each picture."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in range(PICTURES):
        for _ in range(rng.integers(2, 5)):
            x, y, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(8, 30, 2)))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=int(rng.integers(1, 4)),
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                )
            )
    images = [dict(id=i, file_name=f"{i}.png", width=SIZE, height=SIZE) for i in range(PICTURES)]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    Path(file).write_text(json.dumps(content))


def predictions(file):
    """For each picture its objects moved a little, some with another label, and some boxes more."""
    rng = np.random.default_rng(1)
    truth = json.loads(Path(file).read_text())
    for image in range(PICTURES):
        boxes = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image]
        labels = [a["category_id"] - 1 for a in truth["annotations"] if a["image_id"] == image]
        boxes = np.array([*boxes, *rng.integers(5, 30, (4, 4))], dtype=float)
        boxes = boxes + rng.normal(0, 1.5, boxes.shape)
        labels = np.array([*labels, *rng.integers(0, 3, 4)])
        boxes[:, 2:] += boxes[:, :2]
        yield dict(
            img_id=image,
            ori_shape=(SIZE, SIZE),
            pred_instances=dict(
                bboxes=torch.from_numpy(boxes).float(),
                labels=torch.from_numpy(labels),
                scores=torch.from_numpy(rng.uniform(size=len(boxes))),
            ),
        )


def measure(file, kind, indices):
    """The numbers of a metric that is given some of the pictures' predictions."""
    metric = kind(ann_file=str(file), metric="bbox")
    metric.dataset_meta = {"classes": CLASSES}
    found = list(predictions(file))
    for index in indices:
        metric.process({}, [found[index]])
    return metric.evaluate(size=PICTURES)


SCRIPT = """
import sys
sys.path[:0] = [{helpers!r}, {here!r}]
import torch
torch.cuda.set_device = lambda device: None  # MMEngine's launcher calls it whatever the backend
from mmengine.dist import get_rank, init_dist
from mmengine.model import MMDistributedDataParallel
from mmengine.visualization import Visualizer
from prepared import prepare_experiment
from polyfocal.mmengine.runs import train
from test_distributed import *

init_dist("pytorch", backend="gloo")
rank = get_rank()
result = {{}}
for name in HEADS:
    model = MMDistributedDataParallel(head_of_two(name), find_unused_parameters=True)
    data = pictures(model.module, [2 * rank, 2 * rank + 1])
    loss = model(data["inputs"], data["data_samples"], mode="loss")
    result[name] = gradients(model.module, loss)
Visualizer.get_instance("test")
for kind in (CocoMetric, CalibrationMetric):
    indices = [i % PICTURES for i in range(rank, PICTURES + 1, 2)]
    result[kind.__name__] = measure({truth!r}, kind, indices)

experiment = prepare_experiment(
    {config!r}, data={scenes!r}, profile="tiny", options={{"train_cfg.max_epochs": 1}}
)
cfg = experiment.config
cfg.update(launcher="pytorch", work_dir={work!r}, randomness=dict(seed=0))
cfg.env_cfg.dist_cfg = dict(backend="gloo")
cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)
for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
result["train"] = train(experiment)
torch.save(result, {work!r} + f"_{{rank}}.pth")
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of the two processes found, and the annotation file."""
    place = tmp_path_factory.mktemp("two")
    truth = place / "truth.json"
    write_truth(truth)
    settings = DigitScenes(num_train=8, num_val=3, size=64, digits=(1, 2), digit_size=(20, 40))
    scenes = write_digit_scenes(place / "scenes", settings)
    script = place / "two.py"
    script.write_text(
        SCRIPT.format(
            helpers=str(TESTS / "helpers"),
            here=str(TESTS / "mmdet"),
            truth=str(truth),
            config=str(ROOT / "configs" / "retinanet_poly1.py"),
            scenes=str(scenes),
            work=str(place / "work"),
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)],
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return truth, [torch.load(place / f"work_{rank}.pth") for rank in (0, 1)]


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_those_of_the_whole_batch(two, name):
    model = head_of_two(name)
    data = pictures(model, range(4))
    whole = gradients(model, model.loss(data["inputs"], data["data_samples"]))
    _, (first, second) = two
    assert first[name].keys() == whole.keys()
    largest = max(gradient.abs().max() for gradient in whole.values())
    for key, gradient in whole.items():
        assert torch.equal(first[name][key], second[name][key])
        torch.testing.assert_close(
            first[name][key], gradient, rtol=1e-3, atol=1e-5 * largest.item(), msg=key
        )
    assert largest > 0


@pytest.mark.parametrize("kind", [CocoMetric, CalibrationMetric])
def test_metrics_are_those_of_all_pictures(two, kind):
    Visualizer.get_instance("test_distributed")
    truth, (first, second) = two
    one = measure(truth, kind, range(PICTURES))
    assert first[kind.__name__] == second[kind.__name__] == one
    assert 0 < one["coco/bbox_mAP"] < 1


def test_a_training_ends_in_both_processes_with_the_same_numbers(two):
    _, (first, second) = two
    assert first["train"] == second["train"]
    assert "coco/bbox_mAP" in first["train"]
