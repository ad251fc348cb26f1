"""Where a training logs its numbers beside its own files: TensorBoard, MLflow and others."""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.visualization import MLflowVisBackend as MMEngineMLflowVisBackend

from polyfocal.errors import PackageError
from polyfocal.mmengine.configs import type_name
from polyfocal.mmengine.registry import VISBACKENDS


def log_to(cfg: Config, names: Sequence[str]) -> None:
    """Have a training log its numbers for other programs too, with MMEngine's backends.

    A backend that the config has already stays as it is.

    Args:
        cfg: The config, with its ``work_dir``; it is changed.
        names: Of ``tensorboard``, ``mlflow``, ``wandb`` and ``clearml``.

    Raises:
        PackageError: A package is missing.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as W&B's ./wandb
            raise PackageError(
                f"--log {name} needs the package {name}, which is not installed: pip install {name}"
            )
    visualizer = cfg.setdefault("visualizer", ConfigDict(type="Visualizer"))
    backends = list(visualizer.get("vis_backends") or [ConfigDict(type="LocalVisBackend")])
    there = {type_name(one) for one in backends}
    wanted = {name: _backend(name, Path(cfg.work_dir)) for name in dict.fromkeys(names)}
    visualizer.vis_backends = backends + [
        one for one in wanted.values() if type_name(one) not in there
    ]


def _backend(name: str, work_dir: Path) -> ConfigDict:
    run = work_dir.name
    if name == "tensorboard":
        return ConfigDict(type="TensorboardVisBackend")
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", "polyfocal")
        return ConfigDict(type="WandbVisBackend", init_kwargs={"project": project, "name": run})
    if name == "clearml":
        names = {"project_name": "polyfocal", "task_name": run}
        return ConfigDict(type="ClearMLVisBackend", init_kwargs=names)
    folder = work_dir.absolute().parent
    return ConfigDict(
        type=f"polyfocal.{MLflowVisBackend.__name__}",
        exp_name="polyfocal",
        run_name=run,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"),
        artifact_location=(folder / "mlartifacts").as_uri()
        if "MLFLOW_TRACKING_URI" not in os.environ
        else None,
    )


@VISBACKENDS.register_module()
class MLflowVisBackend(MMEngineMLflowVisBackend):
    """MMEngine's MLflow backend, for names that MLflow does not take.

    MLflow refuses a metric such as ``coco/bbox_AR@100``. What it does not take in a name becomes
    ``_``: ``coco/bbox_AR_100``.

    Args:
        save_dir, exp_name, run_name, tags, params, tracking_uri, artifact_suffix,
            tracked_config_keys, artifact_location: See MMEngine's class.

    Example:
        >>> vis_backends = [dict(type="polyfocal.MLflowVisBackend", tracking_uri="http://host:5000")]
    """

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        super().add_scalar(_accepted(name), value, step, **kwargs)

    def add_scalars(
        self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        accepted = {_accepted(name): value for name, value in scalar_dict.items()}
        super().add_scalars(accepted, step, file_path, **kwargs)


def _accepted(name: str) -> str:
    # The loss of a classifier has no head before its name: /positives_0.
    return re.sub(r"[^\w\-. :/]", "_", name).strip("/")
