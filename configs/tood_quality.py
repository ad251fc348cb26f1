# The baseline: TOOD with its focal loss, then its quality focal loss (use_sigmoid=True), untouched.
_base_ = "mmdet::tood/tood_r50_fpn_1x_coco.py"
