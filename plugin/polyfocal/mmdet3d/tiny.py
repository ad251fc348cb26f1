"""The tiny profile for LiDAR: the architecture of a config, small enough for a CPU.

The scans end where the boxes become few. Every width becomes a quarter, and every stack of layers
at most two deep. Voxels, anchors and losses stay those of the config, so that the problem stays the
same.
"""

from mmdet3d.models.middle_encoders import PointPillarsScatter
from mmengine.config import Config, ConfigDict
from mmengine.dataset import RepeatDataset
from mmengine.registry import DATASETS, MODELS

from polyfocal.errors import UserError
from polyfocal.mmdet.tiny import use_tiny_recipe
from polyfocal.mmengine.configs import is_a, leaf_datasets, type_name, walk

RANGE = (51.2, 20.48)
"""How far the scans reach, in metres: ahead (and behind, if a config looks there) and aside."""

_BATCH = 2
_SHRINK = 4  # of widths
_WIDTHS = frozenset(
    {"feat_channels", "in_channels", "out_channels", "share_conv_channel", "shared_conv_channels"}
)
_MAX_DEPTH = 2
_MAX_POINTS = 16  # in a pillar


def use_tiny_profile(cfg: Config) -> None:
    """Change a LiDAR detector's config, in place, to its CPU-sized version.

    Args:
        cfg: An MMDetection3D 1.x config of a detector on pillars.

    Raises:
        UserError: The model has no pillars.
    """
    scope = cfg.get("default_scope")
    limits = _shrink_model(cfg.model, scope)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        train = loader.startswith("train")
        cfg[loader].update(batch_size=_BATCH if train else 1, num_workers=1)
        for dataset in leaf_datasets(cfg[loader].dataset):
            dataset.pipeline = _pipeline(dataset.pipeline, limits, train=train)
    if is_a(cfg.train_dataloader.dataset, DATASETS, scope, RepeatDataset):
        cfg.train_dataloader.dataset = cfg.train_dataloader.dataset.dataset
    use_tiny_recipe(cfg, batch=_BATCH, max_epochs=12, lr=4e-3)


def _shrink_model(model: ConfigDict, scope: str | None) -> list[float]:
    """Shrinks the model; returns the range of its points, (x, y, z low, x, y, z high) in metres."""
    voxels = model.get("data_preprocessor", {}).get("voxel_layer")
    scatter = (is_a(node, MODELS, scope, PointPillarsScatter) for node in walk(model))
    if voxels is None or not any(scatter):
        raise UserError(
            f"the tiny profile is for detectors on pillars (PointPillars, CenterPoint); the model "
            f"{type_name(model)!r} has no PointPillarsScatter."
        )
    # The input of this layer are the points themselves.
    encoder = model.get("voxel_encoder") or model.get("pts_voxel_encoder")
    x, y = RANGE
    old = list(voxels.point_cloud_range)
    low = [max(old[0], -x if old[0] < 0 else 0.0), max(old[1], -y)]
    limits = [*low, old[2], min(old[3], x), min(old[4], y), old[5]]
    width, height = (
        8
        * min(
            round((limits[axis + 3] - limits[axis]) / voxels.voxel_size[axis] / 8),
            int((old[axis + 3] - limits[axis]) / voxels.voxel_size[axis] / 8 + 1e-6),
        )
        for axis in (0, 1)
    )
    # Whole cells at every stride, within the old range.
    limits[3] = limits[0] + width * voxels.voxel_size[0]
    limits[4] = limits[1] + height * voxels.voxel_size[1]
    for node in walk(model):
        for key, value in node.items():
            if (key in _WIDTHS and node is not encoder) or key == "feat_channels":
                node[key] = _half(value)
            elif key == "layer_nums":
                node[key] = [min(depth, _MAX_DEPTH) for depth in value]
            elif key == "point_cloud_range":
                node[key] = limits
            elif key == "pc_range":
                node[key] = limits[:2]
            elif key == "ranges":
                node[key] = [[*limits[:2], low[2], *limits[3:5], low[5]] for low in value]
            elif key == "output_shape":
                node[key] = [height, width]
            elif key == "grid_size":
                node[key] = [width, height, 1]
            elif key == "norm_cfg" and "aiveSync" in type_name(value):
                # Statistics over several devices; on one device it is the usual norm.
                value.type = "BN1d" if "1d" in type_name(value) else "BN2d"
    voxels.max_num_points = min(voxels.max_num_points, _MAX_POINTS)
    return limits


def _half(width: int | list[int]) -> int | list[int]:
    if isinstance(width, int):
        return width // _SHRINK
    return [value // _SHRINK for value in width]


def _pipeline(pipeline: list[ConfigDict], limits: list[float], *, train: bool) -> list[ConfigDict]:
    """Load, flip (train only), cut to the range, pack.

    Turning, scaling and pasting in other scans' objects, which the full recipes do, pay off after
    more epochs than this profile has.
    """
    kept = {"PointsRangeFilter"}
    if train:
        kept |= {"RandomFlip3D", "ObjectRangeFilter", "ObjectNameFilter", "PointShuffle"}
    flat = [inner for step in pipeline for inner in step.get("transforms", [step])]
    steps = [step for step in flat[:-1] if _is_kept(type_name(step), kept)]
    if "PointsRangeFilter" not in map(type_name, steps):
        steps.append(ConfigDict(type="mmdet3d.PointsRangeFilter"))
    for step in steps:
        if type_name(step) in ("PointsRangeFilter", "ObjectRangeFilter"):
            step.point_cloud_range = limits
    return [*steps, pipeline[-1]]


def _is_kept(name: str, kept: set[str]) -> bool:
    return name in kept or name.startswith("Load")
