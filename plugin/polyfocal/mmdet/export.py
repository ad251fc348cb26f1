"""A trained detector as an ONNX file: boxes, scores and labels of pictures.

The graph is that of the model's own ``predict``, traced by ``torch.export``. While it is traced, a
few functions of MMDetection and MMCV whose outputs have as many rows as there are detections are
replaced by functions that give the same detections in outputs of a fixed size: suppressed entries
have the score 0 and come last. Heads that decode in another way are refused.
"""

import contextlib
import copy
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mmcv.ops
import numpy as np
import torch
from mmcv.transforms import Resize
from mmdet.models.detectors import DeformableDETR, TwoStageDetector
from mmdet.models.layers import multiclass_nms
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.utils import filter_scores_and_topk
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import TRANSFORMS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from polyfocal.calibration.posthoc import CLIP, SLOPE, Calibrator
from polyfocal.data import unpickling
from polyfocal.errors import PackageError, UserError
from polyfocal.mmengine.checkpoint import (
    check_checkpoint,
    check_weights,
    classes_of,
    only_data,
    written_whole,
)
from polyfocal.mmengine.class_weights import use_class_weights
from polyfocal.mmengine.configs import is_a, walk

if "custom_translation_table" not in inspect.signature(torch.onnx.export).parameters:
    raise PackageError(
        f"an export to ONNX needs torch 2.6 or later, and this is torch {torch.__version__}: export"
        " in an environment with a later torch; it reads the checkpoint."
    )

OUTPUTS = ("boxes", "scores", "labels")
"""Names of the outputs of an exported detector."""

_ALL = 1 << 30  # more than any number of candidates
_NMS_SETTINGS = {"type", "iou_threshold", "class_agnostic", "split_thr"}
_OPSET = 19  # the first with deformable convolutions
_INT64 = 7  # onnx.TensorProto.INT64
_SMALLEST = "smallest"  # carries min_bbox_size into the settings of the suppression


