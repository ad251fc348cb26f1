# LDAM on cosines: margin 0.5 and scale 30, its authors' for CIFAR; without deferred reweighting.
_base_ = "_base_/resnet32.py"
model = dict(
    normalized=True,
    loss=dict(
        _delete_=True, type="polyfocal.LDAMLoss", class_counts=None, max_margin=0.5, scale=30.0
    ),
)
