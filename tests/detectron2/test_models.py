"""The classes with a loss of their own, against their parents in Detectron2."""

import copy

import pytest

pytest.importorskip("detectron2_models")

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import meta_arch, roi_heads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2_models import SIDE, build, model_config, pictures, recorded, training_step
from fvcore.nn import sigmoid_focal_loss
from reference import sigmoid_loss

from polyfocal import errors
from polyfocal import losses as plugin
from polyfocal.detectron2 import (
    FCOS,
    RPN,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    RetinaNet,
    build_loss,
)

FOCAL = dict(type="FocalLoss", use_sigmoid=True)
POLY1_FOCAL = dict(type="Poly1FocalLoss", epsilon=0.0, use_sigmoid=True)
POLY_N = dict(type="polyfocal.PolyNLoss", epsilons=[0.0, 0.0], gamma=2.0, use_sigmoid=True)
POLY_N["alpha"] = 0.25
SOFTMAX = dict(type="Poly1CrossEntropyLoss", epsilon=0.0, use_sigmoid=False)
SIGMOID = dict(type="Poly1CrossEntropyLoss", epsilon=0.0, use_sigmoid=True)

DENSE = {"retinanet_focal": RetinaNet, "fcos_focal": FCOS}


def predictors(config):
    """The nodes of the box classifiers: one, or one a stage of a cascade."""
    heads = config.roi_heads
    return heads.box_predictors if "box_predictors" in heads else [heads.box_predictor]


def dense(name, loss):
    config = model_config(name)
    config._target_ = DENSE[name]
    config.cls_loss = loss
    return config


def rcnn(name, box=None, mask=None, rpn=None):
    config = model_config(name)
    for node in predictors(config) if box else ():
        node._target_, node.cls_loss = FastRCNNOutputLayers, box
    if mask:
        head = config.roi_heads.mask_head
        head._target_, head.cls_loss = MaskRCNNConvUpsampleHead, mask
    if rpn:
        config.proposal_generator._target_ = RPN
        config.proposal_generator.cls_loss = rpn
    return config


def assert_same_training(stock, ours, batch):
    """Losses, gradients and statistics are the same, with the weights of one in the other."""
    ours.load_state_dict(stock.state_dict(), strict=True)
    expected, expected_gradients, expected_statistics = training_step(stock, batch)
    found, gradients, statistics = training_step(ours, batch)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-4 * scale)
    assert statistics == pytest.approx(expected_statistics)
    return expected


