# VFNet with Poly-1 varifocal loss; alpha 0.75, gamma 2 and iou_weighted stay those of the base.
_base_ = "mmdet::vfnet/vfnet_r50_fpn_1x_coco.py"

# epsilon: no published value for a varifocal loss. RetinaNet's; no gain on blood cells
# (docs/results.md), so tune it on your data.
model = dict(
    bbox_head=dict(
        loss_cls=dict(type="polyfocal.Poly1VarifocalLoss", use_sigmoid=True, epsilon=1.0)
    )
)
