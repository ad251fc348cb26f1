# Mask R-CNN on LVIS v1 with the noised top-K loss on the box classifier.
_base_ = "mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py"

# k: background is one of the ranked classes, and k > 1 would let it and a class both be "right".
# epsilon, num_samples: the paper's for Pl@ntNet-300K, its long-tailed data set.
# RoILoss: the softmax of LVIS' 1,204 scores is flat at the loss's margin; it stretches them.
_loss = dict(type="polyfocal.NoisedTopKLoss", use_sigmoid=False, k=1, epsilon=1.0, num_samples=5)
_loss_cls = dict(_delete_=True, type="polyfocal.RoILoss", loss=_loss)
model = dict(roi_head=dict(bbox_head=dict(loss_cls=_loss_cls)))
