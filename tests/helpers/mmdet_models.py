"""Small MMDetection models and a batch for them."""

import copy

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.hub import get_config

CONFIGS = {
    "retina": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos": "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss": "mmdet::atss/atss_r50_fpn_1x_coco.py",
    "rpn": "mmdet::rpn/rpn_r50_fpn_1x_coco.py",
    "faster": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask": "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "double": "mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py",
    "cascade": "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "deformable": "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino": "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py",
}


def heads(model):
    """The dictionaries of a model's config that hold ``loss_cls``."""
    name = "rpn_head" if "rpn_head" in model and "roi_head" not in model else "bbox_head"
    head = model.roi_head.bbox_head if "roi_head" in model else model[name]
    return head if isinstance(head, list) else [head]


def tiny_model(name, loss_cls=None, loss_mask=None, **settings):
    """The installed config's model with a thin ResNet-18, three classes and settings of heads."""
    model = copy.deepcopy(get_config(CONFIGS[name]).model)
    model.backbone.update(depth=18, base_channels=8, init_cfg=None, style="pytorch")
    channels = [8, 16, 32, 64]
    model.neck.in_channels = channels[-len(model.neck.in_channels) :]
    for head in heads(model):
        if name != "rpn":
            head.num_classes = 3
        if loss_cls is not None:
            head.loss_cls = copy.deepcopy(loss_cls)
        if "fc_out_channels" in head:
            head.fc_out_channels = 32
        head.update(settings)
    if name in ("deformable", "dino"):
        model.num_queries = 30
        for part in (model.encoder, model.decoder):
            part.num_layers = 2
            part.layer_cfg.ffn_cfg.feedforward_channels = 32
    if loss_mask is not None:
        model.roi_head.mask_head.loss_mask = loss_mask
    if name == "mask":
        model.roi_head.mask_head.update(num_classes=3, num_convs=1)
    torch.manual_seed(0)
    model = MODELS.build(model)
    model.init_weights()
    return model


def batch(model):
    """Two pictures, prepared as the model wants them; the second has no object."""
    torch.manual_seed(1)
    shapes = [[3, 96, 96], [3, 96, 96]]
    data = demo_mm_inputs(2, shapes, num_classes=3, num_items=[4, 0], with_mask=True)
    data = model.data_preprocessor(data, training=True)
    return data["inputs"], data["data_samples"]