def load_detector(cfg: Config, checkpoint: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The detector of a config with the weights of a checkpoint, and the names of its classes.

    Args:
        cfg: A config; its data are not opened, nor those that only its losses need.
        checkpoint: A file.

    Returns:
        The model, in evaluation mode on the CPU. The names that the training left in the
        checkpoint, or else those in the config, or else none.

    Raises:
        UserError: The checkpoint is of another model, or is none.
    """
    check_checkpoint(checkpoint)
    content = unpickling.read_weights(checkpoint)
    cfg = copy.deepcopy(cfg)
    use_class_weights(cfg, train=False)
    with only_data(), DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmdet")):
        model = MODELS.build(cfg.model)
    model.load_state_dict(check_weights(model, content, checkpoint, strict=True), strict=False)
    classes = classes_of(content)
    for dataset in walk(cfg.get("test_dataloader")):
        classes = classes or tuple((dataset.get("metainfo") or {}).get("classes") or ())
    return model.eval(), classes


def usual_size(cfg: Config) -> tuple[int, int] | None:
    """Height and width to which the test pipeline of a config resizes pictures.

    Where it keeps the ratio of the sides, those of a picture of landscape form.

    Returns:
        None if it resizes them to no fixed size.
    """
    for step in walk(cfg.get("test_dataloader")):
        scale = step.get("scale")
        if is_a(step, TRANSFORMS, cfg.get("default_scope"), Resize) and scale is not None:
            sides = (scale, scale) if isinstance(scale, int) else scale
            width, height = sorted(sides, reverse=True) if step.get("keep_ratio") else sides
            return height, width
    return None


def export_onnx(
    model: nn.Module,
    file: str | Path,
    size: tuple[int, int],
    *,
    classes: Sequence[str] = (),
    batch_size: int = 1,
    nms: bool = True,
    calibrator: Calibrator | None = None,
) -> Any:
    """Write a detector of MMDetection as an ONNX file.

    The input is ``images``, float32 (B, 3, H, W): pixels from 0 to 255, channels in the order in
    which the training read them (OpenCV's BGR, unless the config says otherwise). Normalisation
    and padding to the network's stride are in the graph. The outputs have N rows per picture, N
    being ``max_per_img`` of the model's ``test_cfg``, the best score first:

    - ``boxes``, float32 (B, N, 4): x1, y1, x2, y2 in pixels of the input;
    - ``scores``, float32 (B, N): those of the detector, 0 in rows without a detection;
    - ``labels``, int64 (B, N): classes from 0, and -1 in rows without a detection.

    Masks are not exported.

    Args:
        model: The detector, for instance from :func:`load_detector`. It is not changed.
        file: The file to write or to replace; it is complete or stays as it was.
        size: Height and width of the pictures, in pixels.
        classes: Names of the classes, kept in the file's metadata as JSON, ``"classes"``.
        batch_size: B, the number of pictures, fixed in the file.
        nms: False leaves out the suppression, for a runtime that does its own: the rows then are
            all candidates, sorted by their scores.
        calibrator: A calibrator whose map is applied to the scores, inside of the graph.

    Returns:
        The :class:`torch.onnx.ONNXProgram`.

    Raises:
        PackageError: onnx or onnxscript is missing.
        UserError: The detector, its suppression or the calibrator cannot be exported, or the file
            cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    except ImportError as error:
        raise PackageError(
            f"an export to ONNX needs {error.name}, which is not installed: "
            "pip install 'polyfocal[onnx]'"
        ) from error
    if min(batch_size, *size) < 1:
        raise UserError(
            f"pictures must have sides and a number of at least 1, got {batch_size} of {size}."
        )
    detector = Detector(model, classes, nms=nms, calibrator=calibrator)
    pictures = torch.zeros(batch_size, 3, *size)
    try:
        program = torch.onnx.export(
            detector.traced(pictures),
            input_names=["images"],
            output_names=OUTPUTS,
            opset_version=_OPSET,
            custom_translation_table=_translations(),
            verbose=False,
        )
    except UserError:
        raise
    except Exception as error:  # a model is a program: it can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(model).__name__} cannot be exported to ONNX for pictures of {size[0]} x "
            f"{size[1]}: {type(error).__name__}: {reason}"
        ) from error
    assert program is not None
    # The exporter's notes name every parameter, those of the loss too, and files of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    if classes:
        program.model.metadata_props["classes"] = json.dumps(list(classes))
    with written_whole(Path(file)) as part:
        program.save(part, external_data=False)
    return program


class Detector(nn.Module):
    """A detector from pixels to rows of detections, ready for ``torch.export``.

    Args:
        model, classes, nms, calibrator: See :func:`export_onnx`.

    Raises:
        UserError: The suppression or the calibrator cannot be exported.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str] = (),
        *,
        nms: bool = True,
        calibrator: Calibrator | None = None,
    ) -> None:
        super().__init__()
        if not nms and isinstance(model, TwoStageDetector):
            raise UserError(
                f"--no-nms: a {type(model).__name__} suppresses proposals between its two stages,"
                " which no program can do after it: export it with its suppression."
            )
        self.nms = nms
        self.model: Any = copy.deepcopy(model).eval()
        if getattr(model, "with_mask", False):
            cast(Any, self.model).roi_head.mask_head = None
        self.calibrated = None if calibrator is None else CalibratedScores(calibrator, classes)
        for module in self.model.modules():
            for node in walk(getattr(module, "test_cfg", None)):
                self._prepare(node)

    def _prepare(self, node: ConfigDict) -> None:
        """Settings with which the head makes as many rows as there are candidates."""
        if not self.nms and "max_per_img" in node:
            node.max_per_img = _ALL
        suppression = node.get("nms")
        if suppression is None:
            return
        kind = suppression.get("type", "nms")
        others = sorted(set(suppression) - _NMS_SETTINGS - {_SMALLEST})
        if self.nms and (kind != "nms" or others):
            what = f"type {kind!r}" if kind != "nms" else f"{others[0]}={suppression[others[0]]!r}"
            raise UserError(
                f"test_cfg.nms has {what}, which ONNX has not: give --no-nms to leave the "
                "suppression out, or replace the setting with --cfg-options."
            )
        if node.get("min_bbox_size", -1) >= 0:
            suppression[_SMALLEST], node.min_bbox_size = node.min_bbox_size, -1

    def traced(self, images: Tensor) -> torch.export.ExportedProgram:
        """The graph of torch for pictures of one number and size."""
        # What makes outputs of any size, or is no operation of torch, is replaced meanwhile.
        functions = {
            "filter_scores_and_topk": (filter_scores_and_topk, _top_candidates),
            "batched_nms": (mmcv.ops.batched_nms, _suppressed if self.nms else _sorted),
            "multiclass_nms": (multiclass_nms, _suppressed_classes),
            "deform_conv2d": (mmcv.ops.deform_conv2d, _deformed),
            "modulated_deform_conv2d": (mmcv.ops.modulated_deform_conv2d, _modulated),
        }
        with torch.no_grad(), _replaced_everywhere(functions):
            return torch.export.export(self, (images,), strict=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, N, 4), scores (B, N) and labels (B, N) of pictures (B, 3, H, W)."""
        size = tuple(images.shape[-2:])
        meta = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        samples = [DetDataSample(metainfo=dict(meta)) for _ in images]
        data = self.model.data_preprocessor({"inputs": images, "data_samples": samples})
        found = self.model.predict(data["inputs"], data["data_samples"], rescale=False)
        rows = [sample.pred_instances for sample in found]
        boxes, scores, labels = (
            torch.stack([row[name] for row in rows]) for name in ("bboxes", "scores", "labels")
        )
        is_one = scores > 0
        if self.calibrated is not None:
            scores = torch.where(is_one, self.calibrated(scores, labels), 0.0)
        labels = torch.where(is_one, labels, -1)
        if self.calibrated is not None:  # the map of one class overtakes that of another
            scores, order = scores.topk(scores.shape[1])
            boxes = boxes.gather(1, order[..., None].expand_as(boxes))
            labels = labels.gather(1, order)
        return boxes, scores, labels


class CalibratedScores(nn.Module):
    """The map of a calibrator, in float32.

    Args:
        calibrator: The calibrator.
        classes: Names of the classes, in the order of their labels.

    Raises:
        UserError: The names of the classes are not known.
    """

    x: Tensor
    y: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self, calibrator: Calibrator, classes: Sequence[str]) -> None:
        super().__init__()
        if not classes:
            raise UserError(
                "--calibrator has a map for each class by its name, and neither the checkpoint nor"
                " the config names the classes."
            )
        self.is_isotonic = calibrator.method == "isotonic"
        maps = [calibrator.classes.get(name, calibrator.shared) for name in classes]
        columns: dict[str, Any]
        if self.is_isotonic:
            longest = max(len(one["x"]) for one in maps)
            columns = {
                key: [one[key] + one[key][-1:] * (longest - len(one[key])) for one in maps]
                for key in ("x", "y")
            }
        else:
            columns = {
                "slope": [
                    one["slope"][0] if "slope" in one else 1 / one["temperature"][0] for one in maps
                ],
                "offset": [one.get("offset", [0.0])[0] for one in maps],
            }
        for name, values in columns.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Calibrated scores (B, N) of scores (B, N) in [0, 1] of classes (B, N)."""
        if not self.is_isotonic:
            kept = scores.clamp(CLIP, 1 - CLIP)
            logits = kept.log() - (-kept).log1p()
            return torch.sigmoid(self.slope[labels] * logits + self.offset[labels])
        x, y = self.x[labels], self.y[labels]  # (B, N, P)
        last = x.shape[-1] - 1
        if last == 0:
            mapped = y[..., 0]
        else:
            left = ((x <= scores[..., None]).sum(-1, keepdim=True) - 1).clamp(0, last - 1)
            (x0, x1), (y0, y1) = (
                (one.gather(-1, left)[..., 0], one.gather(-1, left + 1)[..., 0]) for one in (x, y)
            )
            width = x1 - x0
            share = (scores - x0) / torch.where(width > 0, width, 1.0)
            mapped = y0 + share.clamp(0, 1) * (y1 - y0)
        return (1 - SLOPE) * mapped + SLOPE * scores


@contextlib.contextmanager
def _replaced_everywhere(functions: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
    """Replace functions in every module that has imported them, and some methods."""
    methods = (
        (mmcv.ops.RoIAlign, "forward", _align),
        (SingleRoIExtractor, "forward", _extract),
        (DeformableDETR, "pre_transformer", _with_sizes(DeformableDETR.pre_transformer)),
        (torch, "_shape_as_tensor", lambda tensor: torch.tensor(tensor.shape)),
    )
    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            for name, (old, new) in functions.items():
                if vars(module).get(name) is old:
                    stack.enter_context(unpickling.replaced(module, name, new))
        for owner, name, method in methods:
            stack.enter_context(unpickling.replaced(owner, name, method))
        yield


class _Sizes(list[tuple[int, int]]):
    """Heights and widths of feature maps, where MMDetection has a tensor (L, 2) and reads it."""

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, tuple):
            return super().__getitem__(place)
        rows, column = place
        values = [size[column] for size in self]
        return torch.tensor(values) if rows is Ellipsis else np.array(values)


def _with_sizes(pre_transformer: Callable[..., Any]) -> Callable[..., Any]:
    """``DeformableDETR.pre_transformer`` that hands on sizes as numbers."""

    def changed(model: nn.Module, mlvl_feats: Sequence[Tensor], *samples: Any) -> Any:
        inputs = pre_transformer(model, mlvl_feats, *samples)
        for one in inputs:
            one["spatial_shapes"] = _Sizes((int(f.shape[-2]), int(f.shape[-1])) for f in mlvl_feats)
        return inputs

    return changed


def _top_candidates(scores: Tensor, score_thr: float, topk: int, results: Any = None) -> Any:
    """``filter_scores_and_topk`` with a fixed size: what is at most ``score_thr`` has score 0."""
    num_classes = scores.shape[1]
    flat = torch.where(scores > score_thr, scores, 0.0).flatten()
    best, places = flat.topk(min(topk, len(flat)) if topk > 0 else len(flat))
    rows, labels = places // num_classes, places % num_classes
    if isinstance(results, dict):
        results = {name: value[rows] for name, value in results.items()}
    elif isinstance(results, list):
        results = [value[rows] for value in results]
    elif results is not None:
        results = results[rows]
    return best, labels, rows, results


def _sorted(
    boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: Any, class_agnostic: bool = False
) -> tuple[Tensor, Tensor]:
    """``batched_nms`` that suppresses nothing."""
    scores, order = _without_small(boxes, scores, nms_cfg).sort(descending=True)
    return torch.cat([boxes[order], scores[:, None]], -1), order


def _suppressed(
    boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: Any, class_agnostic: bool = False
) -> tuple[Tensor, Tensor]:
    """``batched_nms`` with a fixed size.

    Suppressed boxes come last, with the score 0, each as a copy of the best box. So, as proposals
    of a second stage, they find again what the best one finds, and are suppressed there.
    """
    if nms_cfg is None:
        return _sorted(boxes, scores, idxs, nms_cfg)
    scores = _without_small(boxes, scores, nms_cfg)
    apart = boxes
    if not nms_cfg.get("class_agnostic", class_agnostic):
        # As in MMCV: boxes of different classes are moved away from each other.
        limit = torch.where((scores > 0)[:, None], boxes, 0.0).max() + 1
        apart = boxes + (idxs.to(boxes) * limit)[:, None]
    kept = torch.ops.polyfocal.kept(apart[None], scores[None], float(nms_cfg["iou_threshold"]))
    return _best(boxes, scores * kept[0])


def _best(boxes: Tensor, scores: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The boxes (N, 5) of the highest scores, and their rows; those of score 0 copy the first."""
    scores, order = scores.topk(min(count or len(scores), len(scores)))
    order = torch.where(scores > 0, order, order[0])
    return torch.cat([boxes[order], scores[:, None]], -1), order


