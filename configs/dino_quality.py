# The baseline: DINO with MMDetection's quality focal loss (beta 2) instead of its focal loss.
_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True, type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0
        )
    )
)
