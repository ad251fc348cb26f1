# Cascade Mask R-CNN with Poly-1 cross-entropy on the box classifiers of all three stages.
_base_ = "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"

# epsilon: the PolyLoss paper's for Mask R-CNN on COCO, whose box classifier each stage repeats.
_loss_cls = dict(type="polyfocal.Poly1CrossEntropyLoss", use_sigmoid=False, epsilon=-1.0)
model = _base_.model
for _stage in model.roi_head.bbox_head:
    _stage.loss_cls = _loss_cls
