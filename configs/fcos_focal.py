# The baseline: FCOS with its own focal loss (gamma 2, alpha 0.25, use_sigmoid=True), untouched.
_base_ = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"
