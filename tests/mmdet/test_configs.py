"""Every shipped config: it reads well, builds, and its tiny profile takes a step and predicts."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from prepared import prepare_experiment

from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.mmengine.configs import walk

# tests/mmdet3d has those of 3D detectors.
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
    if "mmdet3d::" not in path.read_text()
]
NAMES = {
    f"{detector}_{loss}"
    for detector, losses in {
        "retinanet": ("poly1", "focal", "cyclical", "soft_labels"),
        "fcos": ("poly1", "focal", "cyclical"),
        "mask_rcnn": ("poly1", "ce", "cyclical", "focal", "topk_lvis"),
        "cascade_mask_rcnn": ("poly1",),
        "atss": ("poly1",),
        "deformable_detr": ("poly1",),
        "rtmdet_s": ("poly1", "quality"),
        "rtmdet_ins_s": ("poly1", "quality"),
        "gfl": ("poly1", "quality"),
        "tood": ("poly1", "quality"),
        "vfnet": ("poly1", "varifocal"),
        "dino": ("poly1", "quality"),
    }.items()
    for loss in losses
}


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    settings = DigitScenes(num_train=2, num_val=1, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "digits", settings)


def losses_of(cfg):
    """The configs of all classification losses, inside the adapters too."""
    found = [node.loss_cls for node in walk(cfg.model) if "loss_cls" in node]
    return [loss.get("loss", loss) for loss in found]


def test_all_are_there():
    assert {path.stem for path in CONFIGS} == NAMES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_reads_well(path):
    text = path.read_text()
    code = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert re.search(r'^_base_ = "mmdet::', text, re.MULTILINE)
    assert len(text.splitlines()) <= 15 and len(code) <= 12
    assert "use_sigmoid" in text
    if "poly1" in path.stem:
        assert re.search(r"epsilon=-?\d", text), "the value is written"
        assert re.search(r"^# epsilon: ", text, re.MULTILINE), "and its reason"

    cfg = Config.fromfile(path)
    assert all("use_sigmoid" in loss for loss in losses_of(cfg))
    kinds = {loss.type for loss in losses_of(cfg) if loss.type.startswith("polyfocal.")}
    poly1 = "Poly1CrossEntropyLoss" if "mask" in path.stem else "Poly1FocalLoss"
    if "vfnet" in path.stem:
        poly1 = "Poly1VarifocalLoss"
    elif path.stem.startswith(("rtmdet", "gfl", "tood", "dino")):
        poly1 = "Poly1QualityFocalLoss"
    expected = {
        "poly1": {f"polyfocal.{poly1}"},
        "quality": set(),
        "varifocal": set(),
        "cyclical": {"polyfocal.CyclicalFocalLoss"},
        "focal": {"polyfocal.FocalLoss"} if "mask" in path.stem else set(),
        "ce": set(),
        "lvis": {"polyfocal.NoisedTopKLoss"},
        "labels": {"polyfocal.Poly1FocalLoss"},
    }
    assert kinds == expected[path.stem.rsplit("_", 1)[1]]


def test_cascade_has_the_loss_in_all_three_stages():
    (path,) = (path for path in CONFIGS if path.stem == "cascade_mask_rcnn_poly1")
    stages = Config.fromfile(path).model.roi_head.bbox_head
    assert [stage.loss_cls.type for stage in stages] == ["polyfocal.Poly1CrossEntropyLoss"] * 3
    assert [stage.loss_cls.epsilon for stage in stages] == [-1.0] * 3


def test_focal_box_classifier_starts_at_the_prior():
    (path,) = (path for path in CONFIGS if path.stem == "mask_rcnn_focal")
    model = MODELS.build(Config.fromfile(path).model.roi_head.bbox_head)
    model.init_weights()
    model.requires_grad_(False)
    assert model.fc_cls.out_features == 80
    torch.testing.assert_close(model.fc_cls.bias.sigmoid(), torch.full((80,), 0.01))
    assert model.fc_reg.weight.std() == pytest.approx(0.001, rel=0.05)
    # Xavier's uniform bound for 12544 inputs and 1024 outputs.
    bound = (6 / (12544 + 1024)) ** 0.5
    assert model.shared_fcs[0].weight.abs().max() == pytest.approx(bound, rel=1e-3)


def test_large_vocabulary_builds_with_its_background_and_its_activation():
    (path,) = (path for path in CONFIGS if path.stem == "mask_rcnn_topk_lvis")
    head = MODELS.build(Config.fromfile(path).model.roi_head.bbox_head)
    assert head.fc_cls.out_features == 1204
    row = torch.zeros(1, 1204)
    row[0, 7] = 1.0  # a box whose label just meets the margin of 1
    scores = head.loss_cls.get_activation(row)
    assert scores.shape == (1, 1204) and scores[0, 7].item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_tiny_profile_trains_and_predicts(path, scenes):
    torch.manual_seed(0)
    cfg = prepare_experiment(path, data=scenes, profile="tiny").config
    hub = MessageHub.get_current_instance()
    hub.update_info_dict(dict(iter=0, max_iters=10, epoch=0, max_epochs=1))
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert model.backbone.depth == 18
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters < 15e6

    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    log = model.train_step(batch, build_optim_wrapper(model, cfg.optim_wrapper))
    assert log["loss"].isfinite() and log["loss"] > 0
    moved = [name for name, weight in model.named_parameters() if not weight.equal(before[name])]
    assert any("backbone" in name for name in moved), "nothing is frozen"
    assert any("head" in name for name in moved)

    model.eval()
    with torch.no_grad():
        (sample,) = model.test_step(next(iter(Runner.build_dataloader(cfg.val_dataloader, seed=0))))
    found = sample.pred_instances
    assert found.bboxes.shape == (len(found), 4) and found.bboxes.isfinite().all()
    assert ((found.labels >= 0) & (found.labels < 10)).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    if "mask" in path.stem or "ins" in path.stem:
        assert found.masks.shape == (len(found), 64, 64)
