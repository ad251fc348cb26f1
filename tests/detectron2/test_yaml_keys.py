"""The keys of yaml configs: set in every way that yacs has, and never without an effect."""

import importlib
import pickle

import pytest

pytest.importorskip("detectron2_models")

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_model
from detectron2_models import pictures, small, training_step
from detectron2_models import yaml_config as config
from torch.nn import functional as F

from polyfocal.detectron2 import FastRCNNOutputLayers, StandardROIHeads
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
KEYPOINTS = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PROPOSALS = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
FAST_RCNN = "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
FOCAL = {"type": "FocalLoss", "use_sigmoid": True}
SOFTMAX = {"type": "Poly1CrossEntropyLoss", "epsilon": 0.0, "use_sigmoid": False}


def test_a_dictionary_can_be_assigned():
    cfg = config(RETINANET)
    cfg.MODEL.META_ARCHITECTURE = "PolyfocalRetinaNet"
    cfg.MODEL.RETINANET.CLS_LOSS = FOCAL
    cfg.freeze()
    assert dict(cfg.clone().MODEL.RETINANET.CLS_LOSS) == FOCAL
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert "FocalLoss" in cfg.dump()


def test_overrides_give_new_keywords_and_other_types():
    cfg = config(RETINANET)
    cfg.MODEL.RETINANET.CLS_LOSS = {"type": "Poly1FocalLoss", "epsilon": 1.5, "use_sigmoid": True}
    key = "MODEL.RETINANET.CLS_LOSS"
    cfg.merge_from_list([f"{key}.gamma", "1.5", f"{key}.epsilon", "1", "SOLVER.MAX_ITER", "7"])
    assert cfg.MODEL.RETINANET.CLS_LOSS.gamma == 1.5 and cfg.SOLVER.MAX_ITER == 7
    assert cfg.MODEL.RETINANET.CLS_LOSS.epsilon == 1
    cfg.merge_from_list([f"{key}.alpha", "[0.2, 0.3, 0.4]"])
    assert cfg.MODEL.RETINANET.CLS_LOSS.alpha == [0.2, 0.3, 0.4]
    cfg.merge_from_list([key, str(FOCAL)])
    assert dict(cfg.MODEL.RETINANET.CLS_LOSS) == FOCAL, "the whole loss is replaced"
    for wrong in (
        "MODEL.RETINANET.CLS_LOS.gamma",
        f"{key}.bias.gamma",
        "MODEL.RETINANE.CLS_LOSS",
        "MODEL.ROI_HEADS.CLS_LOSS",
        "MODEL.CLS_LOSS.gamma",
    ):
        with pytest.raises(AssertionError, match="Non-existent key"):
            cfg.merge_from_list([wrong, "1"])


def test_a_second_file_gives_new_keywords_and_other_types(tmp_path):
    cfg = config(RETINANET)
    cfg.MODEL.RETINANET.CLS_LOSS = {"type": "Poly1FocalLoss", "epsilon": 1.0, "use_sigmoid": True}
    file = tmp_path / "more.yaml"
    file.write_text("MODEL: {RETINANET: {CLS_LOSS: {epsilon: 2, alpha: 0.5}}}\nVERSION: 2\n")
    cfg.merge_from_file(str(file))
    assert dict(cfg.MODEL.RETINANET.CLS_LOSS) == {
        "type": "Poly1FocalLoss",
        "epsilon": 2,
        "use_sigmoid": True,
        "alpha": 0.5,
    }


def test_keys_of_other_projects_stand_beside_ours(tmp_path):
    cfg = config(RETINANET)
    cfg.MODEL.OTHER = CfgNode()
    cfg.MODEL.OTHER.WIDTH = 3
    file = tmp_path / "other.yaml"
    file.write_text("MODEL: {OTHER: {WIDTH: 5}}\nVERSION: 2\n")
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(["MODEL.OTHER.WIDTH", "6"])
    cfg.freeze()
    assert cfg.MODEL.OTHER.WIDTH == 6 and cfg.MODEL.OTHER.is_frozen()


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        (RETINANET, "RETINANET", "META_ARCHITECTURE is RetinaNet, .*: write PolyfocalRetinaNet"),
        (RETINANET, "ROI_BOX_HEAD", "META_ARCHITECTURE is RetinaNet, which has no such part"),
        (RETINANET, "RPN", "META_ARCHITECTURE is RetinaNet, which has no such part"),
        (MASK_RCNN, "RETINANET", "META_ARCHITECTURE is GeneralizedRCNN, which has no such part"),
        (MASK_RCNN, "ROI_BOX_HEAD", "is StandardROIHeads, .*: write PolyfocalStandardROIHeads"),
        (MASK_RCNN, "ROI_MASK_HEAD", "write PolyfocalMaskRCNNConvUpsampleHead"),
        (MASK_RCNN, "RPN", "PROPOSAL_GENERATOR.NAME is RPN, .*: write PolyfocalRPN"),
        (C4, "ROI_BOX_HEAD", "ROI_HEADS.NAME is Res5ROIHeads, .*: write PolyfocalRes5ROIHeads"),
        (CASCADE, "ROI_BOX_HEAD", "is CascadeROIHeads, .*: write PolyfocalCascadeROIHeads"),
        (KEYPOINTS, "ROI_BOX_HEAD", "write PolyfocalStandardROIHeads"),
        (KEYPOINTS, "ROI_MASK_HEAD", "MODEL.MASK_ON is False"),
        (PROPOSALS, "ROI_BOX_HEAD", "is ProposalNetwork, which has no such part"),
        (PROPOSALS, "RPN", "write PolyfocalRPN"),
        (PANOPTIC, "ROI_BOX_HEAD", "write PolyfocalStandardROIHeads"),
        (PANOPTIC, "RETINANET", "META_ARCHITECTURE is PanopticFPN, which has no such part"),
        (FAST_RCNN, "RPN", "NAME is PrecomputedProposals, which trains no proposals"),
        (SEMANTIC, "ROI_MASK_HEAD", "is SemanticSegmentor, which has no such part"),
    ],
)
def test_a_loss_that_nobody_reads_is_refused(name, part, reason):
    cfg = config(name)
    cfg.MODEL[part].CLS_LOSS = FOCAL
    with pytest.raises(UserError, match=rf"MODEL.{part}.CLS_LOSS would have no effect: .*{reason}"):
        cfg.freeze()


