# Mask R-CNN with Poly-1 cross-entropy on the box classifier.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

# epsilon: the PolyLoss paper's for Mask R-CNN on COCO. -1 takes away the first polynomial term.
model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(type="polyfocal.Poly1CrossEntropyLoss", use_sigmoid=False, epsilon=-1.0)
        )
    )
)
