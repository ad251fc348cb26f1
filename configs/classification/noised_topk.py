# Balanced noised top-K. epsilon 0.2 and B 10 are the paper's for CIFAR-100 with noisy labels.
_base_ = "_base_/resnet32.py"
model = dict(
    loss=dict(_delete_=True, type="polyfocal.NoisedTopKLoss", k=5, epsilon=0.2, num_samples=10)
)
