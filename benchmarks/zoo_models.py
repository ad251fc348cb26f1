"""Models of the zoos made small, one training step of them, and the comparison of two steps.

What feeds a loss is made small: a backbone is replaced by one convolution for each of its feature
maps, with the strides that it has; what is wide gets a quarter of its channels; transformers get
two layers; there are fewer queries and proposals, and few boxes are decoded. Heads, losses,
assigners and samplers are those of the config, with its classes, anchors, weights and thresholds.
"""

import contextlib
import copy
import functools
import importlib
import json
import math
import random
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmdet
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs, demo_mm_proposals, demo_track_inputs
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyfocal import swapping
from polyfocal.mmengine.configs import walk

SIDE, LARGE = 128, 384  # deformable convolutions want three cells of the coarsest map
NOT_DECODED = "boxes not decoded: "
TEXT = ("cat", "dog", "small bird", "fish", "horse")
MONO = ("FCOSMono3D", "SMOKEMono3D")
LIDAR = ("CenterPoint", "MVXFasterRCNN", "VoxelNet")
POINTS = 2000
VIDEO = ("QDTrack", "MaskTrackRCNN", "Mask2FormerVideo")
SIZES = ("narrow", "large", "thin", "whole")
_FEWER = {
    "max_per_img": 20, "nms_post": 100, "nms_pre": 100, "num_proposals": 20, "num_queries": 100,
}  # fmt: skip
_WIDTHS = re.compile(r"channels|dims|num_feats")
_WIDE = 128
_MOST_WORDS = 997
_PREPROCESSOR = dict(
    type="DetDataPreprocessor", mean=[128.0] * 3, std=[64.0] * 3, pad_mask=True,
    pad_size_divisor=32,
)  # fmt: skip
_measured: dict[str, list[tuple[int, int]] | None] = {}

Step = dict[str, Tensor]


