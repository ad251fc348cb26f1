"""The losses inside whole MMDetection models, against the framework's own losses there."""

import copy
import inspect
import json
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.models.layers import NormedLinear
from mmdet.models.losses import accuracy
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet_models import CONFIGS, batch, tiny_model
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from polyfocal import heads
from polyfocal.mmengine import AdaFocalHook

STOCK_FOCAL = dict(type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
STOCK_CE = dict(type="mmdet.CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)
STOCK_BCE = dict(type="mmdet.CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0)

FOCAL = dict(type="polyfocal.FocalLoss", use_sigmoid=True)
POLY1_FOCAL = dict(type="polyfocal.Poly1FocalLoss", epsilon=0.0, use_sigmoid=True)
POLY1_CE = dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=0.0, use_sigmoid=False)
POLY1_BCE = dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=0.0, use_sigmoid=True)
POLY_N = dict(
    type="polyfocal.PolyNLoss", epsilons=(0.0, 0.0), gamma=2.0, alpha=0.25, use_sigmoid=True
)


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def losses_and_gradients(model):
    inputs, samples = batch(model)
    model.train()
    torch.manual_seed(2)  # the samplers and the denoising queries draw
    losses = model.loss(inputs, samples)
    flat = {k: (sum(v) if isinstance(v, list) else v) for k, v in losses.items()}
    total = sum(v.sum() for k, v in flat.items() if "loss" in k)
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in flat.items()}, gradients


def assert_same_training(name, stock, ours, stock_mask=None, our_mask=None):
    """Every term of the loss and the gradient of every parameter are those of the stock model."""
    expected, expected_gradients = losses_and_gradients(tiny_model(name, stock, stock_mask))
    found, gradients = losses_and_gradients(tiny_model(name, ours, our_mask))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # ours is a scalar where a normaliser of shape (1,) makes the stock loss (1,)
        torch.testing.assert_close(found[key].squeeze(), value.squeeze(), rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-4 * scale)
    assert any(v.abs().sum() > 0 for k, v in expected.items() if "loss_cls" in k or "rpn_cls" in k)


@pytest.mark.parametrize("name", ["retina", "fcos", "atss"])
@pytest.mark.parametrize("ours", [FOCAL, POLY1_FOCAL, POLY_N], ids=lambda c: c["type"])
def test_dense_head_at_epsilon_0_is_stock_focal(name, ours):
    assert_same_training(name, STOCK_FOCAL, ours)


@pytest.mark.parametrize("name", ["retina", "fcos"])
def test_dense_head_takes_a_softmax_loss(name):
    assert_same_training(name, STOCK_CE, POLY1_CE)


@pytest.mark.parametrize(("stock", "ours"), [(STOCK_BCE, POLY1_BCE), (STOCK_CE, POLY1_CE)])
def test_rpn_at_epsilon_0_is_stock(stock, ours):
    assert_same_training("rpn", stock, ours)
    scores = []
    for loss in (stock, ours):
        model = tiny_model("rpn", loss).eval()
        with torch.no_grad():
            results = model.predict(*batch(model))
        scores.append(torch.cat([one.pred_instances.scores for one in results]))
    assert len(scores[0])
    torch.testing.assert_close(scores[1], scores[0])


@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_softmax_loss_in_roi_heads(name):
    assert_same_training(name, STOCK_CE, POLY1_CE)


def test_mask_head_at_epsilon_0_is_stock():
    stock = dict(type="mmdet.CrossEntropyLoss", use_mask=True, loss_weight=1.0)
    assert_same_training(
        "mask", STOCK_CE, POLY1_CE, stock, dict(type="polyfocal.MaskLoss", loss=POLY1_BCE)
    )


@pytest.mark.parametrize("name", ["deformable", "dino"])
def test_detr_heads_at_epsilon_0_are_stock_focal(name):
    stock = dict(STOCK_FOCAL, loss_weight=2.0)
    assert_same_training(name, stock, dict(POLY1_FOCAL, loss_weight=2.0))


