"""Every shipped config: it reads well, builds, and its tiny profile takes a step and predicts."""

import re

import pytest

pytest.importorskip("detectron2_models")

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2_models import CONFIGS, pictures, training_step
from prepared import prepare_detectron2

from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.detectron2 import ProgressHook, add_polyfocal_config
from polyfocal.losses import ClassificationLoss, CyclicalFocalLoss

LAZY = sorted(CONFIGS.glob("*.py"))
YAML = sorted(path for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("base"))
ZOO = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "cascade_mask_rcnn": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
}
LOSSES = {"poly1": "Poly1", "cyclical": "Cyclical"}


def identifier(path):
    return path.name


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    settings = DigitScenes(num_train=2, num_val=1, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "digits", settings)


def losses_of(model):
    return [module for module in model.modules() if isinstance(module, ClassificationLoss)]


def test_all_are_there():
    assert {path.stem for path in LAZY} == {
        "retinanet_poly1",
        "retinanet_cyclical",
        "retinanet_focal",
        "fcos_poly1",
        "fcos_focal",
        "mask_rcnn_poly1",
        "mask_rcnn_cyclical",
        "mask_rcnn_ce",
        "cascade_mask_rcnn_poly1",
    }
    assert {path.stem for path in YAML} == {
        "retinanet_poly1",
        "retinanet_cyclical",
        "mask_rcnn_poly1",
        "cascade_mask_rcnn_poly1",
    }


@pytest.mark.parametrize("path", LAZY + YAML, ids=identifier)
def test_reads_well(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 17 and text.startswith("# ")
    if path.suffix == ".py" and "poly1" in path.stem:
        assert re.search(r"^# epsilon: ", text, re.MULTILINE), "the value has its reason"


@pytest.mark.parametrize("path", LAZY + YAML, ids=identifier)
def test_tiny_profile_takes_a_step_and_predicts(path, scenes):
    experiment = prepare_detectron2(path, data=scenes, profile="tiny")
    torch.manual_seed(0)
    model = experiment.build_model()
    kind = path.stem.rpartition("_")[2]
    expected = {"cascade_mask_rcnn": 3}.get(path.stem.rpartition("_")[0], 1)
    found = losses_of(model)
    assert len(found) == (expected if kind in LOSSES else 0)
    assert all(type(loss).__name__.startswith(LOSSES[kind]) for loss in found)

    for loss in found:
        if isinstance(loss, CyclicalFocalLoss):
            loss.set_progress(0.5)
    losses, gradients, _ = training_step(model, pictures())
    assert all(value.isfinite() for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == gradients.keys()
    optimizer = experiment.build_optimizer(model)
    optimizer.step()
    with torch.no_grad():
        (result, _) = model.eval()([{"image": p["image"]} for p in pictures()])
    assert result["instances"].pred_boxes.tensor.isfinite().all()


@pytest.mark.parametrize("path", YAML, ids=identifier)
def test_yaml_is_the_zoos_config_with_another_loss(path):
    cfg = get_cfg()
    add_polyfocal_config(cfg)
    cfg.merge_from_file(str(path))
    zoo = model_zoo.get_config(ZOO[path.stem.rpartition("_")[0]])
    add_polyfocal_config(zoo)

    def flat(node, prefix=""):
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and key != "CLS_LOSS":
                yield from flat(value, f"{name}.")
            else:
                yield name, list(value) if isinstance(value, tuple) else value

    ours, theirs = dict(flat(cfg)), dict(flat(zoo))
    different = {key for key in ours if str(ours[key]) != str(theirs.get(key))}
    part = "MODEL.RETINANET" if "retinanet" in path.stem else "MODEL.ROI_BOX_HEAD"
    name = "MODEL.META_ARCHITECTURE" if "retinanet" in path.stem else "MODEL.ROI_HEADS.NAME"
    # The sizes of anchors are the same numbers, in the zoo written as code.
    assert different - {"MODEL.ANCHOR_GENERATOR.SIZES"} == {f"{part}.CLS_LOSS", name}
    assert torch.equal(
        torch.tensor(ours["MODEL.ANCHOR_GENERATOR.SIZES"]),
        torch.tensor(theirs["MODEL.ANCHOR_GENERATOR.SIZES"]),
    )


@pytest.mark.parametrize("path", YAML, ids=identifier)
def test_yaml_and_lazy_config_are_one_experiment(path, scenes):
    lazy, yaml = (
        prepare_detectron2(path.with_suffix(suffix), data=scenes, profile="tiny")
        for suffix in (".py", ".yaml")
    )
    models = [experiment.build_model() for experiment in (lazy, yaml)]
    shapes = [{n: w.shape for n, w in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    assert repr(losses_of(models[0])) == repr(losses_of(models[1]))
    settings = [experiment.settings() for experiment in (lazy, yaml)]
    for name in ("max_iter", "eval_period", "checkpoint_period", "max_to_keep", "seed", "weights"):
        assert getattr(settings[0], name) == getattr(settings[1], name), name


def test_every_registry_has_its_class():
    cfg = model_zoo.get_config(ZOO["mask_rcnn"])
    add_polyfocal_config(cfg)
    loss = {"type": "Poly1CrossEntropyLoss", "epsilon": 0.5, "use_sigmoid": True}
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.ROI_HEADS.NAME = "PolyfocalStandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PolyfocalMaskRCNNConvUpsampleHead"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PolyfocalRPN"
    cfg.MODEL.ROI_BOX_HEAD.PRIOR_PROB = 0.2
    for part in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "RPN"):
        cfg.MODEL[part].CLS_LOSS.update(loss)
    model = build_model(cfg)
    assert [loss.epsilon for loss in losses_of(model)] == [0.5] * 3
    bias = model.roi_heads.box_predictor.cls_score.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.2))
    losses, _, _ = training_step(model, pictures())
    assert all(value.isfinite() for value in losses.values())


def test_a_yaml_config_of_the_model_zoo_is_read(scenes):
    path = model_zoo.get_config_file(ZOO["retinanet"])
    experiment = prepare_detectron2(path, data=scenes, profile="tiny", train=False)
    assert type(experiment.build_model()).__name__ == "RetinaNet"


def test_progress_hook_is_the_trainers_progress():
    from detectron2.engine import TrainerBase
    from torch import nn

    class Trainer(TrainerBase):
        def __init__(self):
            super().__init__()
            losses = [CyclicalFocalLoss(use_sigmoid=flag) for flag in (True, False)]
            self.model = nn.Sequential(nn.Identity(), nn.Sequential(*losses))
            self.seen = []

        def run_step(self):
            first, second = self.model[1]
            assert first.progress() == second.progress()
            self.seen.append(first.progress())

    for start, stop in ((0, 5), (3, 5), (0, 1)):
        trainer = Trainer()
        trainer.register_hooks([ProgressHook()])
        trainer.train(start, stop)
        assert trainer.seen == [i / max(1, stop - 1) for i in range(start, stop)]