@pytest.mark.parametrize("counts", [(4, 0), (0, 0)], ids=["one empty picture", "all empty"])
@pytest.mark.parametrize("loss", [FOCAL, POLY1_FOCAL, POLY_N], ids=lambda loss: loss["type"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_model_at_epsilon_0_is_the_parent(name, loss, counts):
    stock, ours = build(model_config(name)), build(dense(name, loss))
    assert_same_training(stock, ours, pictures(counts))
    # A second step: the moving average of the normaliser goes on.
    assert_same_training(stock, ours, pictures(counts))
    assert ours.loss_normalizer == stock.loss_normalizer


@pytest.mark.parametrize("counts", [(4, 0), (0, 0)], ids=["one empty picture", "all empty"])
@pytest.mark.parametrize("name", ["mask_rcnn_ce", "cascade_mask_rcnn_poly1"])
def test_rcnn_at_epsilon_0_is_the_parent(name, counts):
    stock = model_config(name)
    for node in predictors(stock):
        node._target_ = roi_heads.FastRCNNOutputLayers
        node.pop("cls_loss", None)
    ours = rcnn(name, box=SOFTMAX, mask=SIGMOID, rpn=SIGMOID)
    losses = assert_same_training(build(stock), build(ours), pictures(counts))
    if any(counts):
        assert all(value > 0 for value in losses.values())


@pytest.mark.parametrize("name", ["mask_rcnn_ce", "cascade_mask_rcnn_poly1"])
def test_sigmoid_in_the_box_head_is_detectron2s_sigmoid_cross_entropy(name):
    stock = model_config(name)
    for node in predictors(stock):
        node._target_ = roi_heads.FastRCNNOutputLayers
        node.pop("cls_loss", None)
        node.use_sigmoid_ce = True
    stock, ours = build(stock), build(rcnn(name, box=SIGMOID))
    batch = pictures()
    ours.load_state_dict(stock.state_dict())
    expected, expected_gradients, _ = training_step(stock, batch)
    found, gradients, statistics = training_step(ours, batch)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5)
    assert any(key.endswith("cls_accuracy") for key in statistics)


def test_ignored_anchors_have_no_say():
    model = build(dense("retinanet_focal", dict(POLY1_FOCAL, epsilon=1.0)))
    with recorded(model, "losses") as calls:
        training_step(model, pictures())
    ((anchors, logits, labels, *rest),) = calls
    ignored = torch.stack(labels) == -1
    assert ignored.sum() > 10
    sizes = [level.shape[1] for level in logits]
    changed = torch.cat(logits, dim=1).detach().clone()
    changed[ignored] = 50.0
    changed = list(changed.split(sizes, dim=1))
    with EventStorage():
        before, after = (
            copy.deepcopy(model).losses(anchors, levels, labels, *rest)["loss_cls"]
            for levels in (logits, changed)
        )
    assert after == before


def test_dense_value_is_the_papers_formula():
    """Against a slow float64 implementation that shares nothing with the package."""
    loss = dict(POLY1_FOCAL, epsilon=0.7, gamma=1.5, alpha=0.3)
    model = build(dense("retinanet_focal", loss))
    with recorded(model, "losses") as calls:
        losses, _, _ = training_step(model, pictures())
    ((_, logits, labels, *_),) = calls
    rows = torch.cat(logits, dim=1).flatten(0, 1).detach().double()
    labels = torch.cat(labels)
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    terms = sigmoid_loss(rows.numpy(), labels.numpy(), alpha=0.3, gamma=1.5, epsilons=(0.7,))
    assert losses["loss_cls"].item() == pytest.approx(terms.sum() / model.loss_normalizer, rel=1e-5)


def test_dense_loss_is_of_float32_under_autocast():
    # RetinaNet only: the loss of FCOS's boxes, in fvcore, fails in bfloat16 on a CPU.
    model = build(dense("retinanet_focal", POLY1_FOCAL))
    with recorded(model, "losses") as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients, _ = training_step(model, pictures())
    ((_, logits, labels, *_),) = calls
    assert logits[0].dtype == torch.bfloat16
    rows, labels = torch.cat(logits, dim=1).flatten(0, 1).detach(), torch.cat(labels)
    rows, labels = rows[labels >= 0].float(), labels[labels >= 0]
    target = torch.nn.functional.one_hot(labels, 4)[:, :3].float()
    expected = sigmoid_focal_loss(rows, target, alpha=0.25, gamma=2.0, reduction="sum")
    assert losses["loss_cls"].dtype == torch.float32
    torch.testing.assert_close(losses["loss_cls"], expected / model.loss_normalizer)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_rcnn_under_autocast():
    ours = build(rcnn("mask_rcnn_ce", box=SOFTMAX, mask=SIGMOID, rpn=SIGMOID))
    stock = build(model_config("mask_rcnn_ce"))
    stock.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _, _ = training_step(stock, pictures())
        found, gradients, _ = training_step(ours, pictures())
    for key, value in expected.items():
        torch.testing.assert_close(found[key].float(), value.float(), rtol=2e-2, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.fixture
def storage():
    with EventStorage() as storage:
        yield storage


def output_layers(cls=FastRCNNOutputLayers, **settings):
    torch.manual_seed(0)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    return cls(ShapeSpec(channels=8), box2box_transform=transform, num_classes=3, **settings)


def regions(count):
    instances = Instances((SIDE, SIDE))
    instances.proposal_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 40.0]]).repeat(count, 1))
    instances.gt_boxes = Boxes(torch.tensor([[6.0, 2.0, 44.0, 39.0]]).repeat(count, 1))
    instances.gt_classes = torch.arange(count) % 4
    return instances


@pytest.mark.parametrize("loss", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "proposals", [[], [0], [0, 0]], ids=["no picture", "one picture", "two pictures"]
)
def test_no_proposals(loss, proposals, storage):
    layers = output_layers(cls_loss=loss)
    predictions = layers(torch.zeros(0, 8))
    losses = layers.losses(predictions, [regions(count) for count in proposals])
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(
        ("loss_cls", "loss_box_reg"), 0.0
    )
    sum(losses.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in layers.parameters())


@pytest.mark.parametrize("cls", [roi_heads.FastRCNNOutputLayers, FastRCNNOutputLayers])
def test_no_proposals_of_no_picture_are_a_loss_of_0_as_in_detectron2(cls, storage):
    settings = {"cls_loss": SOFTMAX} if cls is FastRCNNOutputLayers else {}
    # In the other form Detectron2's own fails.
    layers = output_layers(cls, cls_agnostic_bbox_reg=True, **settings)
    losses = layers.losses(layers(torch.zeros(0, 8)), [])
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert all(value.item() == 0 for value in losses.values())


