"""Heads of the zoo, thin, with their loss swapped at epsilon 0: the stock head's step and boxes."""

import copy

import pytest

pytest.importorskip("mmdet.models", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from zoo_heads import CLASSES, HEADS, MORE

from polyfocal import heads, swapping
from polyfocal.errors import UserError


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def head_of(name):
    """The head's config in the zoo, thin, and its features' strides."""
    config, strides, changes = (HEADS | MORE)[name]
    model = get_config(f"mmdet::{config}").model
    head = copy.deepcopy(model.bbox_head)
    head.update(changes)
    if "feat_channels" not in _parameters(head):
        del head["feat_channels"]
    head.update(train_cfg=model.get("train_cfg"), test_cfg=model.get("test_cfg"))
    for key in ("score_thr", "conf_thr"):
        if head.test_cfg is not None and key in head.test_cfg:
            head.test_cfg[key] = 0.0
    return head, strides


def _parameters(head):
    import inspect

    found = set()
    for cls in MODELS.get(head.type).__mro__:
        if "__init__" in vars(cls):
            found |= set(inspect.signature(cls.__init__).parameters)
    return found


def results(head, strides, epoch=None):
    """Losses, gradients and decoded boxes of one step of a head on the same features."""
    torch.manual_seed(0)
    built = MODELS.build(copy.deepcopy(head))
    built.init_weights()
    if epoch is not None:
        MessageHub.get_current_instance().update_info("epoch", epoch)
    torch.manual_seed(1)
    # DDOD's deformable convolutions want 3 cells of the coarsest level.
    side = 384 if head.type == "DDODHead" else 128
    features = [torch.randn(2, 16, side // s, side // s, requires_grad=True) for s in strides]
    samples = demo_mm_inputs(
        2, [[3, side, side]] * 2, num_classes=CLASSES, num_items=[4, 1], with_mask=False
    )["data_samples"]
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(side, side), pad_shape=(side, side)))
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.float()
    built.train()
    losses = built.loss(tuple(features), samples)
    losses = {k: sum(v) if isinstance(v, list) else v for k, v in losses.items()}
    total = sum(v.sum() for v in losses.values())
    inputs = [f for f in features if f.requires_grad] + list(built.parameters())
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    built.eval()
    if head.type == "GARetinaHead":
        return losses, gradients, []  # its masked convolution has no code for a CPU
    with torch.no_grad():
        boxes = built.predict(tuple(f.detach() for f in features), samples, rescale=False)
    return losses, gradients, boxes


def assert_same(found, expected):
    losses, gradients, boxes = found
    assert losses.keys() == expected[0].keys()
    for key, value in expected[0].items():
        torch.testing.assert_close(losses[key].squeeze(), value.squeeze(), rtol=1e-5, atol=1e-7)
    for gradient, stock in zip(gradients, expected[1], strict=True):
        assert (gradient is None) == (stock is None)
        if stock is not None:
            scale = stock.abs().max().item()
            torch.testing.assert_close(gradient, stock, rtol=1e-4, atol=1e-4 * scale + 1e-8)
    for own, stock in zip(boxes, expected[2], strict=True):
        for key in ("scores", "labels", "bboxes"):
            torch.testing.assert_close(own[key], stock[key])


def swapped(head, epsilon):
    cfg = Config(dict(model=dict(type="Detector", bbox_head=head)))
    slots = [f"bbox_head.{f.name}" for f in swapping.find_losses(dict(bbox_head=head))]
    return swapping.swap(cfg, "poly1", slots=slots, epsilon=epsilon).model.bbox_head, slots


@pytest.mark.parametrize("name", [name for name in HEADS if name != "paa"])
def test_at_epsilon_0_a_head_is_the_stock_one(name):
    head, strides = head_of(name)
    # TOOD has a loss for the first epochs and one for the rest.
    for epoch in (0, 9) if name == "tood" else (None,):
        expected = results(head, strides, epoch)
        assert any(v.sum() > 0 for k, v in expected[0].items() if "cls" in k or "heatmap" in k)
        ours, slots = swapped(head, 0.0)
        assert slots and all("polyfocal" in str(ours[slot.partition(".")[2]]) for slot in slots)
        assert_same(results(ours, strides, epoch), expected)
        more, _ = swapped(head, 1.0)
        costs = results(more, strides, epoch)[0]
        assert sum(v.sum() for v in costs.values()) > sum(v.sum() for v in expected[0].values())


SOFTMAX = {
    "retinanet": "RetinaHead",
    "retina sepbn": "RetinaSepBNHead",
    "sabl retina": "SABLRetinaHead",
    "ga retina": "GARetinaHead",
    "atss": "ATSSHead",
    "ddod": "DDODHead",
    "fcos": "FCOSHead",
    "nas fcos nashead": "NASFCOSHead",
    "reppoints": "RepPointsHead",
}
DETR = {  # what each is given beside the hidden states: reference points
    "DETRHead": (),
    "ConditionalDETRHead": (torch.full((2, 20, 2), 0.5),),
    "DABDETRHead": (torch.full((2, 2, 20, 4), 0.5),),
    "DeformableDETRHead": ([torch.full((2, 20, 2), 0.5)] * 2,),
}
CE = dict(type="mmdet.CrossEntropyLoss", use_sigmoid=False)
POLY1_CE = dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=0.0, use_sigmoid=False)


