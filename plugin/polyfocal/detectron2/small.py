"""The backbone of the small profile: EfficientNet-Lite0 with its ImageNet weights."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import Tensor

from polyfocal.efficientnet import CHANNELS, FROZEN_STAGES, RATE_FACTOR, EfficientNetLite0

_STAGES = tuple(f"res{number}" for number in range(2, 6))


class Lite0(Backbone):
    """EfficientNet-Lite0 under the names that Detectron2 gives the stages of a ResNet.

    Args:
        out_features: Names of stages, from ``res2`` to ``res5``, whose strides are 4 to 32.

    Shape:
        Pictures (N, 3, H, W) in RGB, normalised with 127.5 twice.

    Raises:
        UserError: The package of the weights is not installed.
    """

    def __init__(self, out_features: Sequence[str]) -> None:
        super().__init__()
        self.names = [name for name in _STAGES if name in out_features]
        stages = [_STAGES.index(name) for name in self.names]
        self.net = EfficientNetLite0(stages, FROZEN_STAGES)
        self.net.init_weights()

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """The features of a batch by the names of their stages."""
        return dict(zip(self.names, self.net(pictures), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides of what :meth:`forward` returns."""
        return {
            name: ShapeSpec(channels=CHANNELS[stage], stride=4 * 2**stage)
            for stage, name in enumerate(_STAGES)
            if name in self.names
        }


@BACKBONE_REGISTRY.register()
def build_polyfocal_lite0_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """For yaml: the feature pyramid of Detectron2's R-CNNs."""
    return _pyramid(cfg, Lite0(cfg.MODEL.RESNETS.OUT_FEATURES), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_polyfocal_retinanet_lite0_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """For yaml: the feature pyramid of Detectron2's RetinaNet."""
    bottom_up = Lite0(cfg.MODEL.RESNETS.OUT_FEATURES)
    return _pyramid(cfg, bottom_up, LastLevelP6P7(CHANNELS[-1], cfg.MODEL.FPN.OUT_CHANNELS))


def _pyramid(cfg: CfgNode, bottom_up: Backbone, top: LastLevelMaxPool | LastLevelP6P7) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def rate_factor(parameter: str) -> float:
    """The factor of a parameter's learning rate.

    Args:
        parameter: Name of the parameter in the model.
    """
    return RATE_FACTOR if parameter.startswith("backbone.bottom_up.") else 1.0
