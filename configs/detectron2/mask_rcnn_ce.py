# The baseline: the model zoo's Mask R-CNN with its cross-entropy (softmax), untouched.
from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
model, dataloader, train = _zoo.model, _zoo.dataloader, _zoo.train
optimizer, lr_multiplier = _zoo.optimizer, _zoo.lr_multiplier
