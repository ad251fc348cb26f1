# The baseline: the model zoo's RetinaNet with its focal loss (gamma 2, alpha 0.25), untouched.
from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
model, dataloader, train = _zoo.model, _zoo.dataloader, _zoo.train
optimizer, lr_multiplier = _zoo.optimizer, _zoo.lr_multiplier
