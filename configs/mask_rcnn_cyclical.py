# Mask R-CNN with cyclical focal loss, the paper's softmax form, on the box classifier.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

# The paper's gamma_hc 3, gamma_lc 2 and factor 4 are the defaults.
model = dict(
    roi_head=dict(
        bbox_head=dict(loss_cls=dict(type="polyfocal.CyclicalFocalLoss", use_sigmoid=False))
    )
)
