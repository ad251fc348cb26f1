# Cyclical focal loss: gamma_hc 3, gamma_lc 2 and factor 4, the author's for CIFAR; without his
# label smoothing, which would be a second difference to the other configs.
_base_ = "_base_/resnet32.py"
model = dict(loss=dict(_delete_=True, type="polyfocal.CyclicalFocalLoss", use_sigmoid=False))
