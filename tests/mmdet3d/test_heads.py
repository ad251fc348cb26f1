"""The losses in whole 3D models, against MMDetection3D's own focal losses there."""

import copy
import math

import pytest

pytest.importorskip("mmdet3d.registry", reason="needs MMDetection3D: run `make setup-3d`")

import lidar_frames
import torch
from mmdet3d.registry import MODELS
from mmengine.hub import get_config
from mmengine.registry import DefaultScope

import polyfocal.mmdet3d
from polyfocal.errors import UserError

POINTPILLARS = "mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"
PART_A2 = "mmdet3d::parta2/parta2_hv_secfpn_8xb2-cyclic-80e_kitti-3d-3class.py"
SSN = "mmdet3d::ssn/ssn_hv_secfpn_sbn-all_16xb2-2x_nus-3d.py"
FREE_ANCHOR = "mmdet3d::free_anchor/pointpillars_hv_regnet-400mf_fpn_head-free-anchor_sbn-all_8xb4-2x_nus-3d.py"  # noqa: E501
CENTERPOINT = "mmdet3d::centerpoint/centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py"
IMVOXEL = "mmdet3d::imvoxelnet/imvoxelnet_2xb4_sunrgbd-3d-10class.py"

POLY1 = dict(type="polyfocal.Poly1FocalLoss", epsilon=0.0, use_sigmoid=True)
POLY1_BCE = dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=0.0, use_sigmoid=True)
OURS = {
    "poly1": POLY1,
    "focal": dict(type="polyfocal.FocalLoss", use_sigmoid=True),
    "poly n": dict(
        type="polyfocal.PolyNLoss", epsilons=(0.0,), gamma=2.0, alpha=0.25, use_sigmoid=True
    ),
}


@pytest.fixture(autouse=True)
def mmdet3d_scope():
    with DefaultScope.overwrite_default_scope("mmdet3d"):
        yield


def pointpillars(**head):
    """The installed config's model, its range and its 321,408 anchors, with fewer channels."""
    model = copy.deepcopy(get_config(POINTPILLARS).model)
    model.voxel_encoder.feat_channels = [8]
    model.middle_encoder.in_channels = model.backbone.in_channels = 8
    model.backbone.update(layer_nums=[1, 1, 1], out_channels=[8, 8, 16])
    model.neck.update(in_channels=[8, 8, 16], out_channels=[8, 8, 8])
    model.bbox_head.update(in_channels=24, feat_channels=24, **head)
    torch.manual_seed(0)
    built = MODELS.build(model)
    built.init_weights()
    return built


