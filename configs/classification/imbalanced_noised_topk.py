# Noised top-K with margins by class frequency, on cosines. epsilon 0.01, margin 0.2, scale 60 and
# B 5 are the paper's for Pl@ntNet-300K; the frequencies are those of the training split.
_base_ = "_base_/resnet32.py"
model = dict(
    normalized=True,
    loss=dict(
        _delete_=True,
        type="polyfocal.ImbalancedNoisedTopKLoss",
        k=5,
        epsilon=0.01,
        max_margin=0.2,
        scale=60.0,
        class_counts=None,
    ),
)
