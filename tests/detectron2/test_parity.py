"""The losses inside Detectron2's own models, against the classes they are made from."""

import math

import pytest

pytest.importorskip("polyfocal.detectron2", exc_type=ImportError)

import detectron2.modeling as d2
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers as StockOutputLayers
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

import polyfocal.detectron2 as ours
from polyfocal import FocalLoss, Poly1CrossEntropyLoss, Poly1FocalLoss, PolyNLoss
from polyfocal.detectron2.lazy_experiment import LazyExperiment
from polyfocal.errors import UserError

from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs" / "detectron2"
SIDE = 96

FOCAL = FocalLoss(use_sigmoid=True)
POLY1_FOCAL = Poly1FocalLoss(epsilon=0.0, use_sigmoid=True)
POLY_N = PolyNLoss(epsilons=(0.0, 0.0), gamma=2.0, alpha=0.25, use_sigmoid=True)
POLY1_CE = Poly1CrossEntropyLoss(epsilon=0.0)
POLY1_BCE = Poly1CrossEntropyLoss(epsilon=0.0, use_sigmoid=True)

STOCK = {
    "retinanet": "retinanet_focal.py",
    "fcos": "fcos_focal.py",
    "mask_rcnn": "mask_rcnn_ce.py",
    "cascade": "cascade_mask_rcnn_poly1.py",
}
PARTS = {
    "retinanet": lambda model: [(model, ours.RetinaNet)],
    "fcos": lambda model: [(model, ours.FCOS)],
    "box": lambda model: [(model.roi_heads.box_predictor, ours.FastRCNNOutputLayers)],
    "stages": lambda model: [
        (stage, ours.FastRCNNOutputLayers) for stage in model.roi_heads.box_predictors
    ],
    "mask": lambda model: [(model.roi_heads.mask_head, ours.MaskRCNNConvUpsampleHead)],
    "rpn": lambda model: [(model.proposal_generator, ours.RPN)],
}


def build(name, losses=None, sigmoid=False):
    """A small model of three classes, with ``losses`` by part; all have the same weights."""
    experiment = LazyExperiment(CONFIGS / STOCK[name])
    experiment.use_tiny_profile(SIDE)
    model = experiment.cfg.model
    if "roi_heads" in model:
        model.roi_heads.num_classes = 3
        for stage in model.roi_heads.get("box_predictors", []):
            stage.pop("cls_loss")
            stage._target_ = StockOutputLayers
            stage.use_sigmoid_ce = sigmoid
        if sigmoid and "box_predictor" in model.roi_heads:
            model.roi_heads.box_predictor.use_sigmoid_ce = True
    else:
        model.num_classes = 3
    for part, loss in (losses or {}).items():
        for node, cls in PARTS[part](model):
            node._target_ = cls
            node.cls_loss = loss
    torch.manual_seed(0)
    built = instantiate(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            # Detectron2's small weights of the last layers would leave all scores alike.
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    for module in built.modules():
        if isinstance(module, StockOutputLayers):
            module.cls_score.bias.data.zero_()
    return built.train()


def picture(boxes, seed):
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((SIDE, SIDE))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes)) % 3
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top : (top + bottom) // 2 + 4, left:right] = True
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator).float()
    return {"image": image, "instances": instances}


def batch(empty=False):
    """Two pictures, the second without objects; or both without."""
    boxes = [] if empty else [[4, 4, 40, 44], [30, 20, 90, 70], [50, 50, 70, 72], [2, 60, 38, 94]]
    return [picture(boxes, 0), picture([], 1)]


def train_once(model, data, amp=False, steps=1):
    """Losses, gradients and logged scalars of the last of some forward passes."""
    with EventStorage(0) as storage:
        for _ in range(steps):
            model.zero_grad()
            torch.manual_seed(2)  # the samplers draw
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                losses = model(data)
            sum(losses.values()).backward()
        scalars = {name: value for name, (value, _) in storage.latest().items()}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, gradients, scalars


