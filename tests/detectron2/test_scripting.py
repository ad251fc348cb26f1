"""TorchScript of models with a loss of the package: as Detectron2 scripts its own."""

import pytest

pytest.importorskip("detectron2_models")

import torch
from detectron2.export import scripting_with_instances
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from detectron2.utils.testing import assert_instances_allclose, convert_scripted_instances
from detectron2_models import SIDE, pictures, small, yaml_config
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
}
SIGMOID = dict(type="CyclicalFocalLoss", use_sigmoid=True, alpha=0.25)
WEIGHTED = dict(type="FocalLoss", use_sigmoid=True, class_weight=[1.0, 2.0, 3.0])
SOFTMAX = dict(type="Poly1CrossEntropyLoss", use_sigmoid=False, epsilon=-1.0)


def batch():
    return [{"image": picture["image"]} for picture in pictures((1, 1))]


@pytest.mark.parametrize("loss", [SIGMOID, WEIGHTED], ids=["scheduled", "with class weights"])
def test_retinanet(loss):
    cfg = small(yaml_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.CLS_LOSS = "PolyfocalRetinaNet", loss
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.freeze()
    model = build_model(cfg).eval()
    fields = ("pred_boxes", "scores", "pred_classes")
    scripted = scripting_with_instances(model, {name: FIELDS[name] for name in fields})
    with torch.no_grad():
        expected = [result["instances"] for result in model(batch())]
        found = [convert_scripted_instances(one) for one in scripted(batch())]
    for one, other in zip(found, expected, strict=True):
        assert len(other) > 0
        assert_instances_allclose(detector_postprocess(one, SIDE, SIDE), other)


@pytest.mark.parametrize("box", [SOFTMAX, WEIGHTED], ids=["softmax", "sigmoid"])
def test_mask_rcnn(box):
    cfg = small(yaml_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    model = cfg.MODEL
    model.ROI_HEADS.NAME, model.ROI_BOX_HEAD.CLS_LOSS = "PolyfocalStandardROIHeads", box
    model.ROI_MASK_HEAD.NAME = "PolyfocalMaskRCNNConvUpsampleHead"
    model.PROPOSAL_GENERATOR.NAME = "PolyfocalRPN"
    model.ROI_MASK_HEAD.CLS_LOSS = model.RPN.CLS_LOSS = SIGMOID
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.freeze()
    model = build_model(cfg).eval()
    scripted = scripting_with_instances(model, FIELDS)
    with torch.no_grad():
        expected = model.inference(batch(), do_postprocess=False)
        found = scripted.inference(batch(), do_postprocess=False)
    for one, other in zip(found, expected, strict=True):
        assert len(other) > 0 and other.has("pred_masks")
        assert_instances_allclose(convert_scripted_instances(one), other)
