# DINO with Poly-1 quality focal loss; loss_weight 1 and the matching cost stay those of the base.
_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"

# epsilon: no published value for a quality focal loss; measured nowhere yet. RetinaNet's.
loss_cls = dict(type="polyfocal.Poly1QualityFocalLoss", use_sigmoid=True, epsilon=1.0)
model = dict(bbox_head=dict(loss_cls=dict(_delete_=True, loss_weight=1.0, **loss_cls)))
del loss_cls