@pytest.mark.parametrize(
    ("name", "loss", "changes"),
    [
        ("retina", POLY1_FOCAL, dict(epsilon=1.0)),
        ("fcos", POLY1_FOCAL, dict(epsilon=-1.0)),
        ("faster", POLY1_CE, dict(epsilon=-1.0)),
    ],
)
def test_epsilon_changes_the_classification_loss_only(name, loss, changes):
    plain, _ = losses_and_gradients(tiny_model(name, loss))
    poly, _ = losses_and_gradients(tiny_model(name, loss | changes))
    for key, value in plain.items():
        if key == "loss_cls":
            assert (poly[key] - value).item() * changes["epsilon"] > 0
        else:
            torch.testing.assert_close(poly[key], value)


@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_roi_adapter_trains_and_predicts_with_the_same_activation(name):
    model = tiny_model(name, dict(type="polyfocal.RoILoss", loss=FOCAL))
    box_heads = model.roi_head.bbox_head
    box_heads = list(box_heads) if isinstance(box_heads, torch.nn.ModuleList) else [box_heads]
    for head in box_heads:
        assert head.fc_cls.out_features == 3
        # Rows must not differ by noise alone: give the classifier something to say.
        torch.nn.init.normal_(head.fc_cls.weight, std=1.0)
    found, _ = losses_and_gradients(model)
    accuracies = [k for k in found if k.endswith("acc")]
    assert len(accuracies) == len(box_heads)
    assert all(head.fc_cls.weight.grad.abs().sum() > 0 for head in box_heads)
    seen = []
    hook = box_heads[-1].fc_cls.register_forward_hook(lambda *args: seen.append(args[-1].detach()))
    inputs, samples = batch(model)
    model.eval()
    with torch.no_grad():
        results = model.predict(inputs, samples)
    hook.remove()
    scores = torch.cat([r.pred_instances.scores for r in results])
    assert len(scores) and results[0].pred_instances.labels.max() < 3
    if name == "faster":  # a cascade averages the logits of its stages
        sigmoid = seen[0].sigmoid().flatten()
        assert all((sigmoid - score).abs().min() < 1e-6 for score in scores)


TOPK = dict(type="polyfocal.NoisedTopKLoss", k=1, epsilon=0.2, use_sigmoid=False)
TAIL = dict(
    type="polyfocal.ImbalancedNoisedTopKLoss", k=2, epsilon=0.01, class_counts=[100, 10, 1],
    max_margin=0.2, scale=60.0, use_sigmoid=False,
)  # fmt: skip
LDAM = dict(type="polyfocal.LDAMLoss", class_counts=[100, 10, 1])


@pytest.mark.parametrize(
    ("name", "loss", "stretch"),
    [
        ("faster", TAIL, math.log(4) / 0.2),
        ("cascade", TOPK, math.log(4)),
        ("faster", TOPK, math.log(4)),
        ("faster", LDAM, 30.0),
        ("double", TOPK, math.log(4)),
        ("double", LDAM, 30.0),
    ],
)
def test_a_loss_with_a_softmax_of_its_own_trains_and_predicts_in_roi_heads(name, loss, stretch):
    model = tiny_model(name, dict(type="polyfocal.RoILoss", loss=loss))
    box_heads = model.roi_head.bbox_head
    head = box_heads[-1] if isinstance(box_heads, torch.nn.ModuleList) else box_heads
    assert head.fc_cls.out_features == 4
    found, _ = losses_and_gradients(model)
    assert all(value.isfinite().all() for value in found.values())
    assert head.fc_cls.weight.grad.abs().sum() > 0
    inputs, samples = batch(model)
    torch.nn.init.normal_(head.fc_cls.weight, std=1.0)
    model.roi_head.test_cfg.score_thr = 0.0
    seen = []
    hook = head.fc_cls.register_forward_hook(lambda *args: seen.append(args[-1].detach()))
    model.eval()
    with torch.no_grad():
        results = model.predict(inputs, samples)
    hook.remove()
    scores = torch.cat([r.pred_instances.scores for r in results])
    assert len(scores) and results[0].pred_instances.labels.max() < 3
    if name != "cascade":
        softmax = (stretch * seen[0]).softmax(dim=1)[:, :3].flatten()
        assert all((softmax - score).abs().min() < 1e-5 for score in scores)