@pytest.mark.parametrize("few", [1, 2, 3], ids=lambda few: f"{few} of 3 classes")
def test_federated_loss_is_detectron2s(few, storage):
    frequencies = torch.tensor([0.7, 0.2, 0.1])
    settings = dict(
        use_fed_loss=True,
        fed_loss_num_classes=few + 1,  # the background is one of them, as Detectron2 counts
        get_fed_loss_cls_weights=lambda: frequencies,
    )
    stock = output_layers(roi_heads.FastRCNNOutputLayers, use_sigmoid_ce=True, **settings)
    ours = output_layers(cls_loss=SIGMOID, **settings)
    ours.load_state_dict(stock.state_dict(), strict=True)
    region = regions(6)
    region.gt_classes = torch.tensor([0, 3, 3, 0, 3, 3])
    features = torch.randn(6, 8)
    drawn = []
    for layers in (stock, ours):
        torch.manual_seed(3)
        losses = layers.losses(layers(features), [region])
        losses["loss_cls"].backward()
        drawn.append((losses["loss_cls"].item(), layers.cls_score.weight.grad, torch.rand(1)))
    assert drawn[1][0] == pytest.approx(drawn[0][0], rel=1e-5) and drawn[0][0] > 0
    torch.testing.assert_close(drawn[1][1], drawn[0][1], rtol=1e-4, atol=1e-6)
    assert drawn[1][2] == drawn[0][2], "as many random numbers are drawn"
    nothing = ours.losses(ours(features[:0]), [regions(0)])["loss_cls"]
    assert nothing == 0 and nothing.requires_grad


def test_activation_follows_the_loss():
    features = torch.randn(5, 8)
    for loss, activation in ((SOFTMAX, torch.softmax), (SIGMOID, None)):
        layers = output_layers(cls_loss=loss)
        logits = layers.cls_score(features)
        (scores,) = layers.predict_probs(layers(features), [regions(5)])
        expected = activation(logits, -1) if activation else logits.sigmoid()
        torch.testing.assert_close(scores, expected)
        assert layers.cls_score.out_features == 4


def test_prior_of_a_sigmoid_loss():
    assert output_layers(cls_loss=SOFTMAX).cls_score.bias.tolist() == [0.0] * 4
    for settings, prior in (({}, 0.01), ({"prior_prob": 0.2}, 0.2)):
        bias = output_layers(cls_loss=SIGMOID, **settings).cls_score.bias
        torch.testing.assert_close(bias.sigmoid(), torch.full((4,), prior))


def test_loss_weight_of_the_head_and_of_the_loss_multiply(storage):
    predictions = torch.randn(6, 4), torch.zeros(6, 12)
    one = output_layers(cls_loss=SOFTMAX).losses(predictions, [regions(6)])["loss_cls"]
    layers = output_layers(cls_loss=dict(SOFTMAX, loss_weight=3.0), loss_weight={"loss_cls": 0.5})
    both = layers.losses(predictions, [regions(6)])["loss_cls"]
    torch.testing.assert_close(both, 1.5 * one)


def test_statistics_of_a_sigmoid_loss_count_low_scores_as_background(storage):
    logits = torch.tensor([[3.0, -3, -3, 9], [-3, 3, -3, 9], [-3, -3, -3, -9], [-1, -2, -3, -9]])
    region = regions(4)
    region.gt_classes = torch.tensor([0, 2, 3, 0])
    output_layers(cls_loss=SIGMOID).losses((logits, torch.zeros(4, 12)), [region])
    latest = storage.latest()
    assert latest["fast_rcnn/cls_accuracy"][0] == 0.5  # rows 0 and 2
    assert latest["fast_rcnn/false_negative"][0] == pytest.approx(1 / 3)  # row 3


def test_class_agnostic_masks(storage):
    settings = dict(num_classes=1, conv_dims=[4])
    shape = ShapeSpec(channels=8, width=7, height=7)
    stock = roi_heads.MaskRCNNConvUpsampleHead(shape, **settings)
    ours = MaskRCNNConvUpsampleHead(shape, cls_loss=SIGMOID, **settings)
    ours.load_state_dict(stock.state_dict(), strict=True)
    region, (picture,) = regions(2), pictures((2,))
    region.gt_masks = picture["instances"].gt_masks
    features = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(
        ours(features, [region])["loss_mask"], stock(features, [region])["loss_mask"]
    )
    nothing = ours(features[:0], [regions(0)])["loss_mask"]
    assert nothing == 0 and nothing.requires_grad


