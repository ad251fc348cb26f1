# Mask R-CNN with cyclical focal loss, the paper's softmax form, on the box classifier.
from detectron2.config import LazyCall as L

from polyfocal import CyclicalFocalLoss
from polyfocal.detectron2 import FastRCNNOutputLayers

from .mask_rcnn_ce import dataloader, lr_multiplier, model, optimizer, train

# The paper's gamma_hc 3, gamma_lc 2 and factor 4 are the defaults.
model.roi_heads.box_predictor._target_ = FastRCNNOutputLayers
model.roi_heads.box_predictor.cls_loss = L(CyclicalFocalLoss)(use_sigmoid=False)