@pytest.mark.parametrize("head", [s.head for s in heads.SLOTS if s.kind == "rows"])
def test_a_head_that_takes_the_adapter_makes_an_output_for_each_class(head):
    loss = dict(type="polyfocal.RoILoss", loss=FOCAL)
    layers = dict(num_shared_fcs=1) if head in ("ConvFCBBoxHead", "SCNetBBoxHead") else {}
    config = dict(type=head, in_channels=2, num_classes=3, loss_cls=loss, **layers)
    assert MODELS.build(config).fc_cls.out_features == 3


def test_normalised_classifier_is_an_option_of_the_head():
    model = copy.deepcopy(get_config(CONFIGS["faster"]).model)
    head = model.roi_head.bbox_head
    head.update(num_classes=3, fc_out_channels=32)
    head.loss_cls = dict(type="polyfocal.RoILoss", loss=TAIL)
    parameters = inspect.signature(NormedLinear).parameters
    # MMDetection 3.3 spells it tempearture, OneDL temperature.
    spelling = next(name for name in parameters if name.startswith("temp"))
    head.cls_predictor_cfg = dict(type="NormedLinear", bias=False, **{spelling: 1.0})
    head = MODELS.build(head)
    scores, _ = head(5 * torch.randn(6, 256, 7, 7))
    assert scores.shape == (6, 4) and scores.abs().max() <= 1.0 + 1e-6
    x = torch.randn(6, 32)
    expected = torch.cosine_similarity(x[:, None], head.fc_cls.weight[None], dim=2)
    torch.testing.assert_close(head.fc_cls(x), expected, rtol=1e-4, atol=1e-4)


ROI_LOSSES = [
    dict(type="polyfocal.DualFocalLoss", gamma=3.0, use_sigmoid=False),
    dict(type="polyfocal.SampleDependentFocalLoss", use_sigmoid=False),
    dict(type="polyfocal.AdaFocalLoss", use_sigmoid=False),
] + [
    dict(
        type=f"polyfocal.{name}", use_sigmoid=False,
        bias=dict(type="polyfocal.ClassPriors", class_counts=[5, 2, 1, 30]),
    )
    for name in ("DebiasedFocalLoss", "ProductOfExpertsLoss", "ReweightedCrossEntropyLoss")
]  # fmt: skip


@pytest.mark.parametrize("loss", ROI_LOSSES, ids=lambda c: c["type"])
def test_softmax_losses_train_in_a_roi_head(loss):
    model = tiny_model("faster", loss)
    found, gradients = losses_and_gradients(model)
    assert found["loss_cls"].isfinite() and found["loss_cls"] > 0
    assert gradients["roi_head.bbox_head.fc_cls.weight"].abs().sum() > 0


def test_ldam_in_a_roi_head_takes_the_counts_of_a_coco_file(tmp_path):
    """It counts the classes, and the head has a column more."""
    file = tmp_path / "train.json"
    objects = [dict(id=i, image_id=1, category_id=c, bbox=[0, 0, 5, 5], area=25, iscrowd=0)
               for i, c in enumerate([1] * 16 + [2] + [3] * 81)]  # fmt: skip
    classes = [dict(id=c, name=str(c)) for c in (1, 2, 3)]
    images = [dict(id=1, width=9, height=9, file_name="a.png")]
    file.write_text(json.dumps(dict(images=images, annotations=objects, categories=classes)))
    loss = dict(type="polyfocal.LDAMLoss", class_counts=str(file), scale=1.0)
    head = MODELS.build(
        dict(type="Shared2FCBBoxHead", in_channels=2, fc_out_channels=8, num_classes=3,
             loss_cls=loss)
    )  # fmt: skip
    torch.manual_seed(0)
    scores, boxes = head(torch.randn(8, 2, 7, 7))
    assert scores.shape == (8, 4)
    labels, weights = torch.arange(8) % 4, torch.ones(8)
    found = head.loss(scores, boxes, None, labels, weights, torch.zeros(8, 4), torch.zeros(8, 4))
    # 0.5 / the fourth roots of 16, 1 and 81; background as the most frequent class.
    margins = torch.tensor([1 / 4, 1 / 2, 1 / 6, 1 / 6])
    changed = scores - margins * torch.nn.functional.one_hot(labels, 4)
    expected = torch.nn.functional.cross_entropy(changed, labels)
    torch.testing.assert_close(found["loss_cls"], expected)