def assert_same_training(name, losses, data, sigmoid=False, rtol=1e-4, **how):
    stock, model = build(name, sigmoid=sigmoid), build(name, losses)
    for ours_, theirs in zip(model.state_dict().items(), stock.state_dict().items(), strict=True):
        assert ours_[0] == theirs[0] and ours_[1].equal(theirs[1])
    expected, expected_gradients, expected_scalars = train_once(stock, data, **how)
    found, gradients, scalars = train_once(model, data, **how)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=1e-6, msg=key)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(gradients[key], gradient, rtol=rtol, atol=rtol * scale)
    if not sigmoid:  # there Detectron2 counts the background's untrained logit
        assert scalars == pytest.approx(expected_scalars, rel=1e-4)
    return found, scalars


@pytest.mark.parametrize("loss", [FOCAL, POLY1_FOCAL, POLY_N], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_dense_model_at_epsilon_0_is_its_parent(name, loss):
    found, scalars = assert_same_training(name, {name: loss}, batch())
    assert scalars["num_pos_anchors"] > 0
    assert min(found.values()) > 0


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_dense_model_without_objects(name):
    found, scalars = assert_same_training(name, {name: POLY1_FOCAL}, batch(empty=True))
    assert scalars["num_pos_anchors"] == 0
    assert max(found.values()) > 0


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_moving_average_of_the_normaliser(name):
    stock, model = build(name), build(name, {name: FOCAL})
    for net in (stock, model):
        train_once(net, batch(), steps=3)
    assert model.loss_normalizer == stock.loss_normalizer
    assert model.loss_normalizer not in (100, 300)


ALL_PARTS = {"box": POLY1_CE, "mask": POLY1_BCE, "rpn": POLY1_BCE}


def test_mask_rcnn_at_epsilon_0_is_its_parent():
    found, scalars = assert_same_training("mask_rcnn", ALL_PARTS, batch())
    assert {"mask_rcnn/accuracy", "fast_rcnn/cls_accuracy", "rpn/num_pos_anchors"} <= set(scalars)
    assert min(found.values()) > 0


def test_mask_rcnn_without_objects():
    found, _ = assert_same_training("mask_rcnn", ALL_PARTS, batch(empty=True))
    assert found["loss_mask"] == 0 and found["loss_cls"] > 0


def test_cascade_at_epsilon_0_is_its_parent():
    losses = {"stages": POLY1_CE, "mask": POLY1_BCE, "rpn": POLY1_BCE}
    found, _ = assert_same_training("cascade", losses, batch())
    assert {f"loss_cls_stage{stage}" for stage in range(3)} <= set(found)


@pytest.mark.parametrize(("name", "part"), [("mask_rcnn", "box"), ("cascade", "stages")])
def test_sigmoid_loss_in_the_box_classifier_is_detectron2s(name, part):
    assert_same_training(name, {part: POLY1_BCE}, batch(), sigmoid=True)


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("retinanet", {"retinanet": POLY1_FOCAL}),
        ("mask_rcnn", ALL_PARTS),
    ],
)
def test_mixed_precision(name, losses):
    # Not FCOS: the loss of its boxes fails in bfloat16 on a CPU, in fvcore.
    assert_same_training(name, losses, batch(), amp=True, rtol=2e-2)


