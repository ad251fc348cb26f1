"""Connects bias heads to the heads of a detector: gives them their features and their loss."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polyfocal import heads
from polyfocal.errors import UserError
from polyfocal.losses import BiasHead
from polyfocal.mmengine.hooks import LossHook
from polyfocal.mmengine.registry import HOOKS

_TINY = 1e-6
# Of the heads in polyfocal.heads, those that hand all their places to the loss, one level after
# the other, and call it for nothing else. Others hand the positives only or go picture by picture.
_BY_LEVEL = {
    "AnchorHead", "RetinaHead", "RetinaSepBNHead", "FSAFHead", "SABLRetinaHead",
    "GuidedAnchorHead", "GARetinaHead", "GARPNHead", "RPNHead", "ATSSHead", "DDODHead", "YOLOFHead",
    "FCOSHead", "NASFCOSHead", "CondInstBboxHead", "BoxInstBboxHead", "FoveaHead", "RepPointsHead",
    "VFNetHead", "Anchor3DHead", "PartA2RPNHead", "FCOSMono3DHead", "PGDHead",
}  # fmt: skip


def attach_bias_heads(model: nn.Module) -> list[RemovableHandle]:
    """Lets every :class:`~polyfocal.losses.BiasHead` see what it is made for.

    After its own classifier, a head in training mode then also computes the bias head's logits for
    the same anchors or boxes, and offers them to its loss. Nothing is computed at test time.

    Args:
        model: an MMDetection detector with dense heads or two stages, maybe wrapped.

    Returns:
        Handles that undo it.

    Raises:
        UserError: there is no bias head, or one in a head whose rows it cannot follow.
    """
    seen: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    pools: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        extractors = getattr(module, "bbox_roi_extractor", None)
        if isinstance(extractors, nn.ModuleList):
            pools.update(zip(module.bbox_head, extractors, strict=True))  # type: ignore[arg-type]
        elif isinstance(extractors, nn.Module):
            pools[module.bbox_head] = extractors  # type: ignore[index]
    for name, head in list(model.named_modules()):
        loss = getattr(head, "loss_cls", None)
        if not isinstance(loss, nn.Module):
            continue
        sources = [source for source in loss.modules() if isinstance(source, BiasHead)]
        if not sources:
            continue
        if isinstance(head, BBoxHead):
            if head not in pools:
                raise UserError(f"{name} has a BiasHead, but no pooling of boxes feeds it")
            handles.append(_watch_boxes(pools[head], seen, name))
            offer: Callable[..., None] = _offer_boxes(sources, seen, name)
        else:
            _check_order(head, name)
            offer = _offer_cells(sources, seen, name)
        handles.append(head.register_forward_hook(offer))
    if not handles:
        raise UserError(
            "no loss of the model has a BiasHead: write bias=dict(type='BiasHead', ...)"
        )

    def keep_pictures(backbone: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["pictures"] = args[0].detach()

    inner: Any = getattr(model, "module", model)
    handles.append(inner.backbone.register_forward_pre_hook(keep_pictures))
    return handles


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class BiasHeadHook(LossHook):
    """:func:`attach_bias_heads` for the model of a Runner, while it trains.

    Example:
        >>> custom_hooks = [dict(type='polyfocal.BiasHeadHook')]
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before_train(self, runner: Any) -> None:
        self._handles = attach_bias_heads(runner.model)

    def after_train(self, runner: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _watch_boxes(pool: nn.Module, seen: dict[str, Tensor], name: str) -> RemovableHandle:
    def keep_boxes(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[name] = args[1].detach()

    return pool.register_forward_pre_hook(keep_boxes)


def _offer_boxes(
    sources: list[BiasHead], seen: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
    colours = RoIAlign((4, 4), spatial_scale=1.0, sampling_ratio=2)

    def offer(head: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if not head.training:
            return
        pictures, boxes = seen["pictures"], seen[name].float()
        for source in sources:
            if source.sees == "colour":
                pixels = colours(pictures.float(), boxes).flatten(2)
                features = torch.cat([pixels.mean(2), pixels.std(2, correction=0)], dim=1)
            elif source.sees == "geometry":
                features = _geometry(boxes[:, 1:], pictures)
            else:
                features = args[0].flatten(2).mean(2) if args[0].dim() > 2 else args[0]
                _check_features(source, features, name)
            source.offer([source.classify(features)])

    return offer


def _geometry(boxes: Tensor, pictures: Tensor) -> Tensor:
    height, width = pictures.shape[-2:]
    x1, y1, x2, y2 = (boxes / boxes.new_tensor([width, height, width, height])).unbind(1)
    w, h = (x2 - x1).clamp_min(_TINY), (y2 - y1).clamp_min(_TINY)
    aspect = torch.log(w * width / (h * height))
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, w.log(), h.log(), aspect], dim=1)


def _offer_cells(
    sources: list[BiasHead], seen: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def offer(head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not head.training:
            return
        scores: Any = output[0] if isinstance(output, tuple | list) else None
        levels = isinstance(scores, tuple | list) and all(
            isinstance(score, Tensor) and score.dim() == 4 for score in scores
        )
        if not levels:
            raise UserError(_unfollowed(head, name))
        for source in sources:
            expected = source.num_anchors * source.columns
            if scores[0].shape[1] != expected:
                raise UserError(
                    f"{name} has {scores[0].shape[1]} scores at each place and its BiasHead"
                    f" {expected} (num_anchors={source.num_anchors}, {source.columns} columns):"
                    " give it the head's num_anchors and num_classes"
                )
            ready = []
            for level, score in enumerate(scores):
                features = _of_cells(source.sees, seen["pictures"], score.shape[-2:])
                if features is None:
                    features = args[0][level]
                    _check_features(source, features, name)
                flat = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
                ready.append(source.classify(flat))
            source.offer(ready)

    return offer


def _check_order(head: nn.Module, name: str) -> None:
    slot = heads.slot_of(type(head), "loss_cls")
    if slot is None or slot.head not in _BY_LEVEL:
        raise UserError(_unfollowed(head, name))


def _unfollowed(head: nn.Module, name: str) -> str:
    return (
        f"{name} is a {type(head).__name__} with a BiasHead: expected a head that gives one map of"
        " scores per level and hands all of them to its loss in that order, such as RetinaHead,"
        " FCOSHead or ATSSHead"
    )


def _of_cells(sees: str, pictures: Tensor, size: tuple[int, int]) -> Tensor | None:
    """(N, F, h, w) of the cells that a level's grid cuts the pictures into."""
    pictures = pictures.float()
    height, width = pictures.shape[-2:]
    h, w = size
    if sees == "colour":
        mean = F.adaptive_avg_pool2d(pictures, size)
        square = F.adaptive_avg_pool2d(pictures**2, size)
        return torch.cat([mean, (square - mean**2).clamp_min(0).sqrt()], dim=1)
    if sees != "geometry":
        return None
    y, x = torch.meshgrid(
        (torch.arange(h, device=pictures.device) + 0.5) / h,
        (torch.arange(w, device=pictures.device) + 0.5) / w,
        indexing="ij",
    )
    half = 0.5 * torch.ones_like(x)
    cells = torch.stack(
        [(x - half / w) * width, (y - half / h) * height, (x + half / w) * width,
         (y + half / h) * height], dim=-1,
    )  # fmt: skip
    features = _geometry(cells.reshape(-1, 4), pictures).T.reshape(1, -1, h, w)
    return features.expand(len(pictures), -1, -1, -1)


def _check_features(source: BiasHead, features: Tensor, name: str) -> None:
    found, expected = features.shape[1], source.layers[0].in_features
    if found != expected:
        raise UserError(
            f"the features of {name} have {found} channels and its BiasHead in_channels={expected}:"
            f" write in_channels={found}"
        )
