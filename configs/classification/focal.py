# Focal loss. gamma 2 as in the noised top-K paper's comparison, no alpha: it means nothing here.
_base_ = "_base_/resnet32.py"
model = dict(loss=dict(gamma=2.0))
