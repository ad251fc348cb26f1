"""A classifier for MMEngine's Runner: a backbone, a linear layer and a loss of the registry."""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from polyfocal.errors import UserError
from polyfocal.losses import BiasHead, ClassificationLoss
from polyfocal.mmengine.registry import MODELS


@MODELS.register_module()
class CifarResNet(nn.Module):
    """The ResNet for small pictures: a 3 x 3 stem and three stages of basic blocks.

    Feature maps (N, 4 base_channels, H / 4, W / 4) of pictures (N, 3, H, W). At the beginning of a
    stage, the shortcut halves the picture and fills the new channels with zeros.

    Args:
        depth: 6 n + 2 with n >= 1 blocks per stage: 8, 14, 20, 32, 44, 56, 110.
        base_channels: channels of the first stage.

    Source: He et al., Deep Residual Learning for Image Recognition (2016), section 4.2.
    """

    def __init__(self, depth: int = 32, base_channels: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth={depth} of CifarResNet: expected 6 n + 2, such as 8, 20 or 32")
        self.out_channels = 4 * base_channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, base_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(base_channels),
            nn.ReLU(),
        )
        widths = [base_channels * 2**stage for stage in range(3)]
        blocks = []
        channels = base_channels
        for stage, width in enumerate(widths):
            for block in range((depth - 2) // 6):
                blocks.append(_Block(channels, width, 2 if stage and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """The last feature map of (N, 3, H, W)."""
        return self.blocks(self.stem(x))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.more = width - channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.more:
            x = x[..., :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Batches of uint8 pictures to floats of mean 0 and deviation 1; shifts and mirrors to train.

    Args:
        mean, std: of the three colours, in [0, 255].
        padding: a training picture is shifted by at most so many pixels each way; the rest is
            black.
        flip: mirror half of the training pictures.
    """

    def __init__(
        self,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (255.0, 255.0, 255.0),
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.padding = padding
        self.flip = flip

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch with ``inputs`` stacked, on the model's device and normalised."""
        inputs = torch.stack(list(data["inputs"])).to(self.device, non_blocking=True)
        inputs = (inputs.float() - self.mean) / self.std
        if training and self.padding:
            inputs = self._shifted(inputs)
        if training and self.flip:
            mirrored = torch.rand(len(inputs), device=inputs.device) < 0.5
            inputs = torch.where(mirrored.view(-1, 1, 1, 1), inputs.flip(3), inputs)
        return {**data, "inputs": inputs}

    def _shifted(self, inputs: Tensor) -> Tensor:
        n, _, height, width = inputs.shape
        size = 2 * self.padding + 1
        top, left = torch.randint(0, size, (2, n, 1), device=inputs.device)
        black = F.pad(inputs + self.mean / self.std, [self.padding] * 4) - self.mean / self.std
        rows = (top + torch.arange(height, device=inputs.device)).view(n, 1, height, 1)
        columns = (left + torch.arange(width, device=inputs.device)).view(n, 1, 1, width)
        sample = torch.arange(n, device=inputs.device).view(n, 1, 1, 1)
        channel = torch.arange(3, device=inputs.device).view(1, 3, 1, 1)
        return black[sample, channel, rows, columns]


@MODELS.register_module()
class Classifier(BaseModel):
    """Backbone, mean over the last feature map, linear layer, loss.

    The :class:`~polyfocal.losses.BiasHead` of a debiasing loss sees the mean and the deviation of
    the pictures' colours, or the features.

    Args:
        backbone: config; its last output is taken, (N, in_channels, H, W).
        in_channels: input channels of the linear layer.
        num_classes: C.
        loss: config of a loss of this package in its softmax form.
        normalized: logits are the cosines of features and weights, for the losses with their own
            scale (LDAM, imbalanced noised top-K).
        data_preprocessor: config, :class:`ImagePreprocessor`.
        init_cfg: as MMEngine has it.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        in_channels: int,
        num_classes: int,
        loss: dict[str, Any],
        normalized: bool = False,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MMENGINE_MODELS.build(backbone)
        self.head = nn.Linear(in_channels, num_classes, bias=not normalized)
        self.normalized = normalized
        built = MMENGINE_MODELS.build(loss)
        if not isinstance(built, ClassificationLoss) or built.use_sigmoid:
            raise UserError(
                f"Classifier has loss=dict(type={loss.get('type')!r}): expected a loss of polyfocal"
                " with use_sigmoid=False, since a picture has one class"
            )
        self.loss = built

    def forward(
        self,
        inputs: Tensor,
        data_samples: list[BaseDataElement] | None = None,
        mode: str = "tensor",
    ) -> Any:
        """Logits, losses or predictions.

        Args:
            inputs: (N, 3, H, W), normalised.
            data_samples: N with ``label`` and ``sample_idx``; not needed for logits.
            mode: ``"tensor"`` for logits (N, C); ``"loss"`` for a dictionary with ``loss``;
                ``"predict"`` for N data samples that have ``scores`` (C,) too.
        """
        maps = self.backbone(inputs)
        features = (maps[-1] if isinstance(maps, list | tuple) else maps).mean(dim=(2, 3))
        logits = self._classify(features)
        if mode == "tensor":
            return logits
        if mode == "loss":
            self._inform_bias(inputs, features)
            labels = [sample.label for sample in data_samples or ()]
            return {"loss": self.loss(logits, torch.tensor(labels, device=logits.device))}
        activation = getattr(self.loss, "activation", None)
        scores = activation(logits) if activation else logits.float().softmax(dim=1)
        return [
            BaseDataElement(metainfo=sample.metainfo, scores=row)
            for sample, row in zip(data_samples or (), scores, strict=True)
        ]

    def _classify(self, features: Tensor) -> Tensor:
        if self.normalized:
            return F.linear(F.normalize(features), F.normalize(self.head.weight))
        return self.head(features)

    def _inform_bias(self, inputs: Tensor, features: Tensor) -> None:
        for source in self.loss.modules():
            if isinstance(source, BiasHead):
                if source.sees == "geometry":
                    raise UserError("BiasHead sees='geometry': a classifier has no boxes")
                seen = features
                if source.sees == "colour":
                    seen = torch.cat([inputs.mean(dim=(2, 3)), inputs.std(dim=(2, 3))], dim=1)
                source.offer([source.classify(seen)])
