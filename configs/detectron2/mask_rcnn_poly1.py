# Mask R-CNN with Poly-1 cross-entropy on the box classifier.
from detectron2.config import LazyCall as L

from polyfocal import Poly1CrossEntropyLoss
from polyfocal.detectron2 import FastRCNNOutputLayers

from .mask_rcnn_ce import dataloader, lr_multiplier, model, optimizer, train

# epsilon: the PolyLoss paper's for Mask R-CNN on COCO. -1 takes away the first polynomial term.
model.roi_heads.box_predictor._target_ = FastRCNNOutputLayers
model.roi_heads.box_predictor.cls_loss = L(Poly1CrossEntropyLoss)(use_sigmoid=False, epsilon=-1.0)
