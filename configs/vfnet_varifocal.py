# The baseline: VFNet with its varifocal loss (alpha 0.75, gamma 2; use_sigmoid=True), untouched.
_base_ = "mmdet::vfnet/vfnet_r50_fpn_1x_coco.py"
