# Deformable DETR with Poly-1 focal loss; the matching cost stays focal, as in the base (50 epochs:
# the framework has no 1x recipe for it).
_base_ = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"

# epsilon: no published value for DETR-like detectors; RetinaNet's, since the loss is the same.
model = dict(
    bbox_head=dict(loss_cls=dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=1.0))
)
