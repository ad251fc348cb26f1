# RetinaNet with cyclical focal loss in its sigmoid form.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

# The paper's gamma_hc 3, gamma_lc 2 and factor 4; alpha 0.25 as in the focal loss it replaces.
model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True, type="polyfocal.CyclicalFocalLoss", use_sigmoid=True, alpha=0.25
        )
    )
)
