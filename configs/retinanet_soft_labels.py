# RetinaNet with Poly-1 focal loss on objects with several labels or soft labels: annotations
# with category_ids and category_scores, docs/soft_labels.md.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

# epsilon: that of retinanet_poly1; nothing was measured with soft labels.
model = dict(
    bbox_head=dict(loss_cls=dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=1.0))
)
train_dataloader = dict(dataset=dict(type="polyfocal.CocoDataset", soft_labels=True))
custom_hooks = [dict(type="polyfocal.SoftLabelsHook")]