def test_ignored_anchors_have_no_part():
    model = build("retinanet", {"retinanet": Poly1FocalLoss(epsilon=1.0, use_sigmoid=True)})
    stock = build("retinanet")
    generator = torch.Generator().manual_seed(3)
    anchors = [Boxes(torch.tensor([[0.0, 0, 8, 8]] * 6)), Boxes(torch.tensor([[0.0, 0, 9, 9]] * 2))]
    labels = [torch.tensor([-1, 0, 3, 3, 2, -1, 3, 1]), torch.tensor([3, 3, -1, 3, 3, 3, 3, 3])]
    boxes = [torch.tensor([[0.0, 0, 8, 8]] * 8)] * 2
    deltas = [torch.zeros(2, 6, 4), torch.zeros(2, 2, 4)]
    logits = [torch.randn(2, r, 3, generator=generator, requires_grad=True) for r in (6, 2)]

    def loss(net, logits):
        net.loss_normalizer = 100
        with EventStorage(0):
            return net.losses(anchors, logits, labels, deltas, boxes)["loss_cls"]

    first = loss(model, logits)
    first.backward()
    assert logits[0].grad[0, 0].abs().sum() == logits[0].grad[0, 5].abs().sum() == 0
    assert logits[0].grad[1, 2].abs().sum() == 0 and logits[0].grad[0, 1].abs().sum() > 0
    moved = [level.detach().clone() for level in logits]
    moved[0][0, 0] = 30.0
    torch.testing.assert_close(loss(model, moved), first.detach())

    # Focal loss and epsilon (1 - p_t)^3, by hand, over the 13 anchors that count.
    x = torch.cat(logits, dim=1).detach().double().flatten(0, 1)
    t = torch.cat(labels)
    y = F.one_hot(t.clamp_min(0), 4)[:, :3].double()
    p_t = torch.where(y == 1, x.sigmoid(), 1 - x.sigmoid())
    alpha_t = torch.where(y == 1, 0.25, 0.75)
    by_hand = (alpha_t * (1 - p_t) ** 2 * (1 - p_t - p_t.log()))[t >= 0].sum()
    # 0.9 of the old normaliser and 0.1 of the three positive anchors.
    torch.testing.assert_close(first.detach().double(), by_hand / (90 + 0.3), rtol=1e-5, atol=0)
    # And the parent agrees on which anchors these are.
    model.cls_loss = POLY1_FOCAL
    torch.testing.assert_close(loss(model, logits), loss(stock, logits))


def output_layers(loss, **settings):
    torch.manual_seed(0)
    return ours.FastRCNNOutputLayers(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=3,
        cls_loss=loss,
        **settings,
    )


def proposals(labels):
    found = Instances((SIDE, SIDE))
    found.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 8, 8]] * len(labels)).reshape(-1, 4))
    found.gt_boxes = found.proposal_boxes
    found.gt_classes = torch.tensor(labels, dtype=torch.int64)
    return found


@pytest.mark.parametrize("loss", [POLY1_CE, POLY1_BCE, FOCAL], ids=["ce", "bce", "focal"])
@pytest.mark.parametrize("found", [[proposals([]), proposals([])], []], ids=["no boxes", "nothing"])
def test_no_proposals(loss, found):
    layers = output_layers(loss)
    with EventStorage(0):
        losses = layers.losses(layers(torch.zeros(0, 8)), found)
    assert losses["loss_cls"] == 0
    sum(losses.values()).backward()
    assert layers.cls_score.weight.grad.abs().sum() == 0


def test_scores_follow_the_loss():
    features = torch.randn(5, 8)
    for loss, activation in ((FOCAL, torch.sigmoid), (POLY1_CE, lambda x: x.softmax(dim=1))):
        layers = output_layers(loss)
        predictions = layers(features)
        (scores,) = layers.predict_probs(predictions, [proposals([0] * 5)])
        torch.testing.assert_close(scores, activation(predictions[0]))


def test_classes_start_at_the_prior():
    layers = output_layers(FOCAL)
    torch.testing.assert_close(layers.cls_score.bias.sigmoid(), torch.full((4,), 0.01))
    assert output_layers(FOCAL, prior_prob=0.5).cls_score.bias.abs().sum() == 0
    assert output_layers(POLY1_CE).cls_score.bias.abs().sum() == 0


