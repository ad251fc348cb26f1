# GFL with Poly-1 quality focal loss; beta 2 stays that of the base.
_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"

# epsilon: no published value for a quality focal loss. RetinaNet's, since the negatives' loss is
# the same but for alpha; no gain on blood cells (docs/results.md), so tune it on your data.
model = dict(
    bbox_head=dict(
        loss_cls=dict(type="polyfocal.Poly1QualityFocalLoss", use_sigmoid=True, epsilon=1.0)
    )
)
