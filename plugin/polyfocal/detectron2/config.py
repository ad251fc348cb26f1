"""The keys that the adapter's classes read from a yaml config."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    meta_arch,
)
from detectron2.modeling.meta_arch import GeneralizedRCNN
from fvcore.common.registry import Registry

from polyfocal.detectron2.dense import RetinaNet
from polyfocal.detectron2.rcnn import (
    RPN,
    CascadeROIHeads,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from polyfocal.errors import UserError

_READERS: dict[str, tuple[str, Registry, tuple[type, ...]]] = {
    "RETINANET": ("META_ARCHITECTURE", META_ARCH_REGISTRY, (RetinaNet,)),
    "ROI_BOX_HEAD": (
        "ROI_HEADS.NAME",
        ROI_HEADS_REGISTRY,
        (StandardROIHeads, CascadeROIHeads, Res5ROIHeads),
    ),
    "ROI_MASK_HEAD": (
        "ROI_MASK_HEAD.NAME",
        ROI_MASK_HEAD_REGISTRY,
        (MaskRCNNConvUpsampleHead,),
    ),
    "RPN": ("PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY, (RPN,)),
}
"""By the part with a ``CLS_LOSS``: the key of the class that reads it, and the classes that do."""

_HAVE_PART: dict[str, Any] = {
    "RETINANET": meta_arch.RetinaNet,
    "RPN": GeneralizedRCNN | meta_arch.ProposalNetwork,
}
"""The architectures that have a part, if not only GeneralizedRCNN has it."""

LOSS_PARTS = tuple(_READERS)
"""The parts of ``MODEL`` that have a ``CLS_LOSS``."""

_OTHER_PARTS: dict[str, Registry] = {
    "ROI_HEADS": ROI_HEADS_REGISTRY,
    "ROI_KEYPOINT_HEAD": ROI_KEYPOINT_HEAD_REGISTRY,
    "PROPOSAL_GENERATOR": PROPOSAL_GENERATOR_REGISTRY,
    "SEM_SEG_HEAD": SEM_SEG_HEADS_REGISTRY,
}
"""Parts that a ``CLS_LOSS`` can be assigned to, beside the registry of the class they name."""


def add_polyfocal_config(cfg: CfgNode) -> None:
    """Add the keys of :mod:`polyfocal.detectron2` to a config, as Detectron2's projects do.

    ``CLS_LOSS`` in ``MODEL.RETINANET``, ``MODEL.ROI_BOX_HEAD``, ``MODEL.ROI_MASK_HEAD`` and
    ``MODEL.RPN``: a dictionary with the ``type`` of a loss and its keywords, as in an MMDetection
    config; and ``MODEL.ROI_BOX_HEAD.PRIOR_PROB``, see
    :class:`polyfocal.detectron2.FastRCNNOutputLayers`.

    Every keyword of the loss can then be given in files and in ``merge_from_list``, and a
    dictionary can be assigned. ``cfg.freeze()`` refuses a ``CLS_LOSS`` that no class would read.

    Example:
        >>> cfg = get_cfg()
        >>> add_polyfocal_config(cfg)
        >>> cfg.merge_from_file("configs/detectron2/retinanet_poly1.yaml")
    """
    _adopt(cfg)
    for part in _READERS:
        cfg.MODEL[part].CLS_LOSS = {}
    cfg.MODEL.ROI_BOX_HEAD.PRIOR_PROB = None


def check_losses_are_read(cfg: CfgNode) -> None:
    """Refuse a loss in a config whose classes would train another loss.

    Raises:
        UserError: The config has a ``CLS_LOSS`` that its classes do not read.
    """
    for part in _READERS:
        problem = _why_unread(cfg.MODEL, part) if cfg.MODEL[part].CLS_LOSS else None
        if problem is not None:
            raise UserError(f"MODEL.{part}.CLS_LOSS would have no effect: {problem}.")
    for part, registry in _OTHER_PARTS.items():
        node = cfg.MODEL[part]
        if "CLS_LOSS" in node and not _may_read(node.NAME, registry):
            raise UserError(
                f"MODEL.{part}.CLS_LOSS would have no effect: {node.NAME} does not read it; a loss"
                f" belongs to MODEL.{', MODEL.'.join(LOSS_PARTS)}."
            )
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if box_head.PRIOR_PROB is not None and not box_head.CLS_LOSS:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.PRIOR_PROB would have no effect: it is for a sigmoid loss in"
            " MODEL.ROI_BOX_HEAD.CLS_LOSS, which the config does not have."
        )


def _why_unread(model: CfgNode, part: str) -> str | None:
    key, registry, readers = _READERS[part]
    if model.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return None  # which stops the training by itself
    architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    if not issubclass(architecture, _HAVE_PART.get(part, GeneralizedRCNN)):
        return f"MODEL.META_ARCHITECTURE is {model.META_ARCHITECTURE}, which has no such part"
    if part == "ROI_MASK_HEAD" and not model.MASK_ON:
        return "MODEL.MASK_ON is False"
    node, _, name = key.rpartition(".")
    named = (model[node] if node else model)[name]
    if named == "PrecomputedProposals":
        return f"MODEL.{key} is {named}, which trains no proposals"
    ours = [f"Polyfocal{reader.__name__}" for reader in readers]
    if named in ours or _may_read(named, registry):
        return None
    wanted = [one for one in ours if one == f"Polyfocal{named}"] or ours
    return f"MODEL.{key} is {named}, which has a loss of its own: write {' or '.join(wanted)}"


def _may_read(named: str, registry: Registry) -> bool:
    """Whether a class may read a loss: a user's class may; an unknown name stops by itself."""
    return named not in registry or not registry.get(named).__module__.startswith(
        ("detectron2.", "polyfocal.")
    )


class _Config(CfgNode):
    """A config whose losses take any keyword, and which is checked when it is frozen."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, dict):
            value = _adopt(value) if isinstance(value, CfgNode) else _Config(value)
            if name == "CLS_LOSS":
                value.set_new_allowed(True)
        super().__setattr__(name, value)

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        if len(cfg_list) % 2:
            super().merge_from_list(cfg_list)  # says so
        for key, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            node, name = self, key
            while "." in name and isinstance(node.get(name.partition(".")[0]), CfgNode):
                first, _, name = name.partition(".")
                node = node[first]
            in_loss = "CLS_LOSS" in key.split(".")[:-1] and "." not in name
            if in_loss or (name == "CLS_LOSS" and name in node):
                # yacs would take neither a new keyword nor a whole number where a float was.
                setattr(node, name, self._decode_cfg_value(value))
            else:
                super().merge_from_list([key, value])

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        for part in _READERS:
            theirs = cfg_other.get("MODEL", {}).get(part, {}).get("CLS_LOSS") or {}
            for name in theirs:
                self.MODEL[part].CLS_LOSS.pop(name, None)
        super().merge_from_other_cfg(cfg_other)

    def freeze(self) -> None:
        if "MODEL" in self:
            check_losses_are_read(self)
        super().freeze()


def _adopt(node: CfgNode) -> CfgNode:
    """Give a config and all its nodes this class; yacs merges only nodes of the same class."""
    object.__setattr__(node, "__class__", _Config)  # yacs would take it for a key
    for value in node.values():
        if isinstance(value, CfgNode):
            _adopt(value)
    return node
