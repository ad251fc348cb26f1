"""Configs of MMEngine's new style, whose types are classes, made of those of the old style."""

from mmengine import registry
from mmengine.hub import get_config

REGISTRIES = (
    registry.MODELS,
    registry.TASK_UTILS,
    registry.DATASETS,
    registry.VISUALIZERS,
    registry.METRICS,
    registry.TRANSFORMS,
    registry.HOOKS,
    registry.LOOPS,
    registry.OPTIMIZERS,
    registry.OPTIM_WRAPPERS,
    registry.PARAM_SCHEDULERS,
    registry.DATA_SAMPLERS,
    registry.VISBACKENDS,
    registry.LOG_PROCESSORS,
    registry.WEIGHT_INITIALIZERS,
)


def new_style(name, default_scope=None, package="mmdet"):
    """The text of an installed config in the new style: the same with imports."""
    content = get_config(f"{package}::{name}").to_dict()
    content["default_scope"] = default_scope
    imports = {}
    lines = [f"{key} = {_code(value, imports, package)}" for key, value in content.items()]
    return "\n".join([*sorted(imports.values()), *lines]) + "\n"


def _code(value, imports, package):
    if isinstance(value, dict):
        entries = [
            f"{key!r}: {(_kind if key == 'type' else _code)(entry, imports, package)}"
            for key, entry in value.items()
            if key != "_scope_"
        ]
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list | tuple):
        parts = "".join(f"{_code(entry, imports, package)}, " for entry in value)
        return f"[{parts}]" if isinstance(value, list) else f"({parts})"
    return repr(value)


def _kind(name, imports, package):
    for one in REGISTRIES:
        with one.switch_scope_and_registry(package) as own:
            kind = own.get(name)
        if isinstance(kind, type):
            imports[name] = f"from {kind.__module__} import {kind.__qualname__}"
            return kind.__qualname__
    return repr(name)  # a function, such as nms
