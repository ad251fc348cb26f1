# The baseline: cross-entropy, which is the focal loss with gamma 0.
_base_ = "_base_/resnet32.py"