def test_accuracy_of_a_sigmoid_classifier_knows_the_background():
    layers = output_layers(FOCAL)
    # Rows: class 1 found, background found (no class above 1/2), class 2 missed, class 0 wrong.
    logits = torch.tensor([[-3.0, 2, -3, 9], [-3, -2, -1, -9], [-3, -2, -1, 9], [-3, -2, 4, 9]])
    with EventStorage(0) as storage:
        layers.losses((logits, torch.zeros(4, 12)), [proposals([1, 3, 2, 0])])
        scalars = {name: value for name, (value, _) in storage.latest().items()}
    assert scalars["fast_rcnn/cls_accuracy"] == 2 / 4
    assert scalars["fast_rcnn/fg_cls_accuracy"] == pytest.approx(1 / 3)
    assert scalars["fast_rcnn/false_negative"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("weight", [2.0, {"loss_cls": 2.0}])
def test_loss_weight_of_the_head(weight):
    predictions, found = (torch.randn(4, 4), torch.zeros(4, 12)), [proposals([0, 1, 2, 3])]
    with EventStorage(0):
        once = output_layers(POLY1_CE).losses(predictions, found)["loss_cls"]
        twice = output_layers(POLY1_CE, loss_weight=weight).losses(predictions, found)["loss_cls"]
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize(
    ("name", "losses", "key", "epsilon"),
    [
        ("retinanet", {"retinanet": Poly1FocalLoss}, "loss_cls", 1.0),
        ("fcos", {"fcos": Poly1FocalLoss}, "loss_fcos_cls", -1.0),
        ("mask_rcnn", {"box": Poly1CrossEntropyLoss}, "loss_cls", -1.0),
        ("mask_rcnn", {"mask": Poly1CrossEntropyLoss}, "loss_mask", 1.0),
        ("mask_rcnn", {"rpn": Poly1CrossEntropyLoss}, "loss_rpn_cls", 1.0),
    ],
)
def test_epsilon_changes_its_own_loss_only(name, losses, key, epsilon):
    (part, cls), sigmoid = next(iter(losses.items())), "box" not in losses
    plain, poly = (
        train_once(build(name, {part: cls(epsilon=value, use_sigmoid=sigmoid)}), batch())[0]
        for value in (0.0, epsilon)
    )
    assert (poly.pop(key) - plain.pop(key)) * epsilon > 0
    assert poly == plain


def test_class_agnostic_masks():
    experiment = LazyExperiment(CONFIGS / "mask_rcnn_ce.py")
    experiment.use_tiny_profile(SIDE)
    head = experiment.cfg.model.roi_heads.mask_head
    head.num_classes = 1
    torch.manual_seed(0)
    stock = instantiate(head)
    head._target_, head.cls_loss = ours.MaskRCNNConvUpsampleHead, POLY1_BCE
    model = instantiate(head)
    model.load_state_dict(stock.state_dict())
    (found, _) = (p["instances"] for p in batch())
    found.proposal_boxes = found.gt_boxes
    features = torch.randn(4, 64, 14, 14)
    with EventStorage(0):
        expected, got = stock(features, [found]), model(features, [found])
    torch.testing.assert_close(got["loss_mask"], expected["loss_mask"])


def test_predictions_are_those_of_the_parent():
    torch.manual_seed(0)
    for name, losses in (("retinanet", {"retinanet": FOCAL}), ("mask_rcnn", ALL_PARTS)):
        stock, model = build(name).eval(), build(name, losses).eval()
        with torch.no_grad():
            (expected, _), (found, _) = stock(batch()), model(batch())
        expected, found = expected["instances"].get_fields(), found["instances"].get_fields()
        assert len(expected["scores"]) > 0
        assert found["scores"].equal(expected["scores"])
        assert found["pred_boxes"].tensor.equal(expected["pred_boxes"].tensor)
        if name == "mask_rcnn":
            assert found["pred_masks"].equal(expected["pred_masks"])


def test_class_weights_leave_the_checkpoint_alone():
    loss = Poly1FocalLoss(epsilon=1.0, use_sigmoid=True, class_weight=[1.0, 2.0, 3.0])
    stock, model = build("retinanet"), build("retinanet", {"retinanet": loss})
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert any(name.endswith("class_weight") for name, _ in model.named_buffers())


def test_a_dictionary_is_the_loss_of_mmdetection():
    settings = dict(
        type="polyfocal.Poly1FocalLoss", epsilon=0.5, use_sigmoid=True, alpha=[0.1, 0.2]
    )
    loss = ours.build_loss(settings, "here")
    assert type(loss) is Poly1FocalLoss and loss.epsilon == 0.5
    torch.testing.assert_close(loss.alpha, torch.tensor([0.1, 0.2]))
    assert settings["type"] == "polyfocal.Poly1FocalLoss", "the config is left as it is"
    assert ours.build_loss(loss, "here") is loss


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (POLY1_CE, "cls_loss of RetinaNet is a Poly1CrossEntropyLoss of softmax form"),
        ({"type": "FocalLos"}, "cls_loss of RetinaNet has type 'FocalLos': expected one of Focal"),
        ({}, "cls_loss of RetinaNet has type None"),
        ({"type": "FocalLoss", "gama": 1}, "FocalLoss has no keyword 'gama'"),
        ({"type": "FocalLoss"}, "FocalLoss has use_sigmoid=None"),
        (torch.nn.ReLU(), "is a ReLU: expected a loss of polyfocal"),
    ],
)
def test_a_wrong_loss_is_refused_when_the_model_is_built(loss, message):
    with pytest.raises(UserError, match=message):
        build("retinanet", {"retinanet": loss})


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(use_fed_loss=True), "use_fed_loss"), (dict(prior_prob=0), "prior_prob=0")],
)
def test_wrong_settings_of_the_box_classifier(settings, message):
    with pytest.raises(UserError, match=message):
        output_layers(FOCAL, **settings)


