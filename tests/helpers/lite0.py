"""Weights for EfficientNet-Lite0 where the package that holds ImageNet's is not installed."""

import torch

from polyfocal import efficientnet


def use_random_weights(monkeypatch, folder):
    """Have the small profile find a file like the package's, with weights drawn from a seed."""
    torch.manual_seed(0)
    net = efficientnet.EfficientNetLite0()
    weights = net.state_dict()
    for name, value in weights.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif name.endswith(("running_mean", "norm.bias")):
            value.normal_(std=0.1)
    file = folder / "efficientnet-lite0.pth"
    torch.save({theirs: weights[ours] for ours, theirs in net._names()}, file)
    monkeypatch.setattr(efficientnet, "weights_file", lambda: file)
    return file