@ROOT.register_module()
class FeatureMaps(BaseModule):
    """In the place of a backbone: its feature maps of a picture, by one convolution each.

    Args:
        maps: channels and stride of each.
    """

    def __init__(self, maps: list[tuple[int, int]], init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.strides = [stride for _, stride in maps]
        self.convolutions = nn.ModuleList(nn.Conv2d(3, channels, 1) for channels, _ in maps)

    def forward(self, pictures: Tensor, *_: Any) -> tuple[Tensor, ...]:
        """Feature maps ``(B, channels, H / stride, W / stride)``."""
        height, width = pictures.shape[-2:]
        sides = [(-(-height // s), -(-width // s)) for s in self.strides]
        return tuple(
            convolution(nn.functional.adaptive_avg_pool2d(pictures, side))
            for convolution, side in zip(self.convolutions, sides, strict=True)
        )


@ROOT.register_module()
class Grid(BaseModule):
    """In the place of sparse convolutions: a linear map of each voxel, put where it lies.

    Args:
        in_channels, out_channels: of a voxel's features and of the map.
        shape: height and width of the map.
        stride: of its cells, in voxels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, shape: tuple[int, int], stride: int
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.shape, self.stride = tuple(shape), stride

    def forward(self, features: Tensor, places: Tensor, batch_size: int) -> Tensor:
        """Map ``(B, out_channels, H, W)`` of voxels at (picture, z, y, x), ``(N, 4)``."""
        height, width = self.shape
        batch, _, y, x = places.long().T
        row, column = (y // self.stride).clamp(max=height - 1), x // self.stride
        cells = (batch * height + row) * width + column.clamp(max=width - 1)
        values = self.linear(features)
        empty = values.new_zeros(batch_size * height * width, values.shape[1])
        filled = empty.index_add(0, cells, values)
        return filled.view(batch_size, height, width, -1).permute(0, 3, 1, 2)


class _Embedding(nn.Embedding):
    @property
    def language_dim(self) -> int:
        return self.embedding_dim


@ROOT.register_module()
class Words(BaseModule):
    """In the place of BERT: an embedding of each word."""

    def __init__(self, max_tokens: int = 256, **_: Any) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.pad_to_max = False
        self.language_backbone = nn.Sequential(OrderedDict(body=_Embedding(_MOST_WORDS, 32)))

    def tokenizer(self, captions: list[str], **_: Any) -> Any:
        """The words of the first caption, and which word a character is of."""
        found = list(re.finditer(r"\w+|[^\w\s]", captions[0]))
        ids = torch.tensor([[1 + sum(map(ord, m[0])) % (_MOST_WORDS - 1) for m in found]])

        def char_to_token(place: int) -> int | None:
            return next((i for i, m in enumerate(found) if m.start() <= place < m.end()), None)

        return SimpleNamespace(input_ids=ids, char_to_token=char_to_token)

    def forward(self, captions: list[str]) -> dict[str, Tensor]:
        """What MMDetection's BertModel gives, of captions that are all the same."""
        ids = self.tokenizer(captions).input_ids.expand(len(captions), -1)
        embedded = self.language_backbone(ids)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return dict(
            embedded=embedded, hidden=embedded, text_token_mask=mask,
            masks=mask[:, :, None] & mask[:, None], position_ids=torch.zeros_like(ids),
        )  # fmt: skip


def parts(model: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """What of a model trains as one, each with the path to it: trackers train apart."""
    if "detector" not in model or swapping.name_of(model.type) in VIDEO:
        return [("", model)]
    return [(f"{key}.", model[key]) for key in ("detector", "reid") if key in model]


def small(model: ConfigDict, size: str = "narrow") -> ConfigDict:
    """A model's config without pretrained weights, with small parts before the losses.

    Args:
        model: stays as it is.
        size: of :data:`SIZES`. "whole" keeps the backbone, "thin" replaces it, "narrow" takes
            fewer channels too, "large" then larger pictures.
    """
    model = copy.deepcopy(model)
    kind = swapping.name_of(model.type)
    for node in walk(model):
        for key, value in list(node.items()):
            pretrained = key == "init_cfg" and "Pretrained" in str(value)
            if key == "pretrained":  # which some models of today do not take
                del node[key]
            elif pretrained or key == "teacher_ckpt":
                node[key] = None
            elif key == "type" and value in ("SyncBN", "MMSyncBN", "NaiveSyncBN"):
                node[key] = "BN"
            elif key == "score_thr":
                node[key] = 0.0
            elif key in _FEWER and isinstance(value, int):
                node[key] = min(value, _FEWER[key])
            elif key in ("encoder", "decoder") and isinstance(value, dict):
                if isinstance(value.get("num_layers"), int):
                    value["num_layers"] = min(value["num_layers"], 2)
                value.pop("num_cp", None)
            elif key == "with_cp":
                node[key] = False
            elif value == "BertModel":
                node[key] = "Words"
    if kind not in VIDEO and kind != "BaseReID":
        preprocessor = model.get("data_preprocessor") or {}
        if "MultiBranch" in str(preprocessor.get("type")):
            preprocessor = preprocessor["data_preprocessor"]
        if "mean" not in preprocessor:
            # YOLOX and others take pictures as they are.
            kept = {k: v for k, v in preprocessor.items() if k != "batch_augments"}
            preprocessor = kept if kept.get("type") else dict(_PREPROCESSOR)
        preprocessor.pop("batch_augments", None)
        model["data_preprocessor"] = preprocessor
    if isinstance(model.get("teacher_config"), str):
        zoo = Path(mmdet.__file__).parent / ".mim"
        teacher = small(Config.fromfile(zoo / model.teacher_config).model, size)
        teacher.pop("side")
        model.update(teacher_config=ConfigDict(model=teacher))
    if kind in LIDAR:
        _coarsen(model)
    if size != "whole":
        _replace_backbones(model)
    if size in ("narrow", "large"):
        _narrow(model)
    model["side"] = LARGE if size == "large" else SIDE
    return model


def _narrow(model: ConfigDict) -> None:
    def quarter(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(quarter, value))
        return value // 4 if type(value) is int and value >= _WIDE else value

    for node in walk(model):
        for key, value in list(node.items()):
            if key == "maps":
                node[key] = [(quarter(channels), stride) for channels, stride in value]
            elif _WIDTHS.search(key):
                node[key] = quarter(value)


def _coarsen(model: ConfigDict) -> None:
    """Larger voxels, so that a scan has fewer cells; and a grid for sparse convolutions."""
    prefix = "pts_" if "pts_backbone" in model else ""
    middle, backbone = model[f"{prefix}middle_encoder"], model[f"{prefix}backbone"]
    sparse = "sparse_shape" in middle
    cells = list(middle.sparse_shape[1:] if sparse else middle.output_shape)
    least = math.prod(backbone.get("layer_strides", (2, 2, 2, 2))) * (8 if sparse else 1)
    if (model.get(f"{prefix}neck") or {}).get("type") in ("FPN", "mmdet.FPN"):  # takes any size
        least = 1
    factor = max(k for k in (1, 2, 4) if all(one % (k * least) == 0 for one in cells) or k == 1)
    for node in walk(model):
        for key, value in list(node.items()):
            if key == "voxel_size":
                node[key] = [value[0] * factor, value[1] * factor, *value[2:]]
            elif key == "output_shape":
                node[key] = [one // factor for one in value]
            elif key == "grid_size":
                node[key] = [value[0] // factor, value[1] // factor, *value[2:]]
    if sparse:
        model[f"{prefix}middle_encoder"] = ConfigDict(
            type="Grid", in_channels=middle.in_channels, out_channels=backbone.in_channels,
            shape=[one // (8 * factor) for one in cells], stride=8,
        )  # fmt: skip


def _replace_backbones(model: ConfigDict) -> None:
    for node in walk(model):
        for key in ("backbone", "teacher_backbone"):
            backbone = node.get(key)
            if not isinstance(backbone, dict) or "type" not in backbone:
                continue
            maps = _maps(backbone)
            if maps is not None:
                node[key] = ConfigDict(type="FeatureMaps", maps=maps)


def _maps(backbone: ConfigDict) -> list[tuple[int, int]] | None:
    """Channels and strides of a backbone's feature maps; None where a picture gives none."""
    bare = copy.deepcopy(backbone)
    for key in ("init_cfg", "frozen_stages", "pretrained", "with_cp", "norm_eval", "dcn"):
        bare.pop(key, None)
    bare.pop("stage_with_dcn", None)
    key = json.dumps(bare, sort_keys=True, default=str)
    if key not in _measured:
        _measured[key] = None
        # Without memory, where it can be built so.
        for device in ("meta", "cpu"):
            with contextlib.suppress(Exception), torch.no_grad(), torch.device(device):
                built = MODELS.build(copy.deepcopy(bare))
                built.eval()
                found = built(torch.zeros(2, 3, SIDE, SIDE))
                found = [found] if isinstance(found, Tensor) else found
                if all(len(m) == 2 and m.shape[2] == m.shape[3] for m in found):
                    _measured[key] = [(m.shape[1], round(SIDE / m.shape[2])) for m in found]
                break
    return _measured[key]


def _classes(model: ConfigDict) -> tuple[int, int]:
    """Classes of objects and of the rest of a picture."""
    for node in walk(model):
        if "num_things_classes" in node:
            return max(node["num_things_classes"], 1), node.get("num_stuff_classes", 0)
    counts = [
        node["num_classes"] for node in walk(model) if isinstance(node.get("num_classes"), int)
    ]
    return min([count for count in counts if count > 1] or [1]), 0


def seed(number: int) -> None:
    """Seeds all that draws numbers."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class _Doubles(TorchFunctionMode):
    """Where float32 is asked for, float64 is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def double(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        args = tuple(map(double, args))
        return func(*args, **{key: double(value) for key, value in (kwargs or {}).items()})


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Models are built and computed in float64; only suppression has no code for it."""
    compiled = importlib.import_module("mmcv.ops.nms").ext_module
    kept: dict[str, Any] = {}
    for name in ("nms", "softnms"):
        kept[name] = getattr(compiled, name)
        setattr(compiled, name, functools.partial(_in_float32, kept[name]))
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        for name, function in kept.items():
            setattr(compiled, name, function)


def _in_float32(function: Any, boxes: Tensor, scores: Tensor, *args: Any, **settings: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return function(boxes.to(torch.float32), scores.to(torch.float32), *args, **settings)


def build(model: ConfigDict, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The model, with random weights or those of another, of the default dtype."""
    seed(0)
    model = copy.deepcopy(model)
    model.pop("side")
    built = MODELS.build(model)
    for network in (built, getattr(built, "teacher_model", nn.Module())):  # which is no part of it
        nn.Module.to(network, torch.get_default_dtype())
    if state is None:
        built.init_weights()
    else:
        built.load_state_dict(state)
    return built


def step(built: Any, model: ConfigDict) -> Step:
    """Every loss, every gradient and the decoded boxes of two generated pictures."""
    found = _step(built, model, 0)
    # TOOD has one loss for the first epochs and one for the rest.
    if hasattr(getattr(built, "bbox_head", None), "initial_epoch"):
        built.zero_grad()
        later = _step(built, model, built.bbox_head.initial_epoch)
        found |= {f"{name}, later": value for name, value in later.items()}
    return found


def _step(built: Any, model: ConfigDict, epoch: int) -> Step:
    MessageHub.get_current_instance().update_info_dict(dict(epoch=epoch, iter=10000))
    seed(1)
    data = _data(built, model)
    built.train()
    with torch.no_grad():
        train = built.data_preprocessor(copy.deepcopy(data), training=True)
    seed(2)
    losses = built.loss(_floating(train["inputs"]), train["data_samples"])
    found = {}
    total: Any = 0.0
    for name, value in losses.items():
        value = sum(v.sum() for v in value) if isinstance(value, list | tuple) else value.sum()
        found[f"loss {name}"] = value.detach()
        if "loss" in name and value.requires_grad:
            total = total + value
    total.backward()
    for name, weight in built.named_parameters():
        if weight.grad is not None:
            found[f"gradient {name}"] = weight.grad.clone()
    if swapping.name_of(model.type) in (*VIDEO, "BaseReID"):
        return found
    built.eval()
    with torch.no_grad():
        test = built.data_preprocessor(copy.deepcopy(data), training=False)
        seed(3)
        try:
            predicted = built.predict(_floating(test["inputs"]), test["data_samples"])
        except Exception as error:  # of operations without code for a CPU
            return found | {f"{NOT_DECODED}{type(error).__name__}": torch.zeros(())}
        for index, sample in enumerate(predicted):
            for name in ("pred_instances", "pred_instances_3d"):
                for key, value in (sample.get(name) or InstanceData()).items():
                    value = getattr(value, "tensor", value)  # of boxes
                    if isinstance(value, Tensor):
                        found[f"predicted {key} {index}"] = value
    return found


def _floating(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floating(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_floating(one) for one in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.get_default_dtype())
    return value


def _data(built: nn.Module, model: ConfigDict) -> Any:
    """Two pictures with boxes, masks where they are used, and what else the model wants."""
    kind = swapping.name_of(model.type)
    side = model["side"]
    things, stuff = (len(TEXT), 0) if "language_model" in model else _classes(model)
    if kind == "BaseReID":
        return _people(side)
    if kind in MONO:
        return _mono(model, things, side)
    if kind in LIDAR:
        return _scans(model)
    if model.get("data_preprocessor", {}).get("type") == "Det3DDataPreprocessor":
        raise NotImplementedError(f"data for a {kind} is not generated here")
    if kind in VIDEO:
        video = demo_track_inputs(
            1, 2, key_frames_inds=None if kind == "Mask2FormerVideo" else [0],
            image_shapes=[(3, side, side)], num_items=[4], num_classes=things,
            with_mask=kind != "QDTrack",
        )  # fmt: skip
        for sample in video["data_samples"]:
            for frame in sample.video_data_samples:
                instances = frame.gt_instances
                instances.instances_ids = torch.arange(len(instances.labels))
                _settle(instances, things)
        return video
    masks = any("mask" in name for name, _ in built.named_modules())
    data = demo_mm_inputs(
        2, [[3, side, side]] * 2, num_classes=min(max(things, 2), 200), num_items=[4, 2],
        with_mask=masks,
        with_semantic=masks,
    )  # fmt: skip
    proposals = demo_mm_proposals([(3, side, side)] * 2, 40) if kind == "FastRCNN" else None
    for index, sample in enumerate(data["data_samples"]):
        sample.set_metainfo(dict(batch_input_shape=(side, side), pad_shape=(side, side)))
        _settle(sample.gt_instances, things)
        if "language_model" in model:
            sample.set_metainfo(dict(text=TEXT, custom_entities=True))
        if masks and stuff:
            sample.gt_sem_seg.sem_seg = sample.gt_sem_seg.sem_seg % stuff + things
        if proposals is not None:
            sample.proposals = proposals[index]
            sample.proposals.bboxes = _floating(sample.proposals.bboxes)
    return data


def _settle(instances: Any, classes: int) -> None:
    instances.labels = instances.labels % classes
    instances.bboxes = _floating(instances.bboxes)


def _mono(model: ConfigDict, classes: int, side: int) -> Any:
    """Two pictures of boxes in front of a camera."""
    from mmdet3d.structures import CameraInstance3DBoxes, Det3DDataSample

    camera = np.eye(4)
    camera[0, 0] = camera[1, 1] = side
    camera[:2, 2] = side / 2
    motion = 2 if model.bbox_head.get("pred_velo") else 0
    samples = []
    for count in (4, 2):
        depths = torch.rand(count) * 10 + 8
        centers = (torch.rand(count, 2) / 2 + 0.25) * side
        place = (centers - side / 2) / side * depths[:, None]
        sides, turns = torch.rand(count, 3) * 2 + 1, torch.rand(count, 1 + motion)
        boxes = torch.cat([place, depths[:, None], sides, turns], dim=1)
        half = (1.5 * side / depths)[:, None]
        labels = torch.arange(count) % classes
        sample = Det3DDataSample()
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([centers - half, centers + half], dim=1), labels=labels
        )
        sample.gt_instances_3d = InstanceData(
            bboxes_3d=CameraInstance3DBoxes(boxes, boxes.shape[1], origin=(0.5, 0.5, 0.5)),
            labels_3d=labels, centers_2d=centers, depths=depths,
            attr_labels=torch.zeros_like(labels),
        )  # fmt: skip
        sample.set_metainfo(
            dict(
                cam2img=camera.tolist(), trans_mat=np.diag([0.25, 0.25, 1.0]), affine_aug=False,
                scale_factor=1.0, img_shape=(side, side), ori_shape=(side, side),
                pad_shape=(side, side), box_type_3d=CameraInstance3DBoxes,
            )
        )  # fmt: skip
        samples.append(sample)
    pictures = [torch.rand(3, side, side) * 255 for _ in samples]
    return dict(inputs=dict(img=pictures), data_samples=samples)


def _scans(model: ConfigDict) -> Any:
    """Two LiDAR scans: boxes of the anchors' sizes and heights, and points over the whole range."""
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes

    nodes = list(walk(model))
    low, high = torch.tensor(
        next(node["point_cloud_range"] for node in nodes if node.get("point_cloud_range"))
    ).view(2, 3)
    anchors: Any = next((n["anchor_generator"] for n in nodes if "anchor_generator" in n), {})
    sizes = torch.tensor(anchors.get("sizes") or [[3.9, 1.6, 1.56]])
    heights = torch.tensor([r[2] for r in anchors.get("ranges") or [[*low.tolist()]]])
    tasks = next((node["tasks"] for node in nodes if "tasks" in node), None)
    classes = sum(task["num_class"] for task in tasks) if tasks else _classes(model)[0]
    encoder = model.get("voxel_encoder") or model.pts_voxel_encoder
    moves = tasks is not None or any(node.get("code_size") in (9, 10) for node in nodes)
    columns = encoder.get("in_channels") or encoder.get("num_features", 4)
    samples, scans = [], []
    for count in (6, 3):
        labels = torch.arange(count) % classes
        place = low[:2] + (high - low)[:2] * (0.1 + 0.8 * torch.rand(count, 2))
        height = heights[labels % len(heights)][:, None]
        turns = torch.zeros(count, 3 if moves else 1)
        boxes = torch.cat([place, height, sizes[labels % len(sizes)], turns], dim=1)
        sample = Det3DDataSample()
        sample.gt_instances_3d = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(boxes, boxes.shape[1]), labels_3d=labels
        )
        sample.set_metainfo(dict(box_type_3d=LiDARInstance3DBoxes))
        samples.append(sample)
        points = torch.rand(POINTS, columns)
        points[:, :3] = low + (high - low) * points[:, :3]
        scans.append(points)
    return dict(inputs=dict(points=scans), data_samples=samples)


def _people(side: int) -> Any:
    """Pictures of two people, two of each."""
    from mmdet.structures import ReIDDataSample

    samples = []
    for person in range(2):
        sample = ReIDDataSample()
        sample.set_gt_label([2 * person, 2 * person + 1])
        samples.append(sample)
    return dict(inputs=[torch.rand(2, 3, side, side) * 255 for _ in samples], data_samples=samples)


def apart(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Greatest difference, and the greatest of the expected values, of those that are finite."""
    if expected.numel() == 0:
        return 0.0, 0.0
    scale = expected.abs().max().item()
    if math.isfinite(scale):
        return (found - expected).abs().max().item(), scale
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return math.inf, scale
    return apart(expected[finite], found[finite])


def difference(stock: Step, ours: Step, losses: float, gradients: float) -> str | None:
    """What differs by more than a share of its greatest value, if anything does."""
    if stock.keys() != ours.keys():
        return f"only in one of them: {', '.join(sorted(stock.keys() ^ ours.keys())[:3])}"
    for name, expected in stock.items():
        found = ours[name]
        if found.shape != expected.shape:
            return f"{name}: shape {tuple(found.shape)} for {tuple(expected.shape)}"
        if not expected.is_floating_point():
            if not torch.equal(found, expected):
                return f"{name} differs"
            continue
        share = gradients if name.startswith("gradient") else losses
        gap, scale = apart(expected, found)
        if not gap <= share * scale + 1e-7:
            return f"{name}: {gap:.2g} apart at {scale:.2g}"
    return None


def farthest(exact: Step, found: Step) -> float:
    """The greatest difference from the exact losses and gradients, as a share of their scale."""
    shares = [0.0]
    for name, expected in exact.items():
        if name.startswith(("loss", "gradient")):
            gap, scale = apart(expected, found[name])
            shares.append(gap / max(scale, 1e-6))
    return max(shares)