def test_adafocal_hook_reads_the_boxes_that_a_roi_head_is_trained_on():
    model = tiny_model("faster", dict(type="polyfocal.AdaFocalLoss", num_bins=4))
    data = demo_mm_inputs(2, [[3, 96, 96]] * 2, num_classes=3, num_items=[4, 2])
    runner = SimpleNamespace(model=model, val_loop=None, build_dataloader=lambda config: [data])
    hook = AdaFocalHook(dataloader={})
    hook.before_train(runner)
    seen = []
    loss = model.roi_head.bbox_head.loss_cls
    loss.register_forward_hook(lambda module, args, output: seen.append(args))
    model.train()
    hook.after_train_epoch(runner)
    ((logits, labels, *_),) = seen
    assert model.training and not logits.requires_grad and len(labels) >= 4
    confidence, guess = logits.softmax(dim=1).max(dim=1)
    expected = MODELS.build(dict(type="polyfocal.AdaFocalLoss", num_bins=4))
    expected.update(confidence, guess == labels)
    torch.testing.assert_close(loss.gammas, expected.gammas)
    assert loss.gammas.ne(1).any()


def test_flsd_trains_in_a_dense_head():
    loss = dict(type="polyfocal.SampleDependentFocalLoss", use_sigmoid=True, alpha=0.25)
    found, gradients = losses_and_gradients(tiny_model("retina", loss))
    assert found["loss_cls"].isfinite() and found["loss_cls"] > 0
    assert gradients["bbox_head.retina_cls.weight"].abs().sum() > 0


def test_roi_adapter_is_focal_of_the_same_logits():
    adapter = MODELS.build(dict(type="polyfocal.RoILoss", loss=POLY1_FOCAL))
    stock = MODELS.build(STOCK_FOCAL)
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(20, 3), torch.randint(0, 4, (20,)), torch.ones(20)
    args = (logits, labels, weights)
    torch.testing.assert_close(adapter(*args, avg_factor=20.0), stock(*args, avg_factor=20.0))
    # The adapter's accuracy counts a row without a score above one half as background.
    scores = logits.sigmoid()
    guess = torch.where(scores.amax(1) > 0.5, scores.argmax(1), 3)
    expected = (guess == labels).float().mean() * 100
    torch.testing.assert_close(adapter.get_accuracy(logits, labels)["acc"].squeeze(), expected)
    activated = adapter.get_activation(logits)
    assert activated.shape == (20, 4)
    torch.testing.assert_close(activated[:, :3], scores)
    torch.testing.assert_close(accuracy(activated, labels).squeeze(), expected)
    assert adapter.get_activation(logits[:0]).shape == (0, 4)
    # Tools that export a model ask for a whole batch.
    torch.testing.assert_close(
        adapter.get_activation(logits.view(4, 5, 3)), activated.view(4, 5, 4)
    )
    topk = MODELS.build(dict(type="polyfocal.RoILoss", loss=TOPK))
    scores = topk.get_activation(torch.randn(4, 5, 3))
    torch.testing.assert_close(scores.sum(-1), torch.ones(4, 5))


@pytest.mark.parametrize("ours", [POLY1_FOCAL, POLY1_BCE])
def test_checkpoint_is_that_of_the_stock_model(ours):
    stock = tiny_model("retina", STOCK_FOCAL)
    ours = tiny_model("retina", dict(ours, class_weight=[1.0, 2.0, 3.0]))
    stock.load_state_dict(ours.state_dict(), strict=True)