@pytest.mark.parametrize("cls", [ours.RPN, ours.MaskRCNNConvUpsampleHead])
def test_softmax_is_refused_where_scores_are_sigmoids(cls):
    part = {ours.RPN: "rpn", ours.MaskRCNNConvUpsampleHead: "mask"}[cls]
    with pytest.raises(UserError, match=f"{cls.__name__} is a Poly1CrossEntropyLoss of softmax"):
        build("mask_rcnn", {part: POLY1_CE})


@pytest.mark.parametrize(
    ("registry", "name"),
    [
        (d2.META_ARCH_REGISTRY, "RetinaNet"),
        (d2.ROI_HEADS_REGISTRY, "StandardROIHeads"),
        (d2.ROI_HEADS_REGISTRY, "CascadeROIHeads"),
        (d2.ROI_MASK_HEAD_REGISTRY, "MaskRCNNConvUpsampleHead"),
        (d2.PROPOSAL_GENERATOR_REGISTRY, "RPN"),
    ],
)
def test_registered_beside_its_parent(registry, name):
    assert issubclass(registry.get(f"Polyfocal{name}"), getattr(ours, name))
    assert issubclass(getattr(ours, name), registry.get(name))
    assert registry.get(name).__module__.startswith("detectron2")


def test_yaml_builds_every_part():
    cfg = get_cfg()
    ours.add_polyfocal_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "mask_rcnn_poly1.yaml"))
    bce = {"type": "Poly1CrossEntropyLoss", "use_sigmoid": True, "epsilon": 0.5}
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PolyfocalRPN"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PolyfocalMaskRCNNConvUpsampleHead"
    cfg.MODEL.RPN.CLS_LOSS.update(bce)
    cfg.MODEL.ROI_MASK_HEAD.CLS_LOSS.update(bce)
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = type(cfg)({"type": "FocalLoss", "use_sigmoid": True})
    cfg.MODEL.ROI_BOX_HEAD.PRIOR_PROB = 0.1
    model = d2.build_model(cfg)
    assert model.proposal_generator.cls_loss.epsilon == 0.5
    assert model.roi_heads.mask_head.cls_loss.epsilon == 0.5
    assert isinstance(model.roi_heads.box_predictor.cls_loss, FocalLoss)
    assert model.roi_heads.box_predictor.cls_score.bias[0].item() == pytest.approx(-math.log(9))

    cfg.merge_from_file(str(CONFIGS / "cascade_mask_rcnn_poly1.yaml"))
    cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS = type(cfg)({"type": "FocalLoss", "use_sigmoid": True})
    stages = d2.build_model(cfg).roi_heads.box_predictor
    assert [type(stage.cls_loss) for stage in stages] == [FocalLoss] * 3
    assert [stage.box2box_transform.weights[0] for stage in stages] == [10, 20, 30]


