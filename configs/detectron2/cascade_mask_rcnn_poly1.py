# Cascade Mask R-CNN with Poly-1 cross-entropy on the box classifiers of all three stages.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from polyfocal import Poly1CrossEntropyLoss
from polyfocal.detectron2 import FastRCNNOutputLayers

from .mask_rcnn_ce import dataloader, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
model.backbone.bottom_up.freeze_at = 2
model.proposal_generator.post_nms_topk = (2000, 1000)  # as the zoo's yaml for it

# epsilon: the PolyLoss paper's for Mask R-CNN on COCO, whose box classifier each stage repeats.
for _stage in model.roi_heads.box_predictors:
    _stage._target_ = FastRCNNOutputLayers
    _stage.cls_loss = L(Poly1CrossEntropyLoss)(use_sigmoid=False, epsilon=-1.0)
