# ATSS with Poly-1 focal loss; gamma 2 and alpha 0.25 stay those of the base.
_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"

# epsilon: no published value for ATSS; RetinaNet's, since the loss and its role are the same.
model = dict(
    bbox_head=dict(loss_cls=dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=1.0))
)
