"""Small detectors of Detectron2 and what goes into them, for the tests that need them."""

import contextlib

import pytest

pytest.importorskip(
    "detectron2.modeling",
    reason="needs Detectron2, which has no release on the index: docs/detectron2.md says how to"
    " install it",
)

from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from polyfocal.detectron2 import add_polyfocal_config
from polyfocal.detectron2.lazy_experiment import LazyExperiment

CONFIGS = Path(__file__).parents[2] / "configs" / "detectron2"
SIDE = 96  # pixels


def model_config(name):
    """The model of a shipped config in its tiny profile, with three classes."""
    experiment = LazyExperiment(CONFIGS / f"{name}.py")
    experiment.use_tiny_profile(SIDE)
    model = experiment.cfg.model
    (model.roi_heads if "roi_heads" in model else model).num_classes = 3
    return model


def build(config):
    """A model whose classifiers have something to say."""
    torch.manual_seed(0)
    model = instantiate(config)
    for name, parameter in model.named_parameters():
        if name.endswith(
            ("cls_score.weight", "objectness_logits.weight", "predictor.weight")
        ) and not name.startswith("roi_heads.box_predictor.bbox"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def yaml_config(name):
    """A yaml config of the model zoo with the keys of the package."""
    cfg = get_cfg()
    add_polyfocal_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    return cfg


def small(cfg):
    """A size that a test can train: ResNet-18's widths, few classes, on the CPU."""
    model = cfg.MODEL
    model.DEVICE, model.WEIGHTS = "cpu", ""
    model.RESNETS.DEPTH, model.RESNETS.RES2_OUT_CHANNELS = 18, 64
    model.RETINANET.NUM_CLASSES = model.ROI_HEADS.NUM_CLASSES = 3
    model.ROI_BOX_HEAD.FC_DIM = 64
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    for key in ("TRAIN", "TEST"):
        model.RPN[f"POST_NMS_TOPK_{key}"] = 50
    return cfg


def pictures(counts=(4, 0)):
    """A batch with so many objects per picture."""
    torch.manual_seed(1)
    batch = []
    for count in counts:
        corner = torch.rand(count, 2) * SIDE / 2
        boxes = torch.cat([corner, corner + 8 + torch.rand(count, 2) * SIDE / 3], dim=1)
        instances = Instances((SIDE, SIDE))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(count) % 3
        instances.gt_masks = BitMasks(torch.rand(count, SIDE, SIDE) > 0.4)
        batch.append({"image": torch.rand(3, SIDE, SIDE) * 255, "instances": instances})
    return batch


def training_step(model, batch):
    """The losses, the gradient of every parameter that has one, and Detectron2's statistics."""
    model.train()
    model.zero_grad()
    torch.manual_seed(2)  # the samplers draw
    with EventStorage() as storage:
        losses = model(batch)
        sum(losses.values()).backward()
        statistics = {name: value for name, (value, _) in storage.latest().items()}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items()}, gradients, statistics


@contextlib.contextmanager
def recorded(obj, method):
    """The arguments of the calls of a method."""
    calls, original = [], getattr(obj, method)

    def call(*args):
        calls.append(args)
        return original(*args)

    setattr(obj, method, call)
    yield calls
    delattr(obj, method)
