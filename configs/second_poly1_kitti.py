# SECOND with Poly-1 focal loss; gamma 2 and alpha 0.25 stay those of the base. It needs a GPU.
_base_ = "mmdet3d::second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py"

# epsilon: as in pointpillars_poly1_kitti.py; nothing is published for SECOND.
model = dict(
    bbox_head=dict(
        type="polyfocal.Anchor3DHead",
        loss_cls=dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=-0.5),
    )
)
