"""From a 3D config file and the tools' options to a config that is ready to run."""

import os
from functools import partial
from pathlib import Path

import torch
from mmdet3d.datasets import KittiDataset as MMDet3DKittiDataset
from mmdet3d.datasets.transforms import ObjectSample
from mmdet3d.evaluation import KittiMetric as MMDet3DKittiMetric
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.runner import Runner

from polyfocal.data import kitti
from polyfocal.data.splits import remark_on_overlap
from polyfocal.demo import lidar_scenes
from polyfocal.errors import UserError
from polyfocal.experiments.request import Request
from polyfocal.mmdet.experiment import one_data_set
from polyfocal.mmdet3d.datasets import KittiDataset
from polyfocal.mmdet3d.metrics import KittiMetric
from polyfocal.mmdet3d.pictures import DrawFromAboveHook, draw_predictions
from polyfocal.mmdet3d.tiny import use_tiny_profile
from polyfocal.mmengine import experiment as mmengine_experiment
from polyfocal.mmengine.class_weights import use_class_weights
from polyfocal.mmengine.configs import (
    SCOPE_KEY,
    annotation_file,
    class_of,
    evaluators,
    is_a,
    leaf_datasets,
    merge_options,
    set_evaluators,
    type_name,
    walk,
    without_weights,
)

DEMO_FOLDER = Path("data/lidar_scenes")
"""Where ``--demo`` keeps the simulated scans, below the current directory."""

# mmcv compiles these for CUDA only.
_CUDA_ONLY = {
    "SparseEncoder": "sparse convolutions",
    "SparseEncoderSASSD": "sparse convolutions",
    "SparseUNet": "sparse convolutions",
    "DynamicVFE": "DynamicScatter",
    "DynamicSimpleVFE": "DynamicScatter",
    "DynamicPillarFeatureNet": "DynamicScatter",
}


class Experiment(mmengine_experiment.Experiment):
    """A 3D config that is ready to run."""

    per_cent = 1.0  # KITTI counts in it

    @property
    def quality(self) -> list[str]:
        return ["Overall_3D_AP40_moderate", "Overall_BEV_AP40_moderate"]

    def hold_out(self, folder: Path) -> None:
        cfg = self.config
        loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
        scope = cfg.get("default_scope")
        trees = [
            [node for node in walk(loader.dataset) if is_a(node, DATASETS, scope, KittiDataset)]
            for loader in loaders
        ]
        if not trees[0]:
            raise UserError(
                f"{cfg.filename} does not train on a tree in KITTI's layout, of which a part can "
                "be held out: give one with --data DIR, or use the simulated scans with --demo."
            )
        root = str(kitti.hold_out(trees[0][0].data_root, folder).resolve())
        for node in (node for tree in trees for node in tree):
            node.data_root = root
        for node in (*evaluators(cfg, "val"), *evaluators(cfg, "test")):
            if is_a(node, METRICS, scope, KittiMetric):
                node.data_root = root

    def draw(self, runner: Runner) -> Path:
        return draw_predictions(runner)

    def keep_detections(self, out: str) -> list[BaseMetric]:
        """Have a test write its detections as KITTI label files into the folder ``out``."""
        cfg = self.config
        for node in evaluators(cfg, "test"):
            if is_a(node, METRICS, cfg.get("default_scope"), KittiMetric):
                node.submission_prefix = out
                return []
        raise UserError("--out writes the label files of KITTI, and this config evaluates others.")

    def draw_all(self, folder: str) -> None:
        hook = ConfigDict(type=f"polyfocal.{DrawFromAboveHook.__name__}", folder=folder)
        self.config.custom_hooks = [*self.config.get("custom_hooks", []), hook]

    def use_tta(self) -> None:
        raise UserError("--tta is for pictures, and this is a config for LiDAR: test it without.")


def prepare_experiment(request: Request, cfg: Config) -> Experiment:
    """Adapt an MMDetection3D 1.x config, in place, to what is asked for.

    Args:
        request: Its data are a folder in KITTI's layout, see :mod:`polyfocal.kitti`; the built-in
            ones are simulated scans.
        cfg: Config of the request.

    Raises:
        UserError: The config, an override, the data set or the machine does not fit.
    """
    experiment = Experiment(cfg)
    _check_device(cfg)
    if request.data is not None or request.demo:
        _check_reads_kitti(cfg)
    data = lidar_scenes.write(DEMO_FOLDER) if request.demo else request.data
    if request.demo or request.profile == "tiny":
        use_tiny_profile(cfg)
        experiment.notes += without_weights(cfg)
    if data is None:
        data = _usual_tree(cfg)
    if data is not None:
        _use_data(experiment, data, ("train", "val") if request.train else ("val",))
    # MMDetection3D's own visualizer needs Open3D to draw; here it only writes numbers of the log.
    cfg.visualizer.type = "mmengine.Visualizer"
    merge_options(cfg, request.options)
    _check_annotations(cfg, ("train", "val") if request.train else ("test",))
    experiment.notes += use_class_weights(cfg, train=request.train)
    return experiment


