"""Heads of MMDetection's zoo: config, strides of the features, and what makes the head thin."""

CLASSES = 5
THIN = dict(in_channels=16, feat_channels=16, num_classes=CLASSES)
FPN = (8, 16, 32, 64, 128)
HEADS = {
    "retinanet": ("retinanet/retinanet_r50_fpn_1x_coco.py", FPN, THIN),
    "fcos": ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", FPN, THIN | dict(norm_cfg=None)),
    "gfl": ("gfl/gfl_r50_fpn_1x_coco.py", FPN, THIN | dict(norm_cfg=None)),
    "rtmdet": ("rtmdet/rtmdet_s_8xb32-300e_coco.py", FPN[:3], THIN),
    "tood": ("tood/tood_r50_fpn_1x_coco.py", FPN, THIN | dict(norm_cfg=None)),
    "vfnet": ("vfnet/vfnet_r50_fpn_1x_coco.py", FPN, THIN | dict(norm_cfg=None)),
    "ddod": ("ddod/ddod_r50_fpn_1x_coco.py", FPN, THIN | dict(norm_cfg=dict(type="BN"))),
    "paa": ("paa/paa_r50_fpn_1x_coco.py", FPN, THIN | dict(norm_cfg=None)),
    "fsaf": ("fsaf/fsaf_r50_fpn_1x_coco.py", FPN, THIN),
    "fovea": ("foveabox/fovea_r50_fpn_4xb4-1x_coco.py", FPN, THIN),
    "reppoints": (
        "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
        FPN,
        THIN | dict(point_feat_channels=16),
    ),
    "sabl retina": ("sabl/sabl-retinanet_r50_fpn_1x_coco.py", FPN, THIN),
    "ga retina": ("guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py", FPN, THIN),
    "pisa": ("pisa/retinanet-r50_fpn_pisa_1x_coco.py", FPN, THIN),
    "yolof": ("yolof/yolof_r50-c5_8xb8-1x_coco.py", (32,), THIN | dict(num_cls_convs=1)),
    "yolox": ("yolox/yolox_s_8xb8-300e_coco.py", FPN[:3], THIN),
    "centernet": ("centernet/centernet_r18_8xb16-crop512-140e_coco.py", (4,), THIN),
    "centernet update": (
        "centernet/centernet-update_r50-caffe_fpn_ms-1x_coco.py",
        FPN,
        THIN | dict(norm_cfg=None),
    ),
    "nas fcos": (
        "nas_fcos/nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco.py",
        FPN,
        THIN | dict(norm_cfg=None),
    ),
}
# Of the heads that tests/mmdet/test_zoo_models.py has in whole models.
MORE = {
    "atss": ("atss/atss_r50_fpn_1x_coco.py", FPN, THIN | dict(norm_cfg=None)),
    "retina sepbn": ("nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py", FPN, THIN),
    "nas fcos nashead": (
        "nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py",
        FPN,
        THIN | dict(norm_cfg=None),
    ),
    "condinst": (
        "condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py",
        FPN,
        THIN | dict(norm_cfg=None),
    ),
    "boxinst": ("boxinst/boxinst_r50_fpn_ms-90k_coco.py", FPN, THIN | dict(norm_cfg=None)),
}