def test_mask_head_predicts_as_its_parent():
    config = rcnn("mask_rcnn_ce", mask=dict(SIGMOID, class_weight=None))
    stock, ours = build(model_config("mask_rcnn_ce")), build(config)
    ours.load_state_dict(stock.state_dict())
    batch = [{"image": picture["image"]} for picture in pictures()]
    stock.roi_heads.box_predictor.test_score_thresh = 0.0
    ours.roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        expected, found = (model.eval()(batch) for model in (stock, ours))
    assert len(expected[0]["instances"]) > 0
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other["instances"].scores, one["instances"].scores)
        assert torch.equal(other["instances"].pred_masks, one["instances"].pred_masks)


@pytest.mark.parametrize(
    ("make", "stock"),
    [
        (lambda loss: dense("retinanet_focal", loss), "retinanet_focal"),
        (lambda loss: dense("fcos_focal", loss), "fcos_focal"),
        (lambda loss: rcnn("mask_rcnn_ce", loss, *[dict(loss, alpha=0.5)] * 2), "mask_rcnn_ce"),
    ],
)
def test_checkpoints_are_exchanged_with_the_stock_model(make, stock):
    # Weights of classes are state too, but not of the checkpoint.
    loss = dict(FOCAL, alpha=[0.2, 0.3, 0.4])
    ours, stock = build(make(loss)), build(model_config(stock))
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)


def test_epsilon_changes_the_classification_losses_only():
    plain = training_step(build(rcnn("mask_rcnn_ce", SOFTMAX, SIGMOID, SIGMOID)), pictures())[0]
    poly = training_step(
        build(
            rcnn(
                "mask_rcnn_ce",
                dict(SOFTMAX, epsilon=-1.0),
                dict(SIGMOID, epsilon=1.0),
                dict(SIGMOID, epsilon=1.0),
            )
        ),
        pictures(),
    )[0]
    for name, sign in (("loss_cls", -1), ("loss_mask", 1), ("loss_rpn_cls", 1)):
        assert sign * (poly[name] - plain[name]) > 0
    for name in ("loss_box_reg", "loss_rpn_loc"):
        torch.testing.assert_close(poly[name], plain[name])


def test_a_built_loss_and_its_config_are_the_same():
    built = plugin.Poly1FocalLoss(epsilon=0.5, gamma=1.0, use_sigmoid=True)
    assert build_loss(built, "RetinaNet") is built
    config = dict(type="Poly1FocalLoss", epsilon=0.5, gamma=1.0, use_sigmoid=True)
    assert repr(build_loss(config, "RetinaNet")) == repr(built)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense("retinanet_focal", SOFTMAX), "RetinaNet is a Poly1CrossEntropyLoss of soft"),
        (lambda: dense("fcos_focal", dict(FOCAL, gamma=-1)), "gamma=-1: expected"),
        (lambda: dense("retinanet_focal", dict(FOCAL, gama=1)), "no keyword 'gama'"),
        (
            lambda: dense("retinanet_focal", dict(use_sigmoid=True)),
            "there is no loss 'None'",
        ),
        (lambda: dense("retinanet_focal", dict(type="DiceLoss")), "there is no loss 'DiceLoss'"),
        (lambda: rcnn("mask_rcnn_ce", mask=SOFTMAX), "write use_sigmoid=True"),
        (lambda: rcnn("mask_rcnn_ce", rpn=SOFTMAX), "cls_loss of RPN"),
        (
            lambda: dense("retinanet_focal", dict(FOCAL, alpha=[0.2, 0.3])),
            "cls_loss of RetinaNet does not fit: alpha",
        ),
        (
            lambda: dense("fcos_focal", dict(FOCAL, class_weight=[1.0] * 4)),
            "cls_loss of FCOS does not fit: class_weight",
        ),
        (
            lambda: rcnn("mask_rcnn_ce", rpn=dict(SIGMOID, class_weight=[1.0, 2.0])),
            "cls_loss of RPN does not fit: class_weight",
        ),
        (
            lambda: {**dense("retinanet_focal", FOCAL), "focal_loss_gamma": 1.0},
            "focal_loss_gamma=1.0, which its cls_loss takes the place of: write gamma",
        ),
        (
            lambda: {**dense("fcos_focal", FOCAL), "focal_loss_alpha": 0.5},
            "FCOS has focal_loss_alpha=0.5",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_the_model_is_built(make, message):
    with pytest.raises(errors.UserError, match=message):
        build(make())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(cls_loss=torch.nn.BCELoss()), "is a BCELoss: expected a loss of polyfocal"),
        (dict(cls_loss=SIGMOID, prior_prob=1.0), "prior_prob=1.0: expected"),
        (
            dict(cls_loss=SOFTMAX, prior_prob=0.1),
            "prior_prob is for a sigmoid loss",
        ),
        (dict(cls_loss=SOFTMAX, use_sigmoid_ce=True), "use_sigmoid_ce is for a sigmoid loss"),
        (dict(cls_loss=SOFTMAX, use_fed_loss=True), "use_fed_loss is for a sigmoid loss, but"),
        (
            dict(cls_loss=dict(SOFTMAX, class_weight=[1.0, 1.0, 1.0])),
            "cls_loss of FastRCNNOutputLayers does not fit: class_weight",
        ),
    ],
)
def test_wrong_settings_of_the_box_head(settings, message):
    with pytest.raises(errors.UserError, match=message):
        output_layers(**settings)