def _without_small(boxes: Tensor, scores: Tensor, nms_cfg: Any) -> Tensor:
    """Scores with 0 for the boxes that ``min_bbox_size`` excludes."""
    if nms_cfg is None or _SMALLEST not in nms_cfg:
        return scores
    sides = boxes[:, 2:] - boxes[:, :2]
    return torch.where((sides > nms_cfg[_SMALLEST]).all(-1), scores, 0.0)


def _suppressed_classes(
    multi_bboxes: Tensor,
    multi_scores: Tensor,
    score_thr: float,
    nms_cfg: Any,
    max_num: int = -1,
    score_factors: Tensor | None = None,
    return_inds: bool = False,
    box_dim: int = 4,
) -> tuple[Tensor, Tensor]:
    """``multiclass_nms`` with a fixed size."""
    if return_inds:
        raise NotImplementedError("multiclass_nms with return_inds")
    scores = multi_scores[:, :-1]
    count, num_classes = scores.shape
    boxes = multi_bboxes.reshape(count, -1, box_dim).expand(-1, num_classes, -1)
    scores = torch.where(scores > score_thr, scores, 0.0)
    if score_factors is not None:
        scores = scores * score_factors[:, None]
    if nms_cfg is not None and not nms_cfg.get("class_agnostic", False):
        # Each class by itself, (C, N, 4): the suppression then compares fewer boxes.
        apart = (boxes.transpose(0, 1), scores.T)
        scores = scores * torch.ops.polyfocal.kept(*apart, float(nms_cfg["iou_threshold"])).T
        nms_cfg = None
    labels = torch.arange(num_classes).expand_as(scores).flatten()
    boxes, scores = boxes.reshape(-1, box_dim), scores.flatten()
    wanted = max_num if max_num > 0 else len(scores)
    if nms_cfg is None:
        found, rows = _best(boxes, scores, wanted)
    else:
        found, rows = _suppressed(boxes, scores, labels, nms_cfg)
    return found[:wanted], labels[rows[:wanted]]