@pytest.mark.parametrize("name", SOFTMAX)
def test_with_a_softmax_loss_at_epsilon_0_a_head_is_that_of_the_stock_softmax(name):
    head, strides = head_of(name)
    assert head.type == SOFTMAX[name]
    found = []
    for loss in (POLY1_CE, CE):
        head.loss_cls = ConfigDict(loss)
        found.append(results(head, strides))
    assert_same(*found)
    assert all(len(one) and (one.labels < CLASSES).all() for one in found[0][2])


@pytest.mark.parametrize("name", DETR)
def test_with_a_softmax_loss_at_epsilon_0_a_detr_head_is_that_of_the_stock_softmax(name):
    model = get_config("mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py").model
    more = dict(num_pred_layer=2) if name == "DeformableDETRHead" else {}
    found = []
    for loss in (POLY1_CE, CE):
        torch.manual_seed(0)
        head = MODELS.build(
            dict(type=name, num_classes=CLASSES, embed_dims=16, loss_cls=loss,
                 train_cfg=model.train_cfg, test_cfg=dict(max_per_img=10), **more)
        )  # fmt: skip
        samples = demo_mm_inputs(
            2, [[3, 128, 128]] * 2, num_classes=CLASSES, num_items=[4, 1], with_mask=False
        )["data_samples"]
        hidden = torch.randn(2, 2, 20, 16)
        places = DETR[name]
        encoder = (None, None) if name == "DeformableDETRHead" else ()
        losses = head.loss(hidden, *places, *encoder, samples)
        with torch.no_grad():
            boxes = head.predict(hidden, *places, samples, rescale=False)
        assert all(len(one) == 10 and (one.labels < CLASSES).all() for one in boxes)
        found.append((losses, [], boxes))
    assert_same(*found)


def test_every_head_that_follows_use_sigmoid_is_run_with_a_softmax_loss():
    followed = {
        slot.head
        for slot in heads.SLOTS
        if slot.framework == "mmdet" and slot.decodes == "as `use_sigmoid` says"
    }
    assert all(
        heads.SOFTMAX in heads.KINDS[slot.kind].fits
        for slot in heads.SLOTS
        if slot.decodes == "as `use_sigmoid` says"
    )
    bases = {"AnchorHead", "AnchorFreeHead", "GuidedAnchorHead"}
    # In test_heads.py; need a GPU's convolution, and the stage before.
    proposals = {"RPNHead", "GARPNHead", "StageCascadeRPNHead"}
    assert followed == {*SOFTMAX.values(), *DETR} | bases | proposals