def test_same_value_as_in_mmdetection():
    """The head of MMDetection and the model of Detectron2 give one loss for one config."""
    pytest.importorskip("mmdet", reason="needs MMDetection beside Detectron2")
    from mmdet.registry import MODELS

    import polyfocal.mmdet

    assert polyfocal.mmdet
    for config in (
        dict(type="polyfocal.Poly1FocalLoss", epsilon=1.0, use_sigmoid=True),
        dict(type="polyfocal.FocalLoss", use_sigmoid=True),
        dict(type="polyfocal.PolyNLoss", epsilons=[0.5, 0.2], use_sigmoid=True),
    ):
        model = build(dense("retinanet_focal", config))
        with recorded(model, "losses") as calls:
            losses, _, _ = training_step(model, pictures())
        ((_, logits, labels, *_),) = calls
        labels = torch.cat(labels)
        head = MODELS.build(
            dict(
                type="mmdet.RetinaHead",
                num_classes=3,
                in_channels=8,
                anchor_generator=dict(
                    type="mmdet.AnchorGenerator", scales=[8], ratios=[1.0], strides=[8]
                ),
                loss_cls=config,
            )
        )
        # As AnchorHead.loss_by_feat_single gives them: a weight of 0 is an ignored anchor.
        value = head.loss_cls(
            torch.cat(logits, dim=1).reshape(-1, head.cls_out_channels),
            labels.clamp_min(0),
            (labels >= 0).float(),
            avg_factor=model.loss_normalizer,
        )
        torch.testing.assert_close(losses["loss_cls"], value.detach())


@pytest.mark.parametrize(
    "config",
    [
        dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=-1.0, use_sigmoid=False),
        dict(type="polyfocal.FocalLoss", use_sigmoid=False, class_weight=[1.0, 2.0, 0.5, 0.25]),
        dict(type="polyfocal.Poly1FocalLoss", epsilon=1.0, use_sigmoid=True),
    ],
    ids=["softmax", "class weights", "sigmoid"],
)
def test_box_head_has_the_value_of_mmdetections(config, storage):
    pytest.importorskip("mmdet", reason="needs MMDetection beside Detectron2")
    from mmdet.registry import MODELS

    import polyfocal.mmdet

    assert polyfocal.mmdet
    sigmoid = config["use_sigmoid"]
    loss_cls = dict(type="polyfocal.RoILoss", loss=config) if sigmoid else config
    settings = dict(num_classes=3, in_channels=8, roi_feat_size=1, loss_cls=loss_cls)
    head = MODELS.build(dict(type="mmdet.BBoxHead", **settings))
    logits, region = torch.randn(6, 4), regions(6)
    scores, nothing = logits[:, :3] if sigmoid else logits, torch.zeros(6, 4)
    weights = torch.ones(6), nothing, nothing
    expected = head.loss(scores, None, torch.zeros(6, 5), region.gt_classes, *weights)["loss_cls"]
    predictions = logits, torch.zeros(6, 12)
    found = output_layers(cls_loss=config).losses(predictions, [region])["loss_cls"]
    torch.testing.assert_close(found, expected)


def test_parents_are_detectron2s():
    assert issubclass(RetinaNet, meta_arch.RetinaNet) and issubclass(FCOS, meta_arch.FCOS)


