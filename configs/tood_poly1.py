# TOOD with both losses in their Poly-1 form, of probabilities (activated), as in the base.
_base_ = "mmdet::tood/tood_r50_fpn_1x_coco.py"

# epsilon: no published value; measured nowhere yet. RetinaNet's, since the first loss is the same.
model = dict(
    bbox_head=dict(
        initial_loss_cls=dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=1.0),
        loss_cls=dict(type="polyfocal.Poly1QualityFocalLoss", use_sigmoid=True, epsilon=1.0),
    )
)
