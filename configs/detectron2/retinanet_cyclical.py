# RetinaNet with cyclical focal loss in its sigmoid form.
from detectron2.config import LazyCall as L

from polyfocal import CyclicalFocalLoss
from polyfocal.detectron2 import RetinaNet

from .retinanet_focal import dataloader, lr_multiplier, model, optimizer, train

# The paper's gamma_hc 3, gamma_lc 2 and factor 4; alpha 0.25 as in the focal loss it replaces.
model._target_ = RetinaNet
model.cls_loss = L(CyclicalFocalLoss)(use_sigmoid=True, alpha=0.25)