def test_lists_of_a_lazy_config_reach_the_loss():
    from detectron2.config import LazyCall

    node = LazyCall(PolyNLoss)(epsilons=[0.5, 0.2], use_sigmoid=True, class_weight=[1.0, 2.0])
    LazyConfig.apply_overrides(node, ["epsilons=[0.25,0.125]"])
    loss = instantiate(node)
    assert loss.epsilons == (0.25, 0.125)
    torch.testing.assert_close(loss.class_weight, torch.tensor([1.0, 2.0]))


MM_LOSSES = [
    dict(type="polyfocal.Poly1FocalLoss", epsilon=1.0, use_sigmoid=True, loss_weight=2.0),
    dict(type="polyfocal.FocalLoss", use_sigmoid=True, class_weight=[1.0, 2.0, 0.5]),
    dict(type="polyfocal.PolyNLoss", epsilons=[0.5, -0.25], use_sigmoid=True),
]


@pytest.mark.parametrize("settings", MM_LOSSES, ids=lambda settings: settings["type"])
def test_retinanet_has_the_value_of_the_mmdetection_head(settings):
    pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
    from mmdet.registry import MODELS

    import polyfocal.mmdet  # noqa: F401

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 3, generator=generator)
    labels = torch.randint(-1, 4, (2, 7), generator=generator)
    head = MODELS.build(
        dict(type="mmdet.RetinaHead", num_classes=3, in_channels=8, loss_cls=settings)
    )
    model = build("retinanet", {"retinanet": settings})
    with EventStorage(0):
        found = model.losses(
            [Boxes(torch.tensor([[0.0, 0, 8, 8]] * 7))],
            [logits],
            list(labels),
            [torch.zeros(2, 7, 4)],
            [torch.tensor([[0.0, 0, 8, 8]] * 7)] * 2,
        )["loss_cls"]
    # MMDetection labels an ignored anchor background and gives it no weight.
    expected = head.loss_cls(
        logits.flatten(0, 1),
        labels.flatten().where(labels.flatten() >= 0, torch.tensor(3)),
        (labels.flatten() >= 0).float(),
        avg_factor=model.loss_normalizer,
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=-1.0, use_sigmoid=False),
        dict(type="polyfocal.FocalLoss", use_sigmoid=False, class_weight=[1.0, 2.0, 0.5, 0.25]),
        dict(type="polyfocal.Poly1FocalLoss", epsilon=1.0, use_sigmoid=True),
    ],
    ids=["poly1 ce", "focal softmax", "poly1 focal sigmoid"],
)
def test_box_classifier_has_the_value_of_the_mmdetection_head(settings):
    pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
    from mmdet.registry import MODELS

    import polyfocal.mmdet  # noqa: F401

    sigmoid = settings["use_sigmoid"]
    loss_cls = dict(type="polyfocal.RoILoss", loss=settings) if sigmoid else settings
    head = MODELS.build(
        dict(
            type="mmdet.BBoxHead", num_classes=3, in_channels=8, roi_feat_size=1, loss_cls=loss_cls
        )
    )
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 2, 1, 3, 3])
    expected = head.loss(
        logits[:, :3] if sigmoid else logits,
        None,
        torch.zeros(6, 5),
        labels,
        torch.ones(6),
        torch.zeros(6, 4),
        torch.zeros(6, 4),
    )["loss_cls"]
    with EventStorage(0):
        found = output_layers(settings).losses(
            (logits, torch.zeros(6, 12)), [proposals(labels.tolist())]
        )
    torch.testing.assert_close(found["loss_cls"], expected)
