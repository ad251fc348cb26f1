# Poly-1 cross-entropy.
_base_ = "_base_/resnet32.py"

# epsilon: 2, the paper's for ImageNet classification.
model = dict(
    loss=dict(_delete_=True, type="polyfocal.Poly1CrossEntropyLoss", use_sigmoid=False, epsilon=2.0)
)
