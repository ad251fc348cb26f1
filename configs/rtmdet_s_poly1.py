# RTMDet-s with Poly-1 quality focal loss; beta 2 stays that of the base.
_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"

# epsilon: no published value for a quality focal loss; measured nowhere yet. RetinaNet's, since the
# negatives' loss is the same but for alpha.
model = dict(
    bbox_head=dict(
        loss_cls=dict(type="polyfocal.Poly1QualityFocalLoss", use_sigmoid=True, epsilon=1.0)
    )
)
