# RetinaNet with Poly-1 focal loss on objects of several classes, or of shares of them: annotations
# with category_ids and category_scores, docs/soft_labels.md.
_base_ = "retinanet_poly1.py"

train_dataloader = dict(dataset=dict(type="polyfocal.CocoDataset", soft_labels=True))
custom_hooks = [dict(type="polyfocal.SoftLabelsHook")]
