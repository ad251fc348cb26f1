"""Whole models of the zoo, made small, with every loss that can be swapped at epsilon 0."""

import copy
from pathlib import Path

import pytest

pytest.importorskip("mmdet.models", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import mmdet
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from zoo_heads import HEADS

from polyfocal import heads

ROOT = Path(__file__).resolve().parents[2]
# One config for each head that tests/helpers/zoo_heads.py does not have, with the losses of it
# that can be swapped.
CONFIGS = {
    "atss/atss_r50_fpn_1x_coco.py": "ATSSHead.loss_cls ATSSHead.loss_centerness",
    "nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py": (
        "NASFCOSHead.loss_cls NASFCOSHead.loss_centerness"
    ),
    "nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py": "RetinaSepBNHead.loss_cls",
    "scnet/scnet_r50_fpn_1x_coco.py": (
        "RPNHead.loss_cls SCNetBBoxHead.loss_cls SCNetMaskHead.loss_mask"
    ),
    "htc/htc-without-semantic_r50_fpn_1x_coco.py": (
        "RPNHead.loss_cls Shared2FCBBoxHead.loss_cls HTCMaskHead.loss_mask"
    ),
    "gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py": (
        "RPNHead.loss_cls Shared4Conv1FCBBoxHead.loss_cls FCNMaskHead.loss_mask"
    ),
    "double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py": (
        "RPNHead.loss_cls DoubleConvFCBBoxHead.loss_cls"
    ),
    "sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py": (
        "RPNHead.loss_cls SABLHead.loss_cls SABLHead.loss_bbox_cls"
    ),
    "grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py": ("RPNHead.loss_cls GridHead.loss_grid"),
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py": (
        "RPNHead.loss_cls Shared2FCBBoxHead.loss_cls CoarseMaskHead.loss_mask"
        " MaskPointHead.loss_point"
    ),
    "cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py": (
        "StageCascadeRPNHead.loss_cls Shared2FCBBoxHead.loss_cls"
    ),
    "guided_anchoring/ga-rpn_r50-caffe_fpn_1x_coco.py": "GARPNHead.loss_loc GARPNHead.loss_cls",
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py": "DIIHead.loss_cls",
    "crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py": (
        "RPNHead.loss_cls MultiInstanceBBoxHead.loss_cls"
    ),
    "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py": (
        "RPNHead.loss_cls Shared2FCBBoxHead.loss_cls FCNMaskHead.loss_mask"
    ),
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py": (
        "Mask2FormerHead.loss_cls Mask2FormerHead.loss_mask"
    ),
    "maskformer/maskformer_r50_ms-16xb1-75e_coco.py": (
        "MaskFormerHead.loss_cls MaskFormerHead.loss_mask"
    ),
    "mask2former_vis/mask2former_r50_8xb2-8e_youtubevis2019.py": (
        "Mask2FormerTrackHead.loss_cls Mask2FormerTrackHead.loss_mask"
    ),
    "masktrack_rcnn/masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py": (
        "Shared2FCBBoxHead.loss_cls FCNMaskHead.loss_mask RoIEmbedHead.loss_match"
    ),
    "detr/detr_r50_8xb2-150e_coco.py": "DETRHead.loss_cls",
    "conditional_detr/conditional-detr_r50_8xb2-50e_coco.py": "ConditionalDETRHead.loss_cls",
    "dab_detr/dab-detr_r50_8xb2-50e_coco.py": "DABDETRHead.loss_cls",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": "DeformableDETRHead.loss_cls",
    "dino/dino-4scale_r50_8xb2-12e_coco.py": "DINOHead.loss_cls",
    "ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py": "DDQDETRHead.loss_cls",
    "grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py": "GroundingDINOHead.loss_cls",
    "solo/solo_r50_fpn_1x_coco.py": "SOLOHead.loss_cls",
    "solo/decoupled-solo_r50_fpn_1x_coco.py": "DecoupledSOLOHead.loss_cls",
    "solo/decoupled-solo-light_r50_fpn_3x_coco.py": "DecoupledSOLOLightHead.loss_cls",
    "solov2/solov2-light_r18_fpn_ms-3x_coco.py": "SOLOV2Head.loss_cls",
    "condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py": (
        "CondInstBboxHead.loss_cls CondInstBboxHead.loss_centerness"
    ),
    "boxinst/boxinst_r50_fpn_ms-90k_coco.py": (
        "BoxInstBboxHead.loss_cls BoxInstBboxHead.loss_centerness"
    ),
    "rtmdet/rtmdet-ins_s_8xb32-300e_coco.py": "RTMDetInsSepBNHead.loss_cls",
    "yolact/yolact_r50_1xb8-55e_coco.py": "YOLACTHead.loss_cls YOLACTProtonet.loss_segm",
    "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py": (
        "YOLOV3Head.loss_cls YOLOV3Head.loss_conf YOLOV3Head.loss_xy"
    ),
    "cornernet/cornernet_hourglass104_32xb3-210e-mstest_coco.py": "CornerHead.loss_heatmap",
    "centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py": (
        "CentripetalHead.loss_heatmap"
    ),
    "ld/ld_r18-gflv1-r101_fpn_1x_coco.py": "LDHead.loss_cls",
    "lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py": "LADHead.loss_cls LADHead.loss_centerness",
}
# Of what no config of the zoo has.
BASES = {
    "AnchorFreeHead", "AnchorHead", "BBoxHead", "ConvFCBBoxHead", "GuidedAnchorHead",
    "RTMDetHead", "RTMDetInsHead",
}  # fmt: skip
# Needs packages; inside of DDQ; refused for its ignore_index; needs packages.
ELSEWHERE = {"ATSSVLFusionHead", "DDQAuxLoss", "PanopticFPNHead", "LinearReIDHead"}


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import zoo_sweep

    with DefaultScope.overwrite_default_scope("mmdet"):
        yield zoo_sweep


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_its_losses_swapped_at_epsilon_0_is_the_stock_one(name, sweep):
    if name.startswith("crowddet"):
        pytest.importorskip("torchvision", reason="its assigner needs torchvision")
    if name.startswith("grounding_dino") and not mmdet.__version__.startswith("3.3."):
        pytest.skip("the small language model fits the GroundingDINO of MMDetection 3.3 only")
    rows = list(sweep.Sweep([]).rows(name, get_config(f"mmdet::{name}")))
    wrong = [row for row in rows if row["status"] not in ("identical", "refused")]
    assert not wrong
    same = {row["head"] for row in rows if row["status"] == "identical"}
    assert same == set(CONFIGS[name].split())


def test_a_difference_is_found(sweep):
    """The comparison itself: another epsilon is not the stock loss."""
    cfg = get_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py")
    small = sweep.zoo_models.small(cfg.model)
    other = copy.deepcopy(small)
    other.bbox_head.loss_cls.gamma = 2.01
    stock = sweep.zoo_models.build(small)
    expected = sweep.zoo_models.step(stock, small)
    status, reason = sweep._compare(small, other, stock.state_dict(), expected)
    assert status == "failing" and "loss_cls" in reason and "in float64" in reason


def test_every_head_of_the_table_that_takes_a_loss_is_run_somewhere():
    types = {get_config(f"mmdet::{config}").model.bbox_head.type for config, *_ in HEADS.values()}
    types |= {name.partition(".")[0] for losses in CONFIGS.values() for name in losses.split()}
    wanted = {s.head for s in heads.SLOTS if s.framework == "mmdet" and heads.KINDS[s.kind].fits}
    assert wanted - types == BASES | ELSEWHERE
