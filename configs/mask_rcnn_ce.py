# The baseline: Mask R-CNN with its own cross-entropy (use_sigmoid=False, softmax), untouched.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
