# The baseline: RTMDet-s with its quality focal loss (beta 2; use_sigmoid=True), untouched.
_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"
