# The baseline: RetinaNet with its focal loss (gamma 2, alpha 0.25; use_sigmoid=True), untouched.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