def test_bare_names_and_scoped_names_mean_the_same_class():
    import polyfocal.mmdet

    assert MODELS.get("Poly1FocalLoss") is MODELS.get("polyfocal.Poly1FocalLoss")
    assert MODELS.get("RoILoss") is polyfocal.mmdet.RoILoss
    assert MODELS.get("FocalLoss").__module__.startswith("mmdet")
    assert MODELS.get("polyfocal.FocalLoss").__module__.startswith("polyfocal")


@pytest.mark.parametrize(
    ("name", "loss_cls", "loss_mask", "message"),
    [
        ("retina", dict(type="polyfocal.FocalLoss"), None, "FocalLoss has use_sigmoid=None"),
        ("retina", dict(POLY1_FOCAL, epsilon=-2), None, "epsilon=-2: expected"),
        ("retina", dict(FOCAL, gamma=-1), None, "gamma=-1: expected"),
        ("retina", dict(type="polyfocal.RoILoss", loss=FOCAL), None, "give RetinaHead the inner"),
        (
            "retina",
            dict(type="polyfocal.MaskLoss", loss=FOCAL),
            None,
            "loss_mask of an FCNMaskHead",
        ),
        ("faster", FOCAL, None, r"Shared2FCBBoxHead.loss_cls is a sigmoid FocalLoss"),
        (
            "cascade",
            POLY1_BCE,
            None,
            r"Shared2FCBBoxHead.loss_cls is a sigmoid Poly1CrossEntropyLoss",
        ),
        ("faster", dict(type="polyfocal.RoILoss", loss=POLY1_CE), None, "of softmax form"),
        (
            "faster",
            TOPK,
            None,
            "a softmax of its own, which Shared2FCBBoxHead does not take at test time: write dict",
        ),
        (
            "retina",
            TOPK,
            None,
            "NoisedTopKLoss, .* RetinaHead does not .*: it is for BBoxHeads, inside RoILoss$",
        ),
        (
            "faster",
            LDAM,
            None,
            r"LDAMLoss, .*: write .*type='polyfocal.RoILoss'.*, or write scale=1$",
        ),
        (
            "retina",
            LDAM,
            None,
            "LDAMLoss, .*: it is for BBoxHeads, inside RoILoss, or write scale=1$",
        ),
        (
            "double",
            dict(type="polyfocal.RoILoss", loss=FOCAL),
            None,
            "DoubleConvFCBBoxHead.loss_cls is a RoILoss, .* itself, if it is a softmax loss",
        ),
        ("double", FOCAL, None, r"logits \(N, C \+ 1\), whatever the loss is"),
        (
            "faster",
            dict(type="polyfocal.RoILoss", loss=STOCK_FOCAL),
            None,
            "expected a loss of polyfocal",
        ),
        ("mask", POLY1_CE, POLY1_BCE, r"FCNMaskHead.loss_mask is a Poly1CrossEntropyLoss"),
        (
            "mask",
            POLY1_CE,
            dict(type="polyfocal.MaskLoss", loss=POLY1_CE),
            "masks of classes do not",
        ),
    ],
)
def test_a_wrong_combination_is_refused_when_the_model_is_built(name, loss_cls, loss_mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(name, loss_cls, loss_mask)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            dict(type="YOLOXHead", num_classes=3, in_channels=8, feat_channels=8),
            "is a softmax Poly1CrossEntropyLoss, .* use_sigmoid=True",
        ),
        (
            dict(type="YOLOXHead", num_classes=3, in_channels=8, feat_channels=8, loss_cls=LDAM),
            "LDAMLoss, .* YOLOXHead does not take at test time: it is for BBoxHeads, inside RoIL",
        ),
        (dict(type="GFLHead", num_classes=3, in_channels=8), "pairs of labels and quality scores"),
        (dict(type="VFNetHead", num_classes=3, in_channels=8), "overlaps of the predicted boxes"),
        (
            dict(type="CenterNetUpdateHead", num_classes=3, in_channels=8),
            "the probabilities of heatmaps, .* write type='polyfocal.GaussianPoly1FocalLoss'",
        ),
    ],
)
def test_heads_that_a_loss_cannot_serve_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(loss_cls=POLY1_CE) | head)


