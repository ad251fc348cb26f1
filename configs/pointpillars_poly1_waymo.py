# PointPillars on Waymo with Poly-1 focal loss; gamma 2 and alpha 0.25 stay those of the base.
_base_ = "mmdet3d::pointpillars/pointpillars_hv_secfpn_sbn-all_16xb2-2x_waymo-3d-3class.py"

# epsilon: the PolyLoss paper gained 0.4 AP (cars) and 0.7 (pedestrians) with it in PointPillars on
# Waymo; which value it used is not verified. As in pointpillars_poly1_kitti.py: try on your data.
model = dict(
    pts_bbox_head=dict(
        type="polyfocal.Anchor3DHead",
        loss_cls=dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=-0.5),
    )
)
