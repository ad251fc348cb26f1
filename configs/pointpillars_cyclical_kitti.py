# PointPillars with cyclical focal loss in its sigmoid form.
_base_ = "mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"

# The paper's gamma_hc 3, gamma_lc 2 and factor 4; alpha 0.25 as in the focal loss it replaces.
model = dict(
    bbox_head=dict(
        type="polyfocal.Anchor3DHead",
        loss_cls=dict(
            _delete_=True, type="polyfocal.CyclicalFocalLoss", use_sigmoid=True, alpha=0.25
        ),
    )
)
