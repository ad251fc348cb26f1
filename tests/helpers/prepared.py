"""An experiment as the tools get it, whichever framework its config is for."""

from typing import Any

from polyfocal.adapters import prepare
from polyfocal.experiments.request import Request


def prepare_experiment(path: Any, *, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    return Request(prepare, path, options=options or {}, **settings).prepare()


def prepare_detectron2(path: Any, **settings: Any) -> Any:
    from polyfocal.detectron2.prepare import prepare_experiment

    return prepare_experiment(Request(prepare_experiment, path, **settings))