def test_a_prior_that_nobody_reads_is_refused():
    cfg = config(MASK_RCNN)
    cfg.MODEL.ROI_BOX_HEAD.PRIOR_PROB = 0.1
    with pytest.raises(UserError, match="PRIOR_PROB would have no effect"):
        cfg.freeze()


def test_rotated_heads_are_refused_by_name():
    cfg = config(MASK_RCNN)
    cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = SOFTMAX
    with pytest.raises(UserError, match="ROI_HEADS.NAME is RROIHeads, which has a loss of its own"):
        cfg.freeze()


@pytest.mark.parametrize("part", ["ROI_HEADS", "ROI_KEYPOINT_HEAD", "PROPOSAL_GENERATOR"])
@pytest.mark.parametrize("name", [MASK_RCNN, KEYPOINTS])
def test_a_loss_assigned_to_another_part_is_refused(name, part):
    cfg = config(name)
    cfg.MODEL.ROI_HEADS.NAME = "PolyfocalStandardROIHeads"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PolyfocalRPN"
    cfg.MODEL[part].CLS_LOSS = SOFTMAX
    with pytest.raises(UserError, match=f"{part}.CLS_LOSS would .*belongs to .*MODEL.ROI_BOX_HEAD"):
        cfg.freeze()


def test_a_class_of_detectron2s_projects_does_not_read_a_loss():
    importlib.import_module("detectron2.projects.point_rend")
    cfg = config(MASK_RCNN)
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"
    cfg.MODEL.ROI_MASK_HEAD.CLS_LOSS = FOCAL
    with pytest.raises(UserError, match="NAME is PointRendMaskHead, which has a loss of its own"):
        cfg.freeze()


def test_an_architecture_without_the_part_is_refused():
    """As Detectron2's TensorMask is, whose package registers it and has to be compiled."""

    class TensorMask(torch.nn.Module):
        pass

    META_ARCH_REGISTRY.register(TensorMask)
    for part in ("RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RPN"):
        cfg = config(RETINANET)
        cfg.MODEL.META_ARCHITECTURE = "TensorMask"
        cfg.MODEL[part].CLS_LOSS = FOCAL
        with pytest.raises(UserError, match="is TensorMask, which has no such part"):
            cfg.freeze()


def test_a_misspelt_class_is_named_by_detectron2():
    cfg = small(config(MASK_RCNN))
    cfg.MODEL.ROI_HEADS.NAME = "PolyfocalStandartROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = SOFTMAX
    cfg.freeze()
    with pytest.raises(KeyError, match="PolyfocalStandartROIHeads"):
        build_model(cfg)


def test_a_class_of_the_users_may_read_the_loss():
    class Heads(StandardROIHeads):
        pass

    ROI_HEADS_REGISTRY.register(Heads)
    cfg = small(config(MASK_RCNN))
    cfg.MODEL.ROI_HEADS.NAME = "Heads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = SOFTMAX
    cfg.freeze()
    assert isinstance(build_model(cfg).roi_heads.box_predictor, FastRCNNOutputLayers)


def test_without_the_keys_a_sentence_says_what_is_missing():
    cfg = model_zoo.get_config(RETINANET)
    cfg.MODEL.META_ARCHITECTURE = "PolyfocalRetinaNet"
    with pytest.raises(UserError, match=r"no MODEL.RETINANET.CLS_LOSS: call .*add_polyfocal_conf"):
        build_model(cfg)
    cfg = model_zoo.get_config(C4)
    cfg.MODEL.ROI_HEADS.NAME = "PolyfocalRes5ROIHeads"
    with pytest.raises(UserError, match=r"no MODEL.ROI_BOX_HEAD.CLS_LOSS: call"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("name", "node", "class_", "part"),
    [
        (RETINANET, None, "PolyfocalRetinaNet", "RETINANET"),
        (MASK_RCNN, "ROI_HEADS", "PolyfocalStandardROIHeads", "ROI_BOX_HEAD"),
        (MASK_RCNN, "ROI_MASK_HEAD", "PolyfocalMaskRCNNConvUpsampleHead", "ROI_MASK_HEAD"),
        (MASK_RCNN, "PROPOSAL_GENERATOR", "PolyfocalRPN", "RPN"),
    ],
)
def test_a_class_without_its_loss_is_refused(name, node, class_, part):
    cfg = small(config(name))
    if node is None:
        cfg.MODEL.META_ARCHITECTURE = class_
    else:
        cfg.MODEL[node].NAME = class_
    with pytest.raises(UserError, match=f"MODEL.{part}.CLS_LOSS is empty, and the class"):
        build_model(cfg)


