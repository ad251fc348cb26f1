"""From a 3D config file and the tools' options to a config that is ready to run."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from rich.console import RenderableType

from polyfocal.data import kitti
from polyfocal.demo import lidar_scenes
from polyfocal.errors import UserError
from polyfocal.mmdet import experiment as mmdet_experiment
from polyfocal.mmdet.experiment import merge_options, read_config
from polyfocal.mmdet.tiny import leaf_datasets, walk
from polyfocal.mmdet3d.metrics import KittiMetric
from polyfocal.mmdet3d.pictures import DrawFromAboveHook, draw_predictions
from polyfocal.mmdet3d.tiny import use_tiny_profile

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


class Experiment(mmdet_experiment.Experiment):
    """A 3D config that is ready to run."""

    def tables(self, metrics: list[BaseMetric]) -> list[RenderableType]:
        found = [metric for metric in metrics if isinstance(metric, KittiMetric)]
        return [table for metric in found if (table := metric.table()) is not None]

    per_cent = 1.0  # KITTI counts in it

    @property
    def quality(self) -> list[str]:
        return ["Overall_3D_AP40_moderate", "Overall_BEV_AP40_moderate"]

    def hold_out(self, folder: Path) -> None:
        cfg = self.config
        loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
        trees = [
            [node for node in walk(loader.dataset) if node.get("type") == "polyfocal.KittiDataset"]
            for loader in loaders
        ]
        if not trees[0]:
            raise UserError(
                f"{cfg.filename} does not train on a tree in KITTI's layout, of which a part can "
                "be held out: give one with --data DIR, or use the simulated scans with --demo."
            )
        root = str(kitti.hold_out(trees[0][0].data_root, folder).resolve())
        for node in (*(node for tree in trees for node in tree), *walk(cfg.val_evaluator)):
            node.data_root = root
        cfg.test_evaluator = copy.deepcopy(cfg.val_evaluator)

    def draw(self, runner: Runner) -> Path:
        return draw_predictions(runner)

    def keep_detections(self, out: str) -> list[BaseMetric]:
        """Have a test write its detections as KITTI label files into the folder ``out``."""
        for evaluator in walk(self.config.test_evaluator):
            if evaluator.get("type") == "polyfocal.KittiMetric":
                evaluator.submission_prefix = out
                return []
        raise UserError("--out writes the label files of KITTI, and this config evaluates others.")

    def draw_all(self, folder: str) -> None:
        hook = ConfigDict(type=f"polyfocal.{DrawFromAboveHook.__name__}", folder=folder)
        self.config.custom_hooks = [*self.config.get("custom_hooks", []), hook]

    def use_tta(self) -> None:
        raise UserError("--tta is for pictures, and this is a config for LiDAR: test it without.")


def prepare_experiment(
    path: str | Path,
    *,
    data: str | Path | None = None,
    tiny: bool = False,
    demo: bool = False,
    options: dict[str, Any] | None = None,
    train: bool = True,
) -> Experiment:
    """Read a 3D config and adapt it to the data set and the machine.

    Args:
        path: An MMDetection3D 1.x config.
        data: A folder in KITTI's layout to use in the place of the config's data set, see
            :mod:`polyfocal.kitti`.
        tiny: Use the CPU-sized version of the architecture, see
            :func:`polyfocal.mmdet3d.tiny.use_tiny_profile`.
        demo: Use the built-in simulated scans and the tiny profile.
        options: Overrides such as ``{"train_cfg.max_epochs": 10}``. They win over everything else.
        train: Whether the train split is needed too, or only the val split.

    Raises:
        UserError: The config, an override, the data set or the machine does not fit.
    """
    cfg = read_config(path)
    experiment = Experiment(cfg)
    _check_device(cfg)
    if data is not None or demo:
        _check_reads_kitti(cfg)
    if demo:
        data = lidar_scenes.write(DEMO_FOLDER)
    if demo or tiny:
        use_tiny_profile(cfg)
    if data is None:
        data = _usual_tree(cfg)
    if data is not None:
        _use_data(experiment, data, ("train", "val") if train else ("val",))
    # MMDetection3D's own needs Open3D to draw; here it only writes the log's numbers.
    cfg.visualizer.type = "mmengine.Visualizer"
    merge_options(cfg, options)
    _check_annotations(cfg, ("train", "val") if train else ("test",))
    return experiment


def _check_device(cfg: Config) -> None:
    if torch.cuda.is_available():
        return
    for node in walk(cfg.model):
        if operation := _CUDA_ONLY.get(node.get("type")):
            raise UserError(
                f"{cfg.filename} needs a GPU, and torch finds none: its {node.type} runs mmcv's "
                f"{operation}, which have no CPU version; configs on pillars, such as "
                "configs/pointpillars_poly1_kitti.py, have one."
            )


def _check_reads_kitti(cfg: Config) -> None:
    for dataset in leaf_datasets(cfg.train_dataloader.dataset):
        if not _is_kitti(dataset):
            raise UserError(
                f"--data and --demo are data in KITTI's layout, and {cfg.filename} is for "
                f"{dataset.type}: take a config for KITTI, such as "
                "configs/pointpillars_poly1_kitti.py."
            )


def _is_kitti(dataset: ConfigDict) -> bool:
    return dataset.type in ("KittiDataset", "mmdet3d.KittiDataset")


def _usual_tree(cfg: Config) -> Path | None:
    """The folder of a config for KITTI, where it is there: the tree says all that infos do."""
    datasets = list(leaf_datasets(cfg.train_dataloader.dataset))
    root = Path(datasets[0].get("data_root") or "")
    found = all(map(_is_kitti, datasets)) and (root / "ImageSets").is_dir()
    return root if found else None


def _use_data(experiment: Experiment, data: str | Path, splits: tuple[str, ...]) -> None:
    cfg = experiment.config
    root = str(Path(data).resolve())
    for split in splits:
        experiment.notes += kitti.load_split(root, split).notes
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        (dataset,) = leaf_datasets(cfg[f"{loader}_dataloader"].dataset)
        for key in ("ann_file", "data_prefix", "backend_args"):
            dataset.pop(key, None)
        dataset.update(type="polyfocal.KittiDataset", data_root=root, split=split)
        steps = [step for step in dataset.pipeline if step.type != "ObjectSample"]
        if len(steps) < len(dataset.pipeline):
            experiment.notes.append(
                "ObjectSample, which pastes in objects of other scans, is left out: it reads a "
                "database that MMDetection3D's tools make."
            )
        dataset.pipeline = steps
    evaluator = ConfigDict(type="polyfocal.KittiMetric", data_root=root, split="val")
    cfg.val_evaluator = evaluator
    cfg.test_evaluator = copy.deepcopy(evaluator)


def _check_annotations(cfg: Config, splits: tuple[str, ...]) -> None:
    for split in splits:
        for dataset in leaf_datasets(cfg[f"{split}_dataloader"].dataset):
            file = os.path.join(dataset.get("data_root") or "", dataset.ann_file)
            if "://" in file or os.path.isfile(file):
                continue
            advice = "make it with MMDetection3D's tools/create_data.py"
            if _is_kitti(dataset):
                advice = (
                    "give a folder in KITTI's layout with --data DIR, or use the simulated scans "
                    "with --demo"
                )
            raise UserError(f"there is no data set: {cfg.filename} wants {file}; {advice}.")