def _check_device(cfg: Config) -> None:
    if torch.cuda.is_available():
        return
    for node in walk(cfg.model):
        name = type_name(node)
        if operation := _CUDA_ONLY.get(name):
            raise UserError(
                f"{cfg.filename} needs a GPU, and torch finds none: its {name} runs mmcv's "
                f"{operation}, which have no CPU version; configs on pillars, such as "
                "configs/pointpillars_poly1_kitti.py, have one."
            )


def _check_reads_kitti(cfg: Config) -> None:
    for dataset in leaf_datasets(cfg.train_dataloader.dataset):
        if not _is_kitti(cfg, dataset):
            raise UserError(
                f"--data and --demo are data in KITTI's layout, and {cfg.filename} is for "
                f"{type_name(dataset)}: take a config for KITTI, such as "
                "configs/pointpillars_poly1_kitti.py."
            )


def _is_kitti(cfg: Config, dataset: ConfigDict) -> bool:
    kind = class_of(dataset, DATASETS, cfg.get("default_scope"))
    if kind is None or not issubclass(kind, MMDet3DKittiDataset):
        return False
    # MMDetection3D's own subclasses, such as that for Waymo, read other layouts.
    return kind is MMDet3DKittiDataset or not kind.__module__.startswith("mmdet3d.")


def _usual_tree(cfg: Config) -> Path | None:
    """The folder of a config for KITTI, if it exists: the tree says all that info files do."""
    datasets = list(leaf_datasets(cfg.train_dataloader.dataset))
    root = Path(datasets[0].get("data_root") or "")
    found = all(_is_kitti(cfg, one) for one in datasets) and (root / "ImageSets").is_dir()
    return root if found else None


def _use_data(experiment: Experiment, data: str | Path, splits: tuple[str, ...]) -> None:
    cfg = experiment.config
    scope = cfg.get("default_scope")
    root = str(Path(data).resolve())
    notes: dict[str, None] = {}
    found = {split: kitti.load_split(root, split) for split in splits}
    for one in found.values():
        experiment.notes += one.notes
    if "train" in found:
        train, val = (
            [info["lidar_points"]["lidar_path"] for info in found[split].infos["data_list"]]
            for split in ("train", "val")
        )
        experiment.notes += remark_on_overlap(train, val, "frames")
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        dataloader = cfg[f"{loader}_dataloader"]
        dataloader.dataset = one_data_set(dataloader.dataset, notes)
        (dataset,) = leaf_datasets(dataloader.dataset)
        for key in ("ann_file", "data_prefix", "backend_args"):
            dataset.pop(key, None)
        dataset.update(type="polyfocal.KittiDataset", data_root=root, split=split)
        steps = [
            step for step in dataset.pipeline if not is_a(step, TRANSFORMS, scope, ObjectSample)
        ]
        if len(steps) < len(dataset.pipeline):
            notes[
                "ObjectSample, which pastes in objects of other scans, is left out: it reads a "
                "database that MMDetection3D's tools make."
            ] = None
        dataset.pipeline = steps
    for name in ("val", "test"):
        kept = [one for one in map(partial(_our_metric, cfg, notes), evaluators(cfg, name)) if one]
        if not any(is_a(node, METRICS, scope, KittiMetric) for node in kept):
            kept.insert(0, ConfigDict(type="polyfocal.KittiMetric"))
        for node in kept:
            if is_a(node, METRICS, scope, KittiMetric):
                node.update(data_root=root, split="val")
        set_evaluators(cfg, name, kept)
    experiment.notes += notes


def _our_metric(cfg: Config, notes: dict[str, None], node: ConfigDict) -> ConfigDict | None:
    """A metric of a config as one of this package; a user's metric as it is; None for others."""
    kind = class_of(node, METRICS, cfg.get("default_scope"))
    if kind is None or not kind.__module__.startswith("mmdet3d."):
        return node
    if not issubclass(kind, MMDet3DKittiMetric):
        notes[f"{kind.__name__} of the config is left out: the data are in KITTI's layout."] = None
        return None
    usual = {"type", SCOPE_KEY, "ann_file", "metric", "backend_args"}
    kept = {"prefix", "collect_device", "submission_prefix"}
    if gone := [key for key in node if key not in usual | kept]:
        notes[f"the metric for KITTI trees has no {', '.join(gone)}: left out."] = None
    ours = {key: node[key] for key in node if key in kept}
    return ConfigDict(type="polyfocal.KittiMetric", **ours)


def _check_annotations(cfg: Config, splits: tuple[str, ...]) -> None:
    for split in splits:
        for dataset in leaf_datasets(cfg[f"{split}_dataloader"].dataset):
            file = annotation_file(dataset)
            if "://" in file or os.path.isfile(file):
                continue
            advice = "make it with MMDetection3D's tools/create_data.py"
            if _is_kitti(cfg, dataset):
                advice = (
                    "give a folder in KITTI's layout with --data DIR, or use the simulated scans "
                    "with --demo"
                )
            raise UserError(f"there is no data set: {cfg.filename} wants {file}; {advice}.")
