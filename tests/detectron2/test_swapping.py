"""LazyConfigs with their losses swapped."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2_models")

import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig
from detectron2.structures import Keypoints
from detectron2_models import SIDE, build, pictures, training_step
from fvcore.nn import sigmoid_focal_loss
from omegaconf import DictConfig, OmegaConf

import polyfocal
from polyfocal import swapping
from polyfocal.commands import swap_loss
from polyfocal.detectron2 import FastRCNNOutputLayers, RetinaNet, build_loss
from polyfocal.detectron2.lazy_experiment import LazyExperiment
from polyfocal.errors import UserError

RETINANET = "detectron2::COCO-Detection/retinanet_R_50_FPN_1x.py"
MASK = "detectron2::COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
PANOPTIC = "detectron2::COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py"
ZOO = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.py",
    "fcos": "COCO-Detection/fcos_R_50_FPN_1x.py",
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    "keypoint": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py",
    "panoptic": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py",
}


def batch(name):
    pictures_of = pictures((4, 2))
    for picture in pictures_of:
        instances = picture["instances"]
        if name == "keypoint":
            instances.gt_classes.zero_()
            corner = instances.gt_boxes.tensor[:, None, :2]
            points = torch.cat([corner + 4, torch.full_like(corner[..., :1], 2.0)], dim=2)
            instances.gt_keypoints = Keypoints(points.expand(-1, 17, -1).contiguous())
        if name == "panoptic":
            picture["sem_seg"] = torch.randint(0, 54, (SIDE, SIDE))
    return pictures_of


@pytest.mark.parametrize("name", ZOO)
def test_at_epsilon_0_every_loss_of_a_model_is_the_stock_one(name):
    experiment = LazyExperiment(Path(model_zoo.get_config_file(ZOO[name])))
    experiment.use_tiny_profile(SIDE)
    cfg = DictConfig(dict(model=experiment.cfg.model), flags={"allow_objects": True})
    stock = build(cfg.model)
    expected = training_step(stock, batch(name))
    slots = [f.where for f in swapping.find_losses(cfg.model) if f.slot.kind == "method"]
    for epsilon in (0.0, 1.0):
        swapped = polyfocal.swap(cfg, slots=slots, epsilon=epsilon).model
        ours = build(swapped)
        ours.load_state_dict(stock.state_dict())
        found = training_step(ours, batch(name))
        assert found[0].keys() == expected[0].keys()
        more = [key for key in found[0] if found[0][key] > expected[0][key] * 1.01]
        assert bool(more) == (epsilon > 0), more
        if epsilon == 0:
            torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
            assert found[1].keys() == expected[1].keys()
            for key, gradient in expected[1].items():
                scale = gradient.abs().max().item()
                torch.testing.assert_close(
                    found[1][key], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7
                )


def test_what_decides_on_classes_is_swapped_and_the_config_given_stays():
    cfg = model_zoo.get_config(MASK.partition("::")[2])
    model = polyfocal.swap(cfg, epsilon=-0.5).model
    assert model.roi_heads.box_predictor._target_ is FastRCNNOutputLayers
    assert model.roi_heads.box_predictor.cls_loss == dict(
        type="polyfocal.Poly1CrossEntropyLoss", use_sigmoid=False, epsilon=-0.5
    )
    assert "cls_loss" not in model.roi_heads.mask_head
    assert "cls_loss" not in cfg.model.roi_heads.box_predictor
    # Detectron2's sigmoid form, as of LVIS, starts without a prior.
    cfg.model.roi_heads.box_predictor.use_sigmoid_ce = True
    predictor = polyfocal.swap(cfg).model.roi_heads.box_predictor
    assert predictor.cls_loss.use_sigmoid and predictor.prior_prob == 0.5
    with pytest.raises(UserError, match="use_sigmoid_ce=True, but LDAMLoss is of softmax form"):
        polyfocal.swap(cfg, "LDAMLoss", class_counts=[1] * 80, scale=1)


def test_the_written_config_is_the_swapped_one(tmp_path):
    out = tmp_path / "mine.py"
    assert (
        swap_loss.main([RETINANET, "--loss", "poly1", "--epsilon", "0.5", "--out", str(out)]) == 0
    )
    read = LazyConfig.load(str(out))
    expected = polyfocal.swap(RETINANET, epsilon=0.5)
    for key in expected:
        found, wanted = (
            OmegaConf.to_container(cfg[key], resolve=False) for cfg in (read, expected)
        )
        assert found == wanted, key
    assert read.model._target_ is RetinaNet
    assert LazyExperiment(out).cfg.model.cls_loss.epsilon == 0.5
    with pytest.raises(UserError, match="a loss of this package already: set its epsilon"):
        polyfocal.swap(out)


def test_a_lazy_config_of_ones_own(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        "from detectron2 import model_zoo\n"
        "_zoo = model_zoo.get_config('common/models/cascade_rcnn.py')\n"
        "model = _zoo.model\n"
        "retina = model_zoo.get_config('common/models/retinanet.py').model\n"
        "retina.focal_loss_gamma = 1.5\n"
    )
    out = tmp_path / "my.py"
    assert swap_loss.main([str(own), "--loss", "poly1", "--out", str(out)]) == 0
    stages = LazyConfig.load(str(out)).model.roi_heads.box_predictors
    assert [stage._target_ for stage in stages] == [FastRCNNOutputLayers] * 3
    cfg = LazyConfig.load(str(own))
    cfg.model = cfg.retina
    swapped = polyfocal.swap(cfg).model
    assert swapped.cls_loss.gamma == 1.5 and swapped.focal_loss_gamma == 2.0
    capsys.readouterr()
    assert swap_loss.main([str(own)]) == 0
    shown = capsys.readouterr().out
    assert "roi_heads.box_predictors.2.cls_loss" in shown and "proposal_generator" in shown


@pytest.mark.parametrize("loss", ["FocalLoss", "poly1", "Poly1CrossEntropyLoss"])
def test_the_focal_settings_of_a_model_go_to_its_loss(loss):
    cfg = model_zoo.get_config(RETINANET.partition("::")[2])
    cfg.model.focal_loss_gamma, cfg.model.focal_loss_alpha = 1.5, -1
    more = {} if loss == "FocalLoss" else dict(epsilon=0.0)
    model = polyfocal.swap(cfg, loss, **more).model
    assert (model.focal_loss_gamma, model.focal_loss_alpha) == (2.0, 0.25)
    if loss != "Poly1CrossEntropyLoss":
        assert (model.cls_loss.gamma, model.cls_loss.alpha) == (1.5, None)
        logits, labels = torch.randn(6, 80), torch.tensor([0, 5, 80, 80, 3, 79])
        target = torch.nn.functional.one_hot(labels, 81)[:, :80].float()
        ours = build_loss(OmegaConf.to_container(model.cls_loss), "RetinaNet")
        expected = sigmoid_focal_loss(logits, target, alpha=-1, gamma=1.5, reduction="sum")
        found = ours(logits, labels, reduction_override="sum")
        torch.testing.assert_close(found, expected)
    # A loss with another default keeps what Detectron2 computes.
    stock = model_zoo.get_config(RETINANET.partition("::")[2])
    assert polyfocal.swap(stock, "SampleDependentFocalLoss").model.cls_loss.alpha == 0.25


@pytest.mark.parametrize("loss", ["FocalLoss", "Poly1FocalLoss"])
def test_without_gamma_a_focal_loss_in_the_place_of_a_cross_entropy_is_one(loss):
    """In the softmax form alpha, 0.25 by default for the sigmoid form, would quarter the loss."""
    more = dict(gamma=0.0) if loss == "FocalLoss" else dict(gamma=0.0, epsilon=0.0)
    swapped = polyfocal.swap(MASK, loss, **more).model.roi_heads.box_predictor.cls_loss
    ours = build_loss(OmegaConf.to_container(swapped), "FastRCNNOutputLayers", needs_sigmoid=False)
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 81), torch.randint(81, (40,))
    expected = torch.nn.functional.cross_entropy(logits, labels)  # Detectron2's, see its class
    torch.testing.assert_close(ours(logits, labels), expected)
    given = polyfocal.swap(MASK, loss, **more, alpha=0.5).model.roi_heads.box_predictor.cls_loss
    assert given.alpha == 0.5


def test_weights_from_the_data_are_taken():
    model = polyfocal.swap(RETINANET, "FocalLoss", class_weight="balanced", alpha="sqrt").model
    assert (model.cls_loss.class_weight, model.cls_loss.alpha) == ("balanced", "sqrt")
    with pytest.raises(UserError, match="class_weight='balance': expected numbers, one per class"):
        polyfocal.swap(RETINANET, class_weight="balance")


@pytest.mark.parametrize(
    ("config", "loss", "settings", "message"),
    [
        (RETINANET, "poly1", dict(slots=["mask"]), "named mask: .* losses are .*cls_loss"),
        (PANOPTIC, "poly1", dict(slots=["sem_seg"]), "sem_seg_head.cls_loss gives logits and targ"),
        (RETINANET, "LDAMLoss", dict(class_counts=[1, 2]), "write scale=1"),
        (RETINANET, "LDAMLoss", dict(class_counts=[1, 2], scale=1), "softmax form"),
        (RETINANET, "poly1", dict(beta=2), "beta"),
        (RETINANET, "poly", {}, "loss='poly': expected poly1 or one of"),
        ("detectron2::no.py", "poly1", {}, "detectron2::no.py cannot be read as a config"),
    ],
)
def test_what_cannot_be_swapped_is_said(config, loss, settings, message):
    with pytest.raises(UserError, match=message):
        polyfocal.swap(config, loss, **settings)