def step(model, batch):
    """Losses, what each was divided by, and every gradient, of one pass."""
    normalisers = {}

    def keep(name):
        def hook(module, args, kwargs):
            normalisers[name] = float(kwargs["avg_factor"])

        return hook

    for name in ("loss_cls", "loss_bbox", "loss_dir"):
        module = getattr(model.bbox_head, name)
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    losses = model(**data, mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {name: sum(value) for name, value in losses.items()}, normalisers, gradients


@pytest.fixture(scope="module")
def frames():
    return lidar_frames.batch()


@pytest.fixture(scope="module")
def stock(frames):
    with DefaultScope.overwrite_default_scope("mmdet3d"):
        model = pointpillars()
        return model.state_dict(), step(model, frames)


@pytest.mark.parametrize("loss", OURS.values(), ids=OURS)
def test_pointpillars_is_as_with_the_stock_loss(loss, frames, stock):
    state, (losses, normalisers, gradients) = stock
    model = pointpillars(type="polyfocal.Anchor3DHead", loss_cls=loss)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    own_losses, own_normalisers, own_gradients = step(model, frames)
    assert normalisers["loss_cls"] > 1 and own_normalisers == normalisers, "the positives"
    assert own_losses.keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(own_losses[name], value, rtol=1e-5, atol=0)
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_stock_head_is_refused():
    """It would ask for a sampler that is not there; with one it would divide by all anchors."""
    with pytest.raises(UserError, match=r"Anchor3DHead.loss_cls is a Poly1FocalLoss.*polyfocal.An"):
        pointpillars(loss_cls=POLY1)


def test_a_sampler_in_the_config_is_used():
    model = copy.deepcopy(get_config(POINTPILLARS).model)
    sampler = dict(type="mmdet.RandomSampler", num=256, pos_fraction=0.5, neg_pos_ub=-1)
    head = {
        **model.bbox_head,
        "type": "polyfocal.Anchor3DHead",
        "loss_cls": POLY1_BCE,
        "train_cfg": model.train_cfg | dict(sampler=sampler),
    }
    built = MODELS.build(head)
    assert built.sampling and type(built.bbox_sampler).__name__ == "RandomSampler"
    without = MODELS.build({**head, "train_cfg": None})
    assert not without.sampling, "a head that only predicts"


@pytest.mark.parametrize("name", ["PartA2RPNHead", "ShapeAwareHead"])
def test_heads_that_inherit(name):
    if name == "PartA2RPNHead":
        model = copy.deepcopy(get_config(PART_A2).model)
        head, train_cfg = model.rpn_head, model.train_cfg.rpn
    else:
        model = copy.deepcopy(get_config(SSN).model)
        head, train_cfg = model.pts_bbox_head, model.train_cfg.pts
    head.update(train_cfg=train_cfg, test_cfg=None)
    stock = MODELS.build(head)
    with pytest.raises(UserError, match=rf"write type='polyfocal.{name}'"):
        MODELS.build(head | dict(loss_cls=POLY1))
    ours = MODELS.build(head | dict(type=f"polyfocal.{name}", loss_cls=POLY1))
    assert isinstance(ours, getattr(polyfocal.mmdet3d, name)) and isinstance(ours, type(stock))
    assert ours.sampling is stock.sampling is False
    assert type(ours.bbox_sampler) is type(stock.bbox_sampler)
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_shape_aware_head_trains_as_with_the_stock_loss():
    head = copy.deepcopy(get_config(SSN).model.pts_bbox_head)
    head.train_cfg = get_config(SSN).model.train_cfg.pts
    head.update(in_channels=8, feat_channels=8)
    results = []
    for change in ({}, dict(type="polyfocal.ShapeAwareHead", loss_cls=POLY1)):
        torch.manual_seed(0)
        built = MODELS.build(head | change)
        built.init_weights()
        features = torch.randn(2, 8, 40, 40, requires_grad=True)
        batch = lidar_frames.batch(box_columns=9)
        instances = [sample.gt_instances_3d for sample in batch["data_samples"]]
        losses = built.loss_by_feat(*built([features]), instances, [{}, {}])
        loss_cls = sum(losses["loss_cls"])
        results.append((loss_cls, *torch.autograd.grad(loss_cls, features)))
    (stock, stock_gradient), (ours, gradient) = results
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(gradient, stock_gradient)


def test_wrong_combinations_are_refused():
    def head(config, name, **change):
        return MODELS.build({**copy.deepcopy(get_config(config).model[name]), **change})

    with pytest.raises(
        UserError, match=r"FreeAnchor3DHead is written into it and uses no loss_cls"
    ):
        head(FREE_ANCHOR, "pts_bbox_head", loss_cls=POLY1)
    gaussian = dict(type="polyfocal.GaussianPoly1FocalLoss", epsilon=0.0)
    with pytest.raises(UserError, match=r"gives logits .* type='polyfocal.Poly1FocalLoss'"):
        head(POINTPILLARS, "bbox_head", type="polyfocal.Anchor3DHead", loss_cls=gaussian)
    with pytest.raises(
        UserError, match=r"CenterHead.loss_cls is a Poly1FocalLoss, which takes log"
    ):
        head(CENTERPOINT, "pts_bbox_head", loss_cls=POLY1)
    with pytest.raises(UserError, match=r"cls_loss is a Poly1FocalLoss, .* labels it -1"):
        head(IMVOXEL, "bbox_head", cls_loss=POLY1)
    with pytest.raises(UserError, match=r"softmax Poly1CrossEntropyLoss, .* use_sigmoid=True"):
        head(
            POINTPILLARS,
            "bbox_head",
            type="polyfocal.Anchor3DHead",
            loss_cls=dict(type="polyfocal.Poly1CrossEntropyLoss", use_sigmoid=False),
        )
    with pytest.raises(
        UserError, match=r"use_sigmoid=False, but .* made for use_sigmoid=True|None"
    ):
        head(
            POINTPILLARS,
            "bbox_head",
            type="polyfocal.Anchor3DHead",
            loss_cls=dict(type="polyfocal.FocalLoss"),
        )


def test_centerpoint_is_as_with_the_stock_loss():
    """CenterHead on heatmaps that it draws itself: loss and gradient of every task."""
    head = copy.deepcopy(get_config(CENTERPOINT).model.pts_bbox_head)
    head.train_cfg = copy.deepcopy(get_config(CENTERPOINT).model.train_cfg.pts)
    head.train_cfg.point_cloud_range = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
    head.update(in_channels=8, share_conv_channel=8)
    batch = lidar_frames.batch(box_columns=9)
    instances = [sample.gt_instances_3d for sample in batch["data_samples"]]
    results = []
    for epsilon in (None, 0.0, 1.0):
        loss = dict(type="polyfocal.GaussianPoly1FocalLoss", epsilon=epsilon)
        torch.manual_seed(0)
        built = MODELS.build(head | ({} if epsilon is None else dict(loss_cls=loss)))
        built.init_weights()
        features = torch.randn(2, 8, 128, 128, requires_grad=True)
        losses = built.loss_by_feat(built([features]), copy.deepcopy(instances))
        heatmaps = torch.stack([v for k, v in losses.items() if k.endswith("heatmap")])
        results.append((heatmaps, *torch.autograd.grad(heatmaps.sum(), features)))
    (stock, stock_gradient), (ours, gradient), (more, _) = results
    assert len(stock) == 6
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(gradient, stock_gradient)
    assert (more > ours).all()


@pytest.mark.parametrize("name", ["PVRCNNBBoxHead", "PartA2BboxHead"])
def test_soft_targets_of_the_second_stage(name):
    """Targets that grow with the overlap, logits of one dimension, weights that sum to 1."""
    stock_loss = dict(type="mmdet.CrossEntropyLoss", use_sigmoid=True, reduction="sum")
    losses = []
    for loss_cls in (stock_loss, POLY1_BCE | dict(reduction="sum")):
        torch.manual_seed(0)
        if name == "PVRCNNBBoxHead":
            head = MODELS.build(
                dict(type=name, in_channels=2, grid_size=2, num_classes=3, loss_cls=loss_cls)
            )
        else:
            config = copy.deepcopy(get_config(PART_A2).model.roi_head.bbox_head)
            head = MODELS.build(config | dict(loss_cls=loss_cls))
        score = torch.randn(6, 1, requires_grad=True)
        overlap = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.74, 0.9])
        labels = (2 * overlap - 0.5).clamp(0, 1)
        rois = torch.rand(6, 8)
        result = head.loss(
            score,
            torch.zeros(6, head.bbox_coder.code_size),
            rois,
            labels,
            torch.zeros(0, 7),
            torch.zeros(0, 7),
            torch.zeros(6, dtype=torch.long),
            torch.full((6,), 1 / 6),
            torch.zeros(6),
        )
        losses.append((result["loss_cls"], *torch.autograd.grad(result["loss_cls"], score)))
    torch.testing.assert_close(losses[1], losses[0])


