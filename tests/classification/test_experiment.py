"""A classification config meets its data; and every shipped one trains, tests and resumes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from prepared import prepare_experiment

from polyfocal.classification import load_images
from polyfocal.errors import UserError
from polyfocal.mmengine.runs import test as run_test
from polyfocal.mmengine.runs import train as run_train

FOLDER = Path(__file__).parents[2] / "configs" / "classification"
CONFIGS = sorted(FOLDER.glob("*.py"))
LOSSES = {
    "cross_entropy": "FocalLoss",
    "focal": "FocalLoss",
    "cyclical": "CyclicalFocalLoss",
    "poly1": "Poly1CrossEntropyLoss",
    "noised_topk": "NoisedTopKLoss",
    "imbalanced_noised_topk": "ImbalancedNoisedTopKLoss",
    "ldam": "LDAMLoss",
}
CIFAR_LT = Path(__file__).parents[3] / "shared" / "data" / "cifar10_lt100"


def prepare(name, tmp_path, *, options=None, **settings):
    experiment = prepare_experiment(FOLDER / f"{name}.py", options=options, **settings)
    experiment.config.work_dir = str(tmp_path)
    experiment.config.experiment_name = f"{name}-{tmp_path}"
    experiment.config.randomness = {"seed": 0}
    experiment.config.launcher = "none"
    return experiment


def test_all_are_there_and_short():
    names = {loss + end for loss in LOSSES for end in ("", "_long_tail", "_noisy")}
    assert {path.stem for path in CONFIGS} == names
    assert all(len(path.read_text().splitlines()) <= 16 for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_reads_as_it_is_called(path):
    cfg = prepare_experiment(path, demo=True).config
    name = re.sub("_(long_tail|noisy)$", "", path.stem)
    assert cfg.model.loss.type == f"polyfocal.{LOSSES[name]}"
    dataset = cfg.train_dataloader.dataset
    assert dataset.get("long_tail", 1.0) == (100.0 if "long_tail" in path.stem else 1.0)
    assert dataset.get("label_noise", 0.0) == (0.2 if "noisy" in path.stem else 0.0)
    assert cfg.model.num_classes == 10
    counts = cfg.val_evaluator.class_counts
    if "long_tail" in path.stem:
        assert counts[0] / counts[9] > 50
    if "class_counts" in cfg.model.loss:
        assert cfg.model.loss.class_counts == counts


def test_full_recipe(tmp_path):
    """The recipe of the config is the paper's; the tiny profile changes network and schedule."""
    images = np.zeros((20, 32, 32, 3), np.uint8)
    labels = np.arange(20)
    np.savez(
        tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2]
    )
    full = prepare("noised_topk", tmp_path, data=tmp_path).config
    assert full.train_cfg.max_epochs == 300 and full.model.backbone.depth == 32
    assert full.param_scheduler[0].milestones == [151, 226]
    assert full.train_dataloader.batch_size == 64 and full.model.num_classes == 20
    tiny = prepare(
        "noised_topk",
        tmp_path,
        data=tmp_path,
        profile="tiny",
        options={"model.backbone.depth": 14, "topk": 3},
    ).config
    assert tiny.train_cfg.max_epochs == 12 and tiny.model.backbone.depth == 14
    assert tiny.val_evaluator.topk == tiny.test_evaluator.topk == 3
    assert tiny.train_dataloader.dataset.root == str(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cross-entropy on the digits, of the tiny profile but with fewer epochs."""
    folder = tmp_path_factory.mktemp("trained")
    options = {"train_cfg.max_epochs": 8, "train_cfg.val_interval": 8}
    measured = run_train(prepare("cross_entropy", folder, demo=True, options=options))
    return folder, measured


def test_learns_digits(trained, capsys):
    folder, measured = trained
    assert measured["classification/top1"] > 0.9
    experiment = prepare("cross_entropy", folder / "test", demo=True)
    again = run_test(experiment, str(folder / "epoch_8.pth"))
    assert again["classification/top1"] == measured["classification/top1"]
    assert "macro_top1" in capsys.readouterr().out


def test_same_seed_same_weights_and_resumes(trained, tmp_path):
    folder, _ = trained
    stop = {"train_cfg.max_epochs": 8, "train_cfg.val_interval": 8}
    run_train(prepare("cross_entropy", tmp_path, demo=True, options=stop))
    first, second = (
        torch.load(place / "epoch_8.pth")["state_dict"]["head.weight"]
        for place in (folder, tmp_path)
    )
    assert torch.equal(first, second)
    more = {"train_cfg.max_epochs": 9, "train_cfg.val_interval": 9}
    run_train(prepare("cross_entropy", tmp_path, demo=True, options=more), resume="auto")
    assert torch.load(tmp_path / "epoch_9.pth")["meta"]["epoch"] == 9


def test_cycle_follows_the_training(tmp_path, monkeypatch):
    from polyfocal.mmengine.losses import CyclicalFocalLoss

    seen = []
    original = CyclicalFocalLoss.progress
    monkeypatch.setattr(
        CyclicalFocalLoss, "progress", lambda self: seen.append(original(self)) or seen[-1]
    )
    options = {"train_cfg.max_epochs": 1, "variant": {"num_samples": 320}}
    run_train(prepare("cyclical", tmp_path, demo=True, options=options))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "there is no data set: .* wants data/cifar-100-python; .*--data DIR.*--demo"),
        ({"data": "/away"}, "wants /away"),
        ({"demo": True, "options": {"variant": {"tail": 2}}}, "variant={'tail': 2}: .*'tail'"),
        ({"demo": True, "options": {"variant.long_tail": 0}}, "long_tail=0"),
        (
            {"demo": True, "options": {"test_dataloader.dataset.split": "away"}},
            "test_dataloader.dataset.split='away'",
        ),
    ],
)
def test_refuses(settings, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        prepare("focal", tmp_path, **settings)


@pytest.mark.skipif(not CIFAR_LT.is_dir(), reason="needs ../shared/data/cifar10_lt100")
def test_real_pictures(tmp_path):
    options = {"variant": {"long_tail": 100.0}, "val_evaluator.shots": (200, 1000)}
    cfg = prepare("ldam", tmp_path, data=CIFAR_LT, profile="tiny", options=options).config
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert cfg.model.loss.class_counts == cfg.val_evaluator.class_counts == counts
    few = {"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1, "variant.num_samples": 1000}
    few["val_evaluator.shots"] = (5, 20)
    measured = run_train(
        prepare("ldam", tmp_path, data=CIFAR_LT, profile="tiny", options=options | few)
    )
    assert {"many", "medium", "few"} <= {name.split("/")[1] for name in measured}
    (scalars,) = tmp_path.glob("*/vis_data/scalars.json")
    last = json.loads(scalars.read_text().splitlines()[-1])
    assert last["classification/top1"] == pytest.approx(measured["classification/top1"])


NEW_STYLE = """
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend, Visualizer
from torch.optim import SGD

from polyfocal import CyclicalFocalLoss
from polyfocal.classification import (
    CifarResNet, ClassificationMetric, Classifier, ImageDataset, ImagePreprocessor
)

default_scope = None
model = dict(
    type=Classifier,
    data_preprocessor=dict(type=ImagePreprocessor),
    backbone=dict(type=CifarResNet, depth=8),
    in_channels=64,
    num_classes=100,
    loss=dict(type=CyclicalFocalLoss, use_sigmoid=False),
)
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=ImageDataset, split="train"),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=ImageDataset, split="val"),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type=ClassificationMetric, topk=3, class_counts=None)]
test_evaluator = val_evaluator
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=1),
)
visualizer = dict(type=Visualizer, vis_backends=[dict(type=LocalVisBackend)])
"""


def test_a_config_of_the_new_style(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(NEW_STYLE)
    experiment = prepare_experiment(path, demo=True, options={"train_cfg.max_epochs": 1})
    cfg = experiment.config
    assert cfg.model.num_classes == 10 and cfg.val_evaluator[0].topk == 3
    counts = load_images(None, "train").counts
    assert cfg.val_evaluator[0].class_counts == counts
    cfg.work_dir = str(tmp_path / "run")
    measured = run_train(experiment)
    assert "classification/top3" in measured
    shown = capsys.readouterr().out
    total = sum(counts)
    assert f"training on {total} objects in {total} samples: 0 ({counts[0]}), 1 " in shown
    assert "macro_top3" in shown
    experiment.hold_out(tmp_path)
    assert cfg.train_dataloader.dataset.held_out is False
    assert cfg.val_dataloader.dataset.held_out is True


def test_class_weights_from_the_training_pictures(tmp_path):
    options = {"model.loss.class_weight": "balanced"}
    experiment = prepare("focal_long_tail", tmp_path, demo=True, options=options)
    counts = np.array(experiment.config.val_evaluator.class_counts)
    found = experiment.config.model.loss.class_weight
    np.testing.assert_allclose(found, counts.sum() / (10 * counts), rtol=1e-5)
    (note,) = experiment.notes
    assert note.startswith("model.loss.class_weight is balanced of the training data: 0 ")
