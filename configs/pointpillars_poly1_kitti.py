# PointPillars with Poly-1 focal loss; gamma 2 and alpha 0.25 stay those of the base.
_base_ = "mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"

# epsilon: nothing is published for KITTI, and the values of the PolyLoss paper on LiDAR are not
# verified. Below 0, easy anchors weigh less and backgrounds are many: a start, choose on your data.
model = dict(
    bbox_head=dict(
        type="polyfocal.Anchor3DHead",
        loss_cls=dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=-0.5),
    )
)
