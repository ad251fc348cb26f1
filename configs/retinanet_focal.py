# The baseline: RetinaNet with its own focal loss (alpha 0.25, gamma 2, use_sigmoid=True), untouched.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