def test_probabilities_are_no_logits():
    model = get_config("mmdet::tood/tood_r50_fpn_1x_coco.py").model
    head = dict(model.bbox_head, train_cfg=model.train_cfg, initial_loss_cls=POLY1_FOCAL)
    with pytest.raises(ValueError, match=r"TOODHead.initial_loss_cls is a Poly1FocalLoss.*probab"):
        MODELS.build(head)


def test_vfnet_without_its_loss_takes_labels():
    head = dict(
        type="VFNetHead", num_classes=3, in_channels=8, use_vfl=False,
        loss_cls=POLY1_FOCAL, loss_cls_fl=POLY1_FOCAL,
    )  # fmt: skip
    assert type(MODELS.build(head).loss_cls).__name__ == "Poly1FocalLoss"


def test_a_head_of_a_project_is_known_by_its_name():
    from mmdet.models.dense_heads import DINOHead

    class CoDINOHead(DINOHead):
        pass

    with pytest.raises(ValueError, match=r"CoDINOHead.loss_cls is a Poly1FocalLoss.*quality sc"):
        CoDINOHead(num_classes=3, loss_cls=POLY1_FOCAL, num_pred_layer=2)


def yolov3_losses(loss_cls):
    torch.manual_seed(0)
    head = copy.deepcopy(get_config("mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py").model)
    head = dict(head.bbox_head, train_cfg=head.train_cfg, num_classes=3, loss_cls=loss_cls)
    head.update(in_channels=[8, 8, 8], out_channels=[8, 8, 8])
    head = MODELS.build(head)
    head.init_weights()
    features = [torch.randn(2, 8, size, size, requires_grad=True) for size in (3, 6, 12)]
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 90.0, 80.0]])
    objects = [InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))] * 2
    metas = [dict(img_shape=(96, 96), batch_input_shape=(96, 96))] * 2
    losses = sum(head.loss_by_feat(*head(features), objects, metas)["loss_cls"])
    return losses, *torch.autograd.grad(losses, features)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_yolov3_weighs_rows_of_three_dimensions(reduction):
    expected = yolov3_losses(dict(STOCK_BCE, reduction=reduction))
    assert expected[0] > 0
    torch.testing.assert_close(yolov3_losses(dict(POLY1_BCE, reduction=reduction)), expected)


def test_heatmaps_take_the_loss_for_heatmaps_and_no_other_head_does():
    gaussian = dict(type="polyfocal.GaussianPoly1FocalLoss", epsilon=0.0)
    head = dict(type="CenterNetHead", in_channels=8, feat_channels=8, num_classes=3)
    results = []
    for loss in (dict(type="mmdet.GaussianFocalLoss"), gaussian):
        torch.manual_seed(0)
        built = MODELS.build(head | dict(loss_center_heatmap=loss))
        built.init_weights()
        outs = built([torch.randn(1, 8, 16, 16)])
        boxes = [torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 50.0, 60.0]])]
        instances = [InstanceData(bboxes=boxes[0], labels=torch.tensor([0, 2]))]
        losses = built.loss_by_feat(
            *outs, instances, [dict(batch_input_shape=(64, 64), img_shape=(64, 64))]
        )
        results.append(losses["loss_center_heatmap"])
    torch.testing.assert_close(results[1], results[0])

    with pytest.raises(ValueError, match=r"write type='polyfocal.GaussianPoly1FocalLoss', without"):
        MODELS.build(head | dict(loss_center_heatmap=POLY1_FOCAL))
    with pytest.raises(ValueError, match=r"RetinaHead.loss_cls is a GaussianPoly1FocalLoss, which"):
        tiny_model("retina", gaussian)
