# FCOS with Poly-1 focal loss; gamma 2 and alpha 0.25 stay those of the baseline.
from detectron2.config import LazyCall as L

from polyfocal import Poly1FocalLoss
from polyfocal.detectron2 import FCOS

from .fcos_focal import dataloader, lr_multiplier, model, optimizer, train

# epsilon: no published value for FCOS; RetinaNet's, since the loss and its role are the same.
model._target_ = FCOS
model.cls_loss = L(Poly1FocalLoss)(epsilon=1.0, use_sigmoid=True)
