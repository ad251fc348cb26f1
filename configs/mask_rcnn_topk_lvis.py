# Mask R-CNN on LVIS v1 with the noised top-K loss on the box classifier.
_base_ = "mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py"

# k: background is ranked with the classes; with k > 1, background and a class could both be right.
# epsilon, num_samples: the paper's for Pl@ntNet-300K, its long-tailed data set.
# RoILoss stretches the scores: a plain softmax of LVIS' 1,204 scores is flat at the loss's margin.
_loss = dict(type="polyfocal.NoisedTopKLoss", use_sigmoid=False, k=1, epsilon=1.0, num_samples=5)
_loss_cls = dict(_delete_=True, type="polyfocal.RoILoss", loss=_loss)
model = dict(roi_head=dict(bbox_head=dict(loss_cls=_loss_cls)))
