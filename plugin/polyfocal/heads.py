"""What every head hands to its losses, and which losses fit there: one table.

A loss cannot see its head, and a head does not check its loss. If a focal loss stands where pairs
of labels and qualities arrive, that shows at the first step or never. This table says for each
slot of each head of MMDetection 3.3, MMDetection3D 1.4 and Detectron2 what arrives there. The
checks of placement, ``polyfocal.swap`` and docs/heads.md read this table.

Nothing here imports a framework: heads are named.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from polyfocal import losses
from polyfocal.losses.quality import QualityLoss

# What a loss is, as far as heads are concerned.
SIGMOID = "sigmoid"
SOFTMAX = "softmax"
OWN_SOFTMAX = "softmax of its own"
QUALITY = "IoU-aware"
PROBABILITY_QUALITY = "IoU-aware, activated"
PROBABILITY = "focal, activated"
HEATMAP = "heatmap"
# Adapters, by their class; a RoILoss with C + 1 outputs apart, since more heads have those.
ADAPTERS = ("RoILoss", "MaskLoss", "MinusOneBackground")
ROI_SOFTMAX = "RoILoss, C + 1 outputs"

FAMILIES = {
    SIGMOID: "a sigmoid loss",
    SOFTMAX: "a softmax loss",
    OWN_SOFTMAX: "a noised top-K loss, or `LDAMLoss` with a scale that is not 1",
    QUALITY: "an IoU-aware loss",
    PROBABILITY_QUALITY: "`Poly1QualityFocalLoss` with `activated=True`",
    PROBABILITY: "`Poly1FocalLoss` with `activated=True`",
    HEATMAP: "`GaussianPoly1FocalLoss`",
    "RoILoss": "`RoILoss` around a sigmoid loss",
    ROI_SOFTMAX: "`RoILoss` around a top-K loss or `LDAMLoss`",
    "MaskLoss": "`MaskLoss` around a sigmoid loss",
    "MinusOneBackground": "`MinusOneBackground` around a sigmoid loss",
}


class Kind(NamedTuple):
    """What arrives at a loss.

    Attributes:
        gives: in words.
        fits: families and adapters that take it.
        take: what to write where another loss was written.
    """

    gives: str
    fits: tuple[str, ...]
    take: str


KINDS = {
    "labels": Kind(
        "logits and labels, background C",
        (SIGMOID, SOFTMAX),
        "a loss of labels, for instance type='polyfocal.Poly1FocalLoss'",
    ),
    "sigmoid labels": Kind(
        "logits and labels, background C",
        (SIGMOID,),
        "a sigmoid loss of labels, for instance type='polyfocal.Poly1FocalLoss', use_sigmoid=True",
    ),
    "labels or qualities": Kind(
        "logits and labels, or labels with the overlaps of the boxes for an IoU-aware loss",
        (SIGMOID, SOFTMAX, QUALITY),
        "a loss of labels, for instance type='polyfocal.Poly1FocalLoss', or an IoU-aware loss, for"
        " instance type='polyfocal.Poly1QualityFocalLoss'",
    ),
    "sigmoid labels or qualities": Kind(
        "logits and labels, or labels with the overlaps of the boxes for an IoU-aware loss",
        (SIGMOID, QUALITY),
        "a sigmoid loss of labels, for instance type='polyfocal.Poly1FocalLoss', use_sigmoid=True,"
        " or an IoU-aware loss, for instance type='polyfocal.Poly1QualityFocalLoss'",
    ),
    "qualities": Kind(
        "pairs of labels and quality scores",
        (QUALITY,),
        "an IoU-aware loss, for instance type='polyfocal.Poly1QualityFocalLoss'",
    ),
    "quality matrix": Kind(
        "the overlaps of the predicted boxes as targets (N, C)",
        (QUALITY,),
        "an IoU-aware loss, for instance type='polyfocal.Poly1VarifocalLoss'",
    ),
    "probabilities and qualities": Kind(
        "probabilities with pairs of labels and quality scores",
        (PROBABILITY_QUALITY,),
        "type='polyfocal.Poly1QualityFocalLoss' with activated=True",
    ),
    "probabilities and labels": Kind(
        "probabilities and labels",
        (PROBABILITY,),
        "type='polyfocal.Poly1FocalLoss' with activated=True",
    ),
    "heatmap": Kind(
        "the probabilities of a heatmap and a target of Gaussian bumps",
        (HEATMAP,),
        "type='polyfocal.GaussianPoly1FocalLoss', without use_sigmoid",
    ),
    "heatmap and positives": Kind(
        "the probabilities of heatmaps, targets of Gaussian bumps and the indices of the positives",
        (HEATMAP,),
        "type='polyfocal.GaussianPoly1FocalLoss', without use_sigmoid",
    ),
    "entries": Kind(
        "logits and targets in [0, 1] of one shape",
        (SIGMOID,),
        "a sigmoid loss, for instance type='polyfocal.Poly1CrossEntropyLoss', use_sigmoid=True",
    ),
    "positives": Kind(
        "the logits of the positives and their overlaps in the column of the label",
        (SIGMOID, QUALITY),
        "a sigmoid loss, for instance type='polyfocal.Poly1CrossEntropyLoss', use_sigmoid=True",
    ),
    "rows": Kind(
        "logits (N, C + 1) and labels, of which it takes the softmax",
        (SOFTMAX, "RoILoss", ROI_SOFTMAX),
        "a softmax loss, or type='polyfocal.RoILoss' around a sigmoid loss",
    ),
    "rows of C + 1": Kind(
        "logits (N, C + 1), whatever the loss is, and labels, of which it takes the softmax",
        (SOFTMAX, ROI_SOFTMAX),
        "a softmax loss, for instance type='polyfocal.Poly1CrossEntropyLoss', use_sigmoid=False",
    ),
    "softmax rows": Kind(
        "logits and labels, of which it takes the softmax",
        (SOFTMAX,),
        "a softmax loss, for instance type='polyfocal.Poly1CrossEntropyLoss', use_sigmoid=False",
    ),
    "training rows": Kind(
        "logits and labels, and takes no scores of them",
        (SOFTMAX, OWN_SOFTMAX),
        "a softmax loss, for instance type='polyfocal.Poly1CrossEntropyLoss', use_sigmoid=False",
    ),
    "masks": Kind(
        "the masks of all classes, with labels where other heads pass weights",
        ("MaskLoss",),
        "type='polyfocal.MaskLoss' around a sigmoid loss",
    ),
    "minus one": Kind(
        "logits and labels, background -1",
        ("MinusOneBackground",),
        "type='polyfocal.MinusOneBackground' around a sigmoid loss",
    ),
    "pictures": Kind(
        "logits (B, C, ...) with a class for each of their places",
        (),
        "the head's own loss: those of this package were not tried there",
    ),
    "overlap of masks": Kind(
        "probabilities of masks, for a loss of their overlap",
        (),
        "the head's own loss, which is no loss of single entries",
    ),
    "several positives": Kind(
        "similarities with several positives in a row",
        (),
        "the head's own loss: those of this package take one label per row",
    ),
    "unused": Kind(
        "nothing: its loss is written into it",
        (),
        "a head that asks its loss, such as RetinaHead or Anchor3DHead",
    ),
    "name": Kind(
        "logits and labels, but samples the anchors unless the loss is named FocalLoss",
        (),
        "the head of this package with the same name, type='polyfocal.Anchor3DHead' and so on,"
        " which is the same for any loss",
    ),
    "method": Kind(
        "logits and labels to a method, which a class of this package overrides",
        (),
        "the class of this package",
    ),
    "method of its own": Kind(
        "logits and targets to a method of its own, which no class of this package overrides",
        (),
        "the stock loss",
    ),
}


class Slot(NamedTuple):
    """One place for a loss in a head.

    Attributes:
        framework: the package that has the head, 'projects' for those beside it.
        head: the class.
        name: the attribute or keyword.
        kind: of :data:`KINDS`.
        decodes: what makes scores of the logits at test time.
        stock: the framework's loss there.
        note: what else to know.
    """

    framework: str
    head: str
    name: str
    kind: str
    decodes: str
    stock: str
    note: str = ""


_FOLLOWS = "as `use_sigmoid` says"


def _of(
    framework: str, kind: str, decodes: str, stock: str, heads: str, note: str = ""
) -> Iterator[Slot]:
    for place in heads.split():
        head, name = place.split(".")
        yield Slot(framework, head, name, kind, decodes, stock, note)


SLOTS: tuple[Slot, ...] = (
    # MMDetection, dense heads.
    *_of("mmdet", "labels", _FOLLOWS, "FocalLoss",
         "RetinaHead.loss_cls RetinaSepBNHead.loss_cls SABLRetinaHead.loss_cls"
         " GARetinaHead.loss_cls ATSSHead.loss_cls DDODHead.loss_cls FCOSHead.loss_cls"
         " NASFCOSHead.loss_cls RepPointsHead.loss_cls AnchorHead.loss_cls"
         " AnchorFreeHead.loss_cls GuidedAnchorHead.loss_cls"),
    # These count C columns of the logits whatever the loss is; PISA one, with a softmax.
    *_of("mmdet", "sigmoid labels", "sigmoid", "FocalLoss",
         "PISARetinaHead.loss_cls FSAFHead.loss_cls YOLOFHead.loss_cls"
         " CondInstBboxHead.loss_cls BoxInstBboxHead.loss_cls"),
    *_of("mmdet", "sigmoid labels", "sigmoid", "FocalLoss",
         "PAAHead.loss_cls LADHead.loss_cls FoveaHead.loss_cls SOLOHead.loss_cls"
         " DecoupledSOLOHead.loss_cls DecoupledSOLOLightHead.loss_cls SOLOV2Head.loss_cls"
         " DIIHead.loss_cls"),
    *_of("mmdet", "sigmoid labels", "sigmoid", "FocalLoss",
         "GARPNHead.loss_loc GARetinaHead.loss_loc GuidedAnchorHead.loss_loc",
         "one column: where anchors stand"),
    *_of("mmdet", "labels", _FOLLOWS, "CrossEntropyLoss",
         "RPNHead.loss_cls GARPNHead.loss_cls StageCascadeRPNHead.loss_cls"),
    *_of("mmdet", "softmax rows", "softmax", "CrossEntropyLoss", "YOLACTHead.loss_cls",
         "picks the hardest backgrounds by the loss of each row"),
    *_of("mmdet", "unused", "sigmoid", "none",
         "FreeAnchorRetinaHead.loss_cls AutoAssignHead.loss_cls SSDHead.loss_cls"),
    *_of("mmdet", "labels or qualities", _FOLLOWS, "FocalLoss",
         "DETRHead.loss_cls ConditionalDETRHead.loss_cls DABDETRHead.loss_cls",
         "the cost of the matching is its own, `assigner.match_costs`"),
    *_of("mmdet", "labels or qualities", _FOLLOWS, "FocalLoss", "DeformableDETRHead.loss_cls",
         "as DETRHead, but with `as_two_stage=True` as DINOHead"),
    *_of("mmdet", "sigmoid labels or qualities", "sigmoid", "FocalLoss", "DINOHead.loss_cls",
         "ranks the encoder's places by single logits, which a softmax leaves open; the cost of"
         " the matching is its own, `assigner.match_costs`"),
    *_of("mmdet", "sigmoid labels", "sigmoid", "FocalLoss", "DDQDETRHead.loss_cls",
         "of distinct queries it gives labels alone"),
    *_of("mmdet", "entries", "sigmoid", "FocalLoss",
         "GroundingDINOHead.loss_cls ATSSVLFusionHead.loss_cls",
         "the logits of the words that are there, flat"),
    *_of("mmdet", "qualities", "sigmoid", "QualityFocalLoss",
         "GFLHead.loss_cls LDHead.loss_cls RTMDetHead.loss_cls RTMDetSepBNHead.loss_cls"
         " RTMDetInsHead.loss_cls RTMDetInsSepBNHead.loss_cls"),
    *_of("projects", "qualities", "sigmoid", "QualityFocalLoss", "CoDINOHead.loss_cls",
         "MMDetection's projects/CO-DETR"),
    *_of("mmdet", "probabilities and qualities", "none", "QualityFocalLoss",
         "TOODHead.loss_cls DDQAuxLoss.loss_cls",
         "there are no logits: TOOD takes the root of the product of two sigmoids"),
    *_of("mmdet", "probabilities and labels", "none", "FocalLoss", "TOODHead.initial_loss_cls"),
    *_of("mmdet", "quality matrix", "sigmoid", "VarifocalLoss", "VFNetHead.loss_cls",
         "with `use_vfl=False` `loss_cls_fl` counts"),
    *_of("mmdet", "sigmoid labels", "sigmoid", "FocalLoss", "VFNetHead.loss_cls_fl",
         "a keyword, for `use_vfl=False`"),
    *_of("mmdet", "heatmap", "none", "GaussianFocalLoss",
         "CenterNetHead.loss_center_heatmap CornerHead.loss_heatmap CentripetalHead.loss_heatmap"),
    *_of("mmdet", "heatmap and positives", "sigmoid", "GaussianFocalLoss",
         "CenterNetUpdateHead.loss_cls"),
    *_of("mmdet", "positives", "sigmoid", "CrossEntropyLoss", "YOLOXHead.loss_cls",
         "reduction='sum': the head divides"),
    *_of("mmdet", "entries", "sigmoid", "CrossEntropyLoss",
         "YOLOXHead.loss_obj YOLOV3Head.loss_cls YOLOV3Head.loss_conf YOLOV3Head.loss_xy"
         " FCOSHead.loss_centerness NASFCOSHead.loss_centerness CondInstBboxHead.loss_centerness"
         " BoxInstBboxHead.loss_centerness ATSSHead.loss_centerness PAAHead.loss_centerness"
         " LADHead.loss_centerness ATSSVLFusionHead.loss_centerness DDODHead.loss_iou"
         " SABLRetinaHead.loss_bbox_cls SABLHead.loss_bbox_cls YOLACTProtonet.loss_segm"
         " GridHead.loss_grid Mask2FormerHead.loss_mask Mask2FormerTrackHead.loss_mask"),
    *_of("mmdet", "sigmoid labels", "sigmoid", "FocalLoss", "MaskFormerHead.loss_mask",
         "one column, label 0 inside of a mask and 1 outside"),
    *_of("mmdet", "overlap of masks", "none", "DiceLoss",
         "SOLOHead.loss_mask DecoupledSOLOHead.loss_mask DecoupledSOLOLightHead.loss_mask"
         " SOLOV2Head.loss_mask RTMDetInsHead.loss_mask RTMDetInsSepBNHead.loss_mask"
         " CondInstMaskHead.loss_mask BoxInstMaskHead.loss_mask DynamicMaskHead.loss_mask"
         " Mask2FormerHead.loss_dice Mask2FormerTrackHead.loss_dice MaskFormerHead.loss_dice"),
    *_of("mmdet", "softmax rows", "softmax", "CrossEntropyLoss",
         "Mask2FormerHead.loss_cls Mask2FormerTrackHead.loss_cls MaskFormerHead.loss_cls",
         "divides by the `class_weight` that it reads in the config: write one"),
    # MMDetection, RoI heads.
    *_of("mmdet", "rows", "softmax", "CrossEntropyLoss",
         "BBoxHead.loss_cls ConvFCBBoxHead.loss_cls Shared2FCBBoxHead.loss_cls"
         " Shared4Conv1FCBBoxHead.loss_cls SCNetBBoxHead.loss_cls"),
    *_of("mmdet", "rows of C + 1", "softmax", "CrossEntropyLoss", "DoubleConvFCBBoxHead.loss_cls"),
    *_of("mmdet", "softmax rows", "softmax", "CrossEntropyLoss",
         "SABLHead.loss_cls MultiInstanceBBoxHead.loss_cls"),
    *_of("mmdet", "masks", "sigmoid", "CrossEntropyLoss",
         "FCNMaskHead.loss_mask HTCMaskHead.loss_mask SCNetMaskHead.loss_mask"
         " CoarseMaskHead.loss_mask MaskPointHead.loss_point"),
    # MMDetection, the rest.
    *_of("mmdet", "training rows", "none", "CrossEntropyLoss", "LinearReIDHead.loss_cls",
         "training only: features are compared at test time"),
    *_of("mmdet", "softmax rows", "softmax", "CrossEntropyLoss",
         "PanopticFPNHead.loss_seg RoIEmbedHead.loss_match"),
    *_of("mmdet", "pictures", "softmax", "CrossEntropyLoss",
         "BaseSemanticHead.loss_seg FusedSemanticHead.loss_seg SCNetSemanticHead.loss_seg"),
    *_of("mmdet", "several positives", "none", "MultiPosCrossEntropyLoss",
         "QuasiDenseEmbedHead.loss_track"),
    # MMDetection3D.
    *_of("mmdet3d", "name", "sigmoid", "FocalLoss",
         "Anchor3DHead.loss_cls ShapeAwareHead.loss_cls PartA2RPNHead.loss_cls"),

    *_of("polyfocal", "sigmoid labels", "sigmoid", "FocalLoss",
         "Anchor3DHead.loss_cls ShapeAwareHead.loss_cls PartA2RPNHead.loss_cls"),
    *_of("mmdet3d", "unused", "sigmoid", "none", "FreeAnchor3DHead.loss_cls"),
    *_of("mmdet3d", "sigmoid labels", "sigmoid", "FocalLoss",
         "AnchorFreeMono3DHead.loss_cls FCOSMono3DHead.loss_cls PGDHead.loss_cls"
         " PointRPNHead.cls_loss"),
    *_of("mmdet3d", "softmax rows", "softmax", "CrossEntropyLoss",
         "AnchorFreeMono3DHead.loss_attr FCOSMono3DHead.loss_attr PGDHead.loss_attr"
         " AnchorFreeMono3DHead.loss_dir FCOSMono3DHead.loss_dir PGDHead.loss_dir"
         " Anchor3DHead.loss_dir ShapeAwareHead.loss_dir PartA2RPNHead.loss_dir"
         " Cylinder3DHead.loss_ce"),
    *_of("mmdet3d", "entries", "sigmoid", "CrossEntropyLoss",
         "FCOSMono3DHead.loss_centerness PGDHead.loss_centerness PVRCNNBBoxHead.loss_cls"
         " PartA2BboxHead.loss_cls PointRCNNBboxHead.loss_cls SSD3DHead.loss_objectness"
         " FCAF3DHead.center_loss ImVoxelHead.center_loss"),
    *_of("mmdet3d", "heatmap", "none", "GaussianFocalLoss",
         "CenterHead.loss_cls SMOKEMono3DHead.loss_cls MonoFlexHead.loss_cls"),
    *_of("mmdet3d", "minus one", "sigmoid", "FocalLoss",
         "ImVoxelHead.cls_loss FCAF3DHead.cls_loss"),
    *_of("projects", "minus one", "sigmoid", "FocalLoss", "NerfDetHead.cls_loss",
         "MMDetection3D's projects"),
    *_of("projects", "heatmap", "sigmoid", "GaussianFocalLoss", "TransFusionHead.loss_heatmap",
         "MMDetection3D's projects/BEVFusion"),
    *_of("projects", "heatmap", "none", "GaussianFocalLoss", "DSVTCenterHead.loss_cls",
         "MMDetection3D's projects/DSVT"),
    *_of("projects", "sigmoid labels", "sigmoid", "FocalLoss",
         "TransFusionHead.loss_cls TR3DHead.cls_loss PETRHead.loss_cls DETR3DHead.loss_cls",
         "MMDetection3D's projects"),
    *_of("mmdet3d", "pictures", "softmax", "CrossEntropyLoss",
         "VoteHead.loss_objectness VoteHead.semantic_loss SSD3DHead.semantic_loss"
         " GroupFree3DHead.loss_semantic PrimitiveHead.loss_objectness"
         " PrimitiveHead.loss_semantic_cls Base3DDecodeHead.loss_decode"),
    *_of("mmdet3d", "sigmoid labels", "sigmoid", "FocalLoss",
         "GroupFree3DHead.loss_objectness GroupFree3DHead.loss_sampling_objectness"
         " PointwiseSemanticHead.loss_seg"),
    *_of("mmdet3d", "probabilities and labels", "none", "FocalLoss",
         "ForegroundSegmentationHead.loss_seg"),
    *_of("mmdet3d", "entries", "sigmoid", "CrossEntropyLoss", "PointwiseSemanticHead.loss_part"),
    # Detectron2: its losses are methods; a class of this package takes `cls_loss`.
    *_of("detectron2", "method", "sigmoid", "sigmoid_focal_loss",
         "RetinaNet.losses FCOS.losses",
         "`polyfocal.detectron2.RetinaNet`, `FCOS`: a sigmoid loss"),
    *_of("detectron2", "method", "softmax", "cross_entropy", "FastRCNNOutputLayers.losses",
         "of Faster, Mask, Cascade and keypoint R-CNN and Panoptic FPN, with the federated loss"
         " too: `polyfocal.detectron2.FastRCNNOutputLayers`: a softmax loss, or a sigmoid loss"),
    *_of("detectron2", "method", "sigmoid", "mask_rcnn_loss", "MaskRCNNConvUpsampleHead.forward",
         "`polyfocal.detectron2.MaskRCNNConvUpsampleHead`: a sigmoid loss"),
    *_of("detectron2", "method", "sigmoid", "binary_cross_entropy", "RPN.losses",
         "`polyfocal.detectron2.RPN`: a sigmoid loss"),
    *_of("detectron2", "method of its own", "softmax", "cross_entropy",
         "SemSegFPNHead.losses", "a class for each of the pixels"),
    *_of("detectron2", "method of its own", "softmax", "cross_entropy",
         "KRCNNConvDeconvUpsampleHead.forward", "the place of a keypoint in a heatmap"),
    *_of("projects", "method of its own", "sigmoid", "sigmoid_focal_loss", "TensorMask.losses",
         "Detectron2's projects/TensorMask"),
)  # fmt: skip

_TABLE = {(slot.framework, slot.head, slot.name): slot for slot in SLOTS}
_FRAMEWORKS = {"mmdet", "mmdet3d", "polyfocal", "detectron2"}
_HEADS = {(slot.framework, slot.head) for slot in SLOTS}


def _framework(cls: type) -> str:
    package = cls.__module__.partition(".")[0]
    return package if package in _FRAMEWORKS else "projects"


def slot_of(head: type, name: str) -> Slot | None:
    """What the table says of an attribute of a head.

    A class that the table does not have counts as its nearest parent in the table.
    """
    for cls in head.__mro__:
        slot = _TABLE.get((_framework(cls), cls.__name__, name))
        if slot is not None:
            return slot
    return None


def is_known(head: type) -> bool:
    """Whether the table has the very class."""
    return (_framework(head), head.__name__) in _HEADS


def as_markdown() -> str:
    """The table as docs/heads.md shows it: one row for heads that are alike."""
    titles = {
        "mmdet": "MMDetection 3.3",
        "mmdet3d": "MMDetection3D 1.4",
        "polyfocal": "MMDetection3D's anchor heads as this package has them",
        "projects": "Projects beside the frameworks",
        "detectron2": "Detectron2",
    }
    parts = []
    for framework, title in titles.items():
        rows: dict[tuple[str, ...], list[str]] = {}
        for slot in SLOTS:
            if slot.framework == framework:
                alike = (slot.kind, slot.decodes, slot.stock, slot.note)
                rows.setdefault(alike, []).append(f"`{slot.head}.{slot.name}`")
        lines = [
            f"### {title}",
            "",
            "| head and slot | it gives | scores at test time | stock loss | what fits |",
            "|---|---|---|---|---|",
        ]
        for (kind, decodes, stock, note), places in rows.items():
            gives = KINDS[kind].gives + (f"; {note}" if note else "")
            fits = ", or ".join(FAMILIES[of] for of in KINDS[kind].fits)
            fits = fits or f"none: write {KINDS[kind].take}"
            stock = stock if stock == "none" else f"`{stock}`"
            lines.append(f"| {', '.join(places)} | {gives} | {decodes} | {stock} | {fits} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def family(loss: nn.Module) -> str | None:
    """What a loss of this package is, as far as heads are concerned; None for anything else."""
    name = type(loss).__name__
    if name in ADAPTERS and type(loss).__module__.startswith("polyfocal."):
        of_softmax = name == "RoILoss" and getattr(loss.loss, "use_sigmoid", None) is False
        return ROI_SOFTMAX if of_softmax else name
    if isinstance(loss, losses.GaussianPoly1FocalLoss):
        return HEATMAP
    if not isinstance(loss, losses.ClassificationLoss):
        return None
    activated = getattr(loss, "activated", False)
    if isinstance(loss, QualityLoss):
        return PROBABILITY_QUALITY if activated else QUALITY
    if activated:
        return PROBABILITY
    if isinstance(loss, losses.NoisedTopKLoss) or (
        isinstance(loss, losses.LDAMLoss) and loss.scale != 1
    ):
        return OWN_SOFTMAX
    return SIGMOID if loss.use_sigmoid else SOFTMAX


def misplaced(head: type, name: str, loss: nn.Module, kind: Kind) -> str | None:
    """Why a loss of this package does not fit where ``kind`` arrives; None if it fits.

    Args:
        head: the class.
        name: name of the attribute.
        loss: as ``head.<name>``.
        kind: what arrives there.
    """
    of = family(loss)
    if of is None or of in kind.fits:
        return None
    what, where = type(loss).__name__, f"{head.__name__}.{name}"
    start = f"{where} is a {'softmax ' if of == SOFTMAX else ''}{what}"
    gives = f"{head.__name__} gives {kind.gives}"
    inner = f"loss=dict(type='polyfocal.{what}'"
    if "RoILoss" in kind.fits and of == SIGMOID:
        return (
            f"{where} is a sigmoid {what}, but a BBoxHead takes the softmax of C + 1 outputs at"
            f" test time: write dict(type='polyfocal.RoILoss', {inner}, use_sigmoid=True, ...)), or"
            " use_sigmoid=False"
        )
    if of == OWN_SOFTMAX:
        take = "it is for BBoxHeads, inside RoILoss"
        if ROI_SOFTMAX in kind.fits:
            take = f"write dict(type='polyfocal.RoILoss', {inner}, ...))"
        if SOFTMAX in kind.fits and isinstance(loss, losses.LDAMLoss):
            take += ", or write scale=1"
        return (
            f"{start}, whose scores are a softmax of its own, which {head.__name__} does not take"
            f" at test time: {take}"
        )
    if "MaskLoss" in kind.fits:
        return (
            f"{start}: a mask head passes labels where other heads pass weights; write"
            f" dict(type='polyfocal.MaskLoss', {inner}, use_sigmoid=True, ...))"
        )
    if "MinusOneBackground" in kind.fits:
        return (
            f"{start}, whose background is the label C, the number of classes: {head.__name__}"
            f" labels it -1; write dict(type='polyfocal.MinusOneBackground', {inner},"
            " use_sigmoid=True, ...))"
        )
    if of == "MaskLoss":
        return f"{where} is a MaskLoss: expected one in loss_mask of an FCNMaskHead only"
    if what in ADAPTERS:
        return (
            f"{where} is a {what}, which is for other heads: give {head.__name__} the inner loss,"
            f" {type(loss.loss).__name__}, itself, if it is {kind.take}"
        )
    if kind is KINDS["unused"]:
        return (
            f"{start}, but the loss of {head.__name__} is written into it and uses no {name}: use"
            f" {kind.take}"
        )
    if kind is KINDS["name"]:
        return (
            f"{start}: MMDetection3D's {head.__name__} treats anchors by the name of the loss, and"
            f" would sample them; write type='polyfocal.{head.__name__}' for the head, which is the"
            " same for any loss"
        )
    takes = {
        HEATMAP: "takes the probabilities of a heatmap",
        PROBABILITY: "takes probabilities (activated=True)",
        PROBABILITY_QUALITY: "takes probabilities (activated=True)",
        QUALITY: "takes labels and the qualities of boxes",
        SIGMOID: "takes logits and labels, and the sigmoid",
        SOFTMAX: "takes logits and labels, and the softmax",
    }[of]
    return f"{start}, which {takes}: {gives}; write {kind.take}"