def _extract(
    extractor: SingleRoIExtractor,
    feats: Sequence[Tensor],
    rois: Tensor,
    roi_scale_factor: float | None = None,
) -> Tensor:
    """``SingleRoIExtractor.forward`` with a fixed size."""
    rois = rois.type_as(feats[0])
    levels = extractor.map_roi_levels(rois, len(feats))
    if roi_scale_factor is not None:
        rois = extractor.roi_rescale(rois, roi_scale_factor)
    pooled = [
        _align(layer, feat, rois, levels == level)
        for level, (layer, feat) in enumerate(zip(extractor.roi_layers, feats, strict=False))
    ]
    return torch.stack(pooled).sum(0)


def _align(
    layer: mmcv.ops.RoIAlign, feat: Tensor, rois: Tensor, chosen: Tensor | None = None
) -> Tensor:
    """``RoIAlign.forward``, for the chosen regions; 0 for the others."""
    if not isinstance(layer, mmcv.ops.RoIAlign) or layer.pool_mode != "avg":
        raise NotImplementedError(f"pooling by {layer}")
    if chosen is None:
        chosen = torch.ones_like(rois[:, 0], dtype=torch.bool)
    height, width = layer.output_size
    return torch.ops.polyfocal.aligned(
        feat,
        rois,
        chosen,
        height,
        width,
        float(layer.spatial_scale),
        int(layer.sampling_ratio),
        bool(layer.aligned),
    )


