"""Chooses the adapter that a config is for. The commands plug this into a request."""

from collections.abc import Callable
from typing import Any

from polyfocal.errors import UserError
from polyfocal.experiments.request import Request


def prepare(request: Request) -> Any:
    """The experiment of any config of MMEngine's frameworks: 2D, 3D or classification.

    Only the adapter that the config is for is imported, and with it its framework.

    Raises:
        UserError: The config, an option or the data set is not usable.
    """
    from polyfocal.mmengine.configs import framework_of, read_config

    cfg = read_config(request.config)
    framework = framework_of(cfg)
    prepare_experiment: Callable[[Request, Any], Any]
    if framework == "classification":
        from polyfocal.classification.experiment import prepare_experiment
    elif framework == "mmdet3d":
        from polyfocal.mmdet3d.experiment import prepare_experiment
    else:
        from polyfocal.mmdet.experiment import prepare_experiment
    if request.profile == "small" and framework != "mmdet":
        raise UserError(
            f"--profile small is for detectors in pictures, and {request.config} is for"
            f" {'LiDAR scans' if framework == 'mmdet3d' else 'a classifier'}: take --profile tiny."
        )
    return prepare_experiment(request, cfg)