def losses_of(model):
    return [module for module in model.modules() if isinstance(module, ClassificationLoss)]


@pytest.mark.parametrize(
    ("name", "heads", "count"),
    [
        (C4, "PolyfocalRes5ROIHeads", 1),
        (CASCADE, "PolyfocalCascadeROIHeads", 3),
        (KEYPOINTS, "PolyfocalStandardROIHeads", 1),
        (PANOPTIC, "PolyfocalStandardROIHeads", 1),
    ],
)
def test_heads_at_epsilon_0_are_detectron2s(name, heads, count):
    stock, ours = config(name), config(name)
    ours.MODEL.ROI_HEADS.NAME = heads
    ours.MODEL.ROI_BOX_HEAD.CLS_LOSS = SOFTMAX
    for cfg in (stock, ours):
        cfg.MODEL.DEVICE = "cpu"
        if name == C4:
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
            cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 3, 16
            cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
            cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
        else:
            small(cfg)
        if cfg.MODEL.KEYPOINT_ON:
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        cfg.freeze()
    stock, ours = build_model(stock), build_model(ours)
    assert len(losses_of(ours)) == count
    ours.load_state_dict(stock.state_dict(), strict=True)
    batch = pictures((3,))
    if name == KEYPOINTS:
        from detectron2.structures import Keypoints

        for picture in batch:
            points = torch.rand(len(picture["instances"]), 17, 3) * 40
            points[..., 2] = 2
            picture["instances"].gt_keypoints = Keypoints(points)
    if name == PANOPTIC:
        for picture in batch:
            picture["sem_seg"] = torch.randint(54, picture["image"].shape[1:])
    expected, gradients, _ = training_step(stock, batch)
    found, our_gradients, _ = training_step(ours, batch)
    assert found.keys() == expected.keys() and any("loss_cls" in key for key in expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-4, atol=1e-4 * scale)


@pytest.fixture
def frequencies():
    """A data set that says how many pictures have each class, as LVIS's does."""
    counts = [dict(id=k + 1, image_count=count) for k, count in enumerate((100, 25, 4))]
    MetadataCatalog.get("counted").class_image_count = counts
    yield torch.tensor([10.0, 5.0, 2.0])  # Detectron2 takes the square root
    MetadataCatalog.remove("counted")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        (MASK_RCNN, "PolyfocalStandardROIHeads"),
        (CASCADE, "PolyfocalCascadeROIHeads"),
        (C4, "PolyfocalRes5ROIHeads"),
    ],
)
def test_the_federated_loss_needs_a_sigmoid_loss_alone(name, heads, frequencies):
    cfg = small(config(name))
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.MASK_ON = (50 if name == C4 else 18), False
    cfg.DATASETS.TRAIN = ("counted",)
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = True
    cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES = 2
    cfg.MODEL.ROI_HEADS.NAME = heads
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = FOCAL
    cfg.freeze()
    found = build_model(cfg).roi_heads
    for predictor in found.box_predictor if name == CASCADE else [found.box_predictor]:
        assert isinstance(predictor, FastRCNNOutputLayers) and predictor.use_fed_loss
        assert predictor.fed_loss_num_classes == 2
        torch.testing.assert_close(predictor.fed_loss_cls_weights, frequencies)
    assert cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS, "the config given stays"
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = SOFTMAX
    with pytest.raises(UserError, match="use_fed_loss is for a sigmoid loss, but the cls_loss of"):
        build_model(cfg)


def test_c4_trains_what_the_config_says():
    """The box head's loss is cross-entropy + epsilon (1 - p) of its own logits."""
    cfg = config(C4)
    cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON = "cpu", False
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 3, 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.ROI_HEADS.NAME = "PolyfocalRes5ROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = {**SOFTMAX, "epsilon": 2.0}
    cfg.freeze()
    torch.manual_seed(0)
    model = build_model(cfg)
    seen = []
    predictor = model.roi_heads.box_predictor
    original = predictor.losses
    predictor.losses = lambda predictions, proposals: (
        seen.append((predictions[0].detach(), torch.cat([p.gt_classes for p in proposals]))),
        original(predictions, proposals),
    )[1]
    losses, _, _ = training_step(model, pictures((3,)))
    ((logits, labels),) = seen
    p = logits.double().softmax(1).gather(1, labels[:, None])
    expected = F.cross_entropy(logits.double(), labels) + 2 * (1 - p).mean()
    assert losses["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)
