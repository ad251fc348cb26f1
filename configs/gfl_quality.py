# The baseline: GFL with its quality focal loss (beta 2; use_sigmoid=True), untouched.
_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"
