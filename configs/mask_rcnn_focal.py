# Mask R-CNN with a sigmoid focal loss on the box classifier.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

_loss = dict(type="polyfocal.FocalLoss", use_sigmoid=True)
# The head divides by all sampled RoIs, focal loss by the positives, of which the sampler takes 1/4.
_loss["loss_weight"] = 4.0
# All classes start at p = 0.01, as in RetinaNet: at 0.5 the 80 sigmoids would drown the positives.
_init = [
    dict(type="Normal", std=0.01, bias_prob=0.01, override=dict(name="fc_cls")),
    dict(type="Normal", std=0.001, override=dict(name="fc_reg")),
    dict(type="Xavier", distribution="uniform", override=dict(name="shared_fcs")),
]
_loss_cls = dict(_delete_=True, type="polyfocal.RoILoss", loss=_loss)
model = dict(roi_head=dict(bbox_head=dict(loss_cls=_loss_cls, init_cfg=_init)))