@pytest.mark.parametrize("name", ["pisa", "fsaf", "yolof", "condinst", "boxinst"])
def test_a_head_that_counts_c_columns_refuses_a_softmax_loss(name):
    head, _ = head_of(name)
    head.loss_cls = POLY1_CE
    with pytest.raises(UserError, match=r"is a softmax Poly1CrossEntropyLoss, .* use_sigmoid=True"):
        MODELS.build(head)


@pytest.mark.parametrize("head", ["DINOHead", "DeformableDETRHead"])
def test_an_encoder_whose_places_are_ranked_by_logits_refuses_a_softmax_loss(head):
    head = dict(type=head, num_classes=3, num_pred_layer=2, as_two_stage=True)
    with pytest.raises(UserError, match=r"is a softmax Poly1CrossEntropyLoss, .* or an IoU-aware"):
        MODELS.build(head | dict(loss_cls=POLY1_CE))
    for loss in ("Poly1FocalLoss", "Poly1QualityFocalLoss"):
        loss = dict(type=f"polyfocal.{loss}", epsilon=1.0, use_sigmoid=True)
        assert MODELS.build(head | dict(loss_cls=loss)).cls_out_channels == 3


def test_paa_weighs_its_positives_as_with_the_stock_loss(monkeypatch):
    """It fits a mixture to these losses; where they are nearly equal, rounding decides."""
    from mmdet.models.dense_heads import PAAHead

    seen = []
    stock = PAAHead.get_pos_loss

    def get_pos_loss(self, *args):
        seen.append(stock(self, *args)[0].detach())
        return stock(self, *args)

    monkeypatch.setattr(PAAHead, "get_pos_loss", get_pos_loss)
    head, strides = head_of("paa")
    results(head, strides)
    results(swapped(head, 0.0)[0], strides)
    assert len(seen) == 4 and len(seen[0]) > 8
    torch.testing.assert_close(seen[2:], seen[:2], rtol=1e-6, atol=1e-6)


def test_a_detr_head_hands_over_the_overlaps_for_an_iou_aware_loss():
    """The branch that asks for MMDetection's QualityFocalLoss."""
    from mmdet.models.dense_heads import DeformableDETRHead

    stock = dict(type="mmdet.QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=2.0)
    ours = dict(
        type="polyfocal.Poly1QualityFocalLoss", use_sigmoid=True, epsilon=0.0, loss_weight=2.0
    )
    train_cfg = get_config("mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py").model
    found = []
    for loss in (stock, ours, dict(ours, type="polyfocal.Poly1MatchabilityAwareLoss")):
        torch.manual_seed(0)
        head = DeformableDETRHead(
            num_classes=CLASSES, embed_dims=16, num_pred_layer=2, sync_cls_avg_factor=True,
            loss_cls=ConfigDict(loss), train_cfg=train_cfg.train_cfg,
        )  # fmt: skip
        seen = []
        head.loss_cls.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[1])
        )
        samples = demo_mm_inputs(
            2, [[3, 128, 128]] * 2, num_classes=CLASSES, num_items=[4, 1], with_mask=False
        )["data_samples"]
        torch.manual_seed(1)
        scores = torch.randn(2, 2, 20, CLASSES, requires_grad=True)
        boxes = torch.rand(2, 2, 20, 4) * 0.5 + 0.1
        losses = head.loss_by_feat(
            scores, boxes, None, None,
            [s.gt_instances for s in samples], [s.metainfo for s in samples],
        )  # fmt: skip
        total = (losses["loss_cls"] + losses["d0.loss_cls"]).sum()
        found.append((total, torch.autograd.grad(total, scores)[0]))
        assert len(seen) == 2 and all(isinstance(target, tuple) for target in seen)
        assert any(((t[1] > 0) & (t[1] < 1)).any() for t in seen)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found[2][0], found[0][0])