def _deformed(input: Tensor, offset: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    """``deform_conv2d`` as an operation of torch."""
    return _modulated(input, offset, None, weight, None, *settings[:5])  # no bias, no im2col_step


def _modulated(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """``modulated_deform_conv2d`` as an operation of torch."""
    steps = [list(_pair(value)) for value in (stride, padding, dilation)]
    return torch.ops.polyfocal.deformed(
        input, offset, mask, weight, bias, *steps, groups, deform_groups
    )


@torch.library.custom_op("polyfocal::kept", mutates_args=())
def _kept(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """1 for boxes (G, N, 4) of scores (G, N) above 0 that survive in their group, else 0."""
    kept = torch.zeros_like(scores)
    for group in range(len(scores)):
        rows = scores[group].nonzero()[:, 0]
        if len(rows):
            chosen = boxes[group, rows].contiguous(), scores[group, rows].contiguous()
            kept[group, rows[mmcv.ops.nms(*chosen, iou_threshold)[1]]] = 1
    return kept


@_kept.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.custom_op("polyfocal::aligned", mutates_args=())
def _aligned(
    feat: Tensor,
    rois: Tensor,
    chosen: Tensor,
    height: int,
    width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pooled features (N, C, height, width) of regions (N, 5); 0 where ``chosen`` is False."""
    pooled = feat.new_zeros(len(rois), feat.shape[1], height, width)
    if chosen.any():
        size = (height, width)
        pooled[chosen] = mmcv.ops.roi_align(
            feat, rois[chosen], size, spatial_scale, sampling_ratio, "avg", aligned
        )
    return pooled


@_aligned.register_fake
def _(feat: Tensor, rois: Tensor, chosen: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return feat.new_empty(rois.shape[0], feat.shape[1], height, width)


@torch.library.custom_op("polyfocal::deformed", mutates_args=())
def _deformable(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    """A deformable convolution, (B, O, H, W)."""
    steps = (stride, padding, dilation, groups, deform_groups)
    if mask is None:
        return mmcv.ops.deform_conv2d(input, offset, weight, *steps)
    return mmcv.ops.modulated_deform_conv2d(input, offset, mask, weight, bias, *steps)


@_deformable.register_fake
def _(input: Tensor, offset: Tensor, mask: Any, weight: Tensor, *settings: Any) -> Tensor:
    stride, padding, dilation, groups = settings[1:5]  # after the bias
    return nn.functional.conv2d(input, weight, None, stride, padding, dilation, groups)


def _translations() -> dict[Any, Callable[..., Any]]:
    """What the operations above are in ONNX."""
    from onnxscript import opset19 as op

    def kept(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[_ALL]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[0.0]),
        )  # (M, 3): group, class, box
        places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        one = op.Expand(op.Constant(value_float=1.0), op.Shape(places, start=0, end=1))
        zeros = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
        return op.ScatterND(zeros, places, one)

    def deformed(
        input: Any,
        offset: Any,
        mask: Any,
        weight: Any,
        bias: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        deform_groups: int,
    ) -> Any:
        return op.DeformConv(
            input,
            weight,
            offset,
            bias,
            mask,
            strides=list(stride),
            pads=[*padding, *padding],
            dilations=list(dilation),
            group=groups,
            offset_group=deform_groups,
        )

    def aligned(
        feat: Any,
        rois: Any,
        chosen: Any,
        height: int,
        width: int,
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> Any:
        places = op.Transpose(op.NonZero(chosen), perm=[1, 0])  # (M, 1)
        own = op.GatherND(rois, places)
        picture = op.Gather(own, op.Constant(value_int=0), axis=1)
        corners = op.Gather(own, op.Constant(value_ints=[1, 2, 3, 4]), axis=1)
        pooled = op.RoiAlign(
            feat,
            corners,
            op.Cast(picture, to=_INT64),
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            mode="avg",
            output_height=height,
            output_width=width,
            sampling_ratio=sampling_ratio,
            spatial_scale=spatial_scale,
        )
        shape = op.Concat(
            op.Shape(rois, start=0, end=1),
            op.Shape(feat, start=1, end=2),
            op.Constant(value_ints=[height, width]),
            axis=0,
        )
        zeros = op.Expand(op.Constant(value_float=0.0), shape)
        return op.ScatterND(zeros, places, pooled)

    operations = torch.ops.polyfocal
    return {
        operations.kept.default: kept,
        operations.aligned.default: aligned,
        operations.deformed.default: deformed,
    }