def focal_by_hand(logits, labels, gamma=2.0, alpha=0.25):
    """Of labels whose background is negative, in float64."""
    p = logits.double().sigmoid()
    positive = labels[:, None] == torch.arange(logits.shape[1])
    pt = torch.where(positive, p, 1 - p)
    weight = torch.where(positive, alpha, 1 - alpha)
    return (-weight * (1 - pt) ** gamma * pt.log()).sum()


def test_minus_one_background_is_the_focal_loss_of_labels_with_minus_one():
    loss = MODELS.build(dict(type="polyfocal.MinusOneBackground", loss=POLY1))
    labels = torch.tensor([-1, 0, 2])
    # 2 positive and 7 negative entries at p = 1/2.
    expected = math.log(2) / 4 * (2 * 0.25 + 7 * 0.75)
    found = loss(torch.zeros(3, 3), labels, avg_factor=2.0)
    torch.testing.assert_close(found, torch.tensor(expected / 2))
    assert labels[0] == -1, "the head's labels stay"
    logits = torch.randn(3, 3)
    weight = torch.tensor([0.5, 0.0, 2.0])
    weighed = sum(w * focal_by_hand(logits[[i]], labels[[i]]) for i, w in enumerate(weight))
    found = loss(logits, labels, weight, reduction_override="sum")
    torch.testing.assert_close(found.double(), weighed, rtol=1e-5, atol=0)
    assert loss(torch.zeros(0, 3), labels[:0], avg_factor=1.0) == 0


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (dict(type="polyfocal.Poly1CrossEntropyLoss", use_sigmoid=False), "of softmax form: .*"),
        (dict(type="mmdet.FocalLoss", use_sigmoid=True), "MinusOneBackground holds a FocalLoss: "),
    ],
)
def test_minus_one_background_refuses_what_does_not_fit(inner, message):
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(type="polyfocal.MinusOneBackground", loss=inner))


class BoxLoss(torch.nn.Module):
    def forward(self, found, wanted, weight, avg_factor):
        return (found - wanted).abs().sum()


def test_imvoxel_head_trains_with_its_own_labels():
    from mmdet3d.structures import DepthInstance3DBoxes
    from mmengine.structures import InstanceData

    config = copy.deepcopy(get_config(IMVOXEL).model.bbox_head)
    config.update(n_channels=4, cls_loss=dict(type="polyfocal.MinusOneBackground", loss=POLY1))
    torch.manual_seed(0)
    head = MODELS.build(config)
    # The loss of rotated boxes has no code for a CPU.
    head.bbox_loss = BoxLoss()
    seen = []
    head.cls_loss.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, kwargs["avg_factor"])), with_kwargs=True
    )
    features = [torch.randn(1, 4, *side) for side in ((16, 16, 8), (8, 8, 4), (4, 4, 2))]
    boxes = DepthInstance3DBoxes(torch.tensor([[0.0, 2.0, -1.0, 2.0, 2.0, 1.5, 0.2]]))
    truth = InstanceData(bboxes_3d=boxes, labels_3d=torch.tensor([3]))
    outputs = head(features)
    losses = head.loss_by_feat(*outputs, torch.ones(1, 1, 16, 16, 8), [truth], [{}])
    ((logits, labels, avg_factor),) = seen
    assert (labels == -1).any() and (labels == 3).any() and set(labels.tolist()) == {-1, 3}
    expected = focal_by_hand(logits.detach(), labels) / avg_factor
    torch.testing.assert_close(losses["cls_loss"].double(), expected, rtol=1e-5, atol=0)
    losses["cls_loss"].backward()
    assert head.conv_cls.weight.grad.abs().max() > 0
