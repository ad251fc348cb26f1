# RetinaNet with Poly-1 focal loss; gamma 2 and alpha 0.25 stay those of the baseline.
from detectron2.config import LazyCall as L

from polyfocal import Poly1FocalLoss
from polyfocal.detectron2 import RetinaNet

from .retinanet_focal import dataloader, lr_multiplier, model, optimizer, train

# epsilon: that of configs/retinanet_poly1.py, where its reason is.
model._target_ = RetinaNet
model.cls_loss = L(Poly1FocalLoss)(epsilon=1.0, use_sigmoid=True)