def test_calibrated_losses_are_built():
    config = dict(type="DualFocalLoss", gamma=2.0, use_sigmoid=False)
    loss = build_loss(config, "a head", needs_sigmoid=False)
    assert isinstance(loss, plugin.DualFocalLoss)


def test_a_loss_of_the_users_is_taken():
    class Mine(plugin.FocalLoss):
        pass

    mine = Mine(use_sigmoid=True)
    assert build_loss(mine, "RetinaNet") is mine


class Source(plugin.BiasSource):
    def forward(self, pred, use_sigmoid):
        return pred


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda: plugin.NoisedTopKLoss(1, 1.0),
            "NoisedTopKLoss, whose scores would be near",
        ),
        (lambda: plugin.AdaFocalLoss(), "AdaFocalLoss, whose gammas move .*: take DualFocalLoss"),
        (
            lambda: plugin.Poly1VarifocalLoss(epsilon=0.0, use_sigmoid=True),
            "labels only: take",
        ),
        (lambda: plugin.LDAMLoss([9, 5, 2, 50]), "LDAMLoss, whose scores need its scale 30"),
        (lambda: plugin.DebiasedFocalLoss(use_sigmoid=True), "DebiasedFocalLoss, with no bias"),
        (lambda: plugin.ProductOfExpertsLoss(use_sigmoid=True), "with no bias"),
        (lambda: plugin.ReweightedCrossEntropyLoss(use_sigmoid=True), "with no bias"),
        (
            lambda: plugin.ConfidenceRegularizationLoss(
                use_sigmoid=True, bias=plugin.ClassPriors([1.0, 2.0])
            ),
            "with no teacher",
        ),
        (
            lambda: plugin.DebiasedFocalLoss(use_sigmoid=True, bias=Source()),
            "with a Source as bias: expected ClassPriors",
        ),
        (
            lambda: dict(type="DebiasedFocalLoss", use_sigmoid=True, bias=dict(type="BiasHead")),
            "bias has type 'BiasHead': expected ClassPriors",
        ),
        (
            lambda: plugin.Poly1FocalLoss(epsilon=1.0, use_sigmoid=True, activated=True),
            "activated=True, but Detectron2's heads hand logits",
        ),
        (
            lambda: plugin.GaussianPoly1FocalLoss(epsilon=1.0),
            "is a GaussianPoly1FocalLoss: exp",
        ),
        (
            lambda: dict(type="GaussianPoly1FocalLoss", epsilon=0.0),
            "is a GaussianPoly1FocalLoss: expected",
        ),
    ],
)
def test_what_detectron2_cannot_give_is_refused_when_it_is_built(loss, message):
    with pytest.raises(errors.UserError, match=message):
        build_loss(loss(), "a head", needs_sigmoid=False)


def test_debiased_loss_with_class_priors(storage):
    """Product of experts: cross-entropy of the logits and the priors' logarithms together."""
    counts = [1.0, 2.0, 3.0, 14.0]
    config = dict(type="ProductOfExpertsLoss", use_sigmoid=False)
    config["bias"] = dict(type="ClassPriors", class_counts=counts)
    logits, region = torch.randn(6, 4), regions(6)
    layers = output_layers(cls_loss=config)
    found = layers.losses((logits, torch.zeros(6, 12)), [region])["loss_cls"]
    together = logits + (torch.tensor(counts) / 20).log()
    expected = torch.nn.functional.cross_entropy(together, region.gt_classes)
    torch.testing.assert_close(found, expected)
    with pytest.raises(errors.UserError, match="does not fit: ClassPriors has 3 classes"):
        output_layers(cls_loss=dict(config, bias=dict(type="ClassPriors", class_counts=counts[1:])))


def test_ldam_loss_with_scale_1(storage):
    counts = torch.tensor([16.0, 81.0, 1.0, 256.0])
    config = dict(type="LDAMLoss", class_counts=counts.tolist(), scale=1.0)
    logits, region = torch.randn(6, 4), regions(6)
    found = output_layers(cls_loss=config).losses((logits, torch.zeros(6, 12)), [region])
    margins = 0.5 * torch.tensor([1 / 2, 1 / 3, 1, 1 / 4])
    changed = logits.clone()
    changed[torch.arange(6), region.gt_classes] -= margins[region.gt_classes]
    expected = torch.nn.functional.cross_entropy(changed, region.gt_classes)
    torch.testing.assert_close(found["loss_cls"], expected)
