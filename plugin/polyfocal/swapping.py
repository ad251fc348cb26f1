"""Swaps the classification losses of a config for losses of this package."""

import ast
import copy
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from polyfocal import heads, losses
from polyfocal.errors import UserError
from polyfocal.losses.class_weights import from_data, no_alpha
from polyfocal.losses.quality import QualityLoss

# What a stock loss is in the family, its Poly-1 form, and the settings that mean the same. Those of
# the first two mean the same in every loss of labels.
_POLY1 = {
    "FocalLoss": ("Poly1FocalLoss", ("gamma", "alpha", "class_weight", "activated")),
    "CrossEntropyLoss": ("Poly1CrossEntropyLoss", ("class_weight", "bg_cls_weight")),
    "QualityFocalLoss": ("Poly1QualityFocalLoss", ("beta", "activated")),
    "VarifocalLoss": ("Poly1VarifocalLoss", ("alpha", "gamma", "iou_weighted")),
    "GaussianFocalLoss": (
        "GaussianPoly1FocalLoss",
        ("alpha", "gamma", "pos_weight", "neg_weight"),
    ),
}
# The same of a Poly-1 form that stands in a config.
_SHARED = {name: keys for stock, (ours, keys) in _POLY1.items() for name in (stock, ours)}
_FOCAL = ("FocalLoss", "Poly1FocalLoss")
_OF_LABELS = (*_FOCAL, "CrossEntropyLoss", "Poly1CrossEntropyLoss")
# Settings of a loss's config that are not the loss's own: the head takes them, or an adapter.
_BESIDE = {"bg_cls_weight", "pos_weight", "neg_weight"}
# The slots that decide on classes; the others are swapped when they are named.
_MAIN = {
    "cls_loss", "initial_loss_cls", "loss_center_heatmap", "loss_cls", "loss_heatmap",
}  # fmt: skip


class Found(NamedTuple):
    """One classification loss of a config.

    Attributes:
        path: keys from the model's dictionary to that of the head.
        head: the name of its class.
        name: attribute of the head that holds the loss.
        loss: its config; the default of the head if the config has none.
        slot: what the table of heads says; None if the head is not in the table.
        decides: whether it decides on classes: it is no mask, no centreness and no proposal.
    """

    path: tuple[str | int, ...]
    head: str
    name: str
    loss: dict[str, Any]
    slot: heads.Slot | None
    decides: bool

    @property
    def where(self) -> str:
        """The loss as an option names it: ``bbox_head.loss_cls``."""
        return ".".join(map(str, (*self.path, self.name)))


def find_losses(model: dict[str, Any]) -> list[Any]:
    """The classification losses of a model's config, in its order.

    Returns:
        A :class:`Found` for each; of a LazyConfig's model what
        :func:`polyfocal.detectron2.swapping.find_losses` gives.
    """
    if _is_lazy(model):
        return _detectron2().find_losses(model)
    return [
        found
        for path, node in _heads(model, ())
        for found in _of_head(path, node, _proposes(model, path))
    ]


def swap(cfg: Any, loss: str = "poly1", slots: Sequence[str] | None = None, **settings: Any) -> Any:
    """The config with its classification losses swapped.

    Args:
        cfg: a config of MMDetection or MMDetection3D, old or new style, or a LazyConfig of
            Detectron2: its path, its name in an installed framework
            ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
            'detectron2::COCO-Detection/retinanet_R_50_FPN_1x.py'), or the loaded one, which stays
            as it is.
        loss: 'poly1' for the Poly-1 form of what stands there, with its gamma, alpha, weights and
            reduction; or the name of a loss of this package.
        slots: which losses, as :func:`find_losses` names them ('bbox_head.loss_cls'), or parts of
            those names; a whole name means that loss alone. None for all that decide on classes:
            no masks, centrenesses or proposals.
        settings: settings of the loss, for instance ``epsilon=1.0``.

    Returns:
        A Config, ready to be built or dumped; of a LazyConfig a DictConfig, as it was.

    Raises:
        UserError: nothing can be swapped, or a loss does not fit; the sentence says what does.
    """
    swapped = copy.deepcopy(load(cfg))
    for found, changes in plan(swapped["model"], loss, slots, **settings):
        node = _at(swapped["model"], found.path)
        for key, value in changes.items():
            node[key] = value
    return swapped


def plan(
    model: dict[str, Any], loss: str = "poly1", slots: Sequence[str] | None = None, **settings: Any
) -> list[tuple[Any, dict[str, Any]]]:
    """What :func:`swap` changes: the losses, and settings of their heads, which hold them."""
    found = find_losses(model)
    chosen = [f for f in found if (f.decides if slots is None else _is_named(f, found, slots))]
    if not chosen:
        names = ", ".join(f.where for f in found) or "none"
        which = "that decides on classes" if slots is None else f"named {', '.join(slots)}"
        raise UserError(f"the model has no loss {which}: its classification losses are {names}")
    if _is_lazy(model):
        changes = _detectron2().changes
        return [(f, changes(_at(model, f.path), f, loss, settings)) for f in chosen]
    return [(f, _changes(f, loss, settings)) for f in chosen]


def _is_named(one: Any, found: Sequence[Any], slots: Sequence[str]) -> bool:
    """Whether slots name a loss: by its whole name, or by a part that is no other's whole name."""
    names = {f.where for f in found}
    return any(slot == one.where if slot in names else slot in one.where for slot in slots)


def as_text(
    base: str,
    cfg: Any,
    loss: str = "poly1",
    slots: Sequence[str] | None = None,
    out: Path | None = None,
    **settings: Any,
) -> str:
    """The shortest config file that is ``base`` with its losses swapped.

    Args:
        base: its path, or its name in an installed framework.
        cfg: the same, loaded.
        loss: as for :func:`swap`, and so are ``slots`` and ``settings``.
        out: where the file will be, as far as it is known: a config of the new style names its
            base relative to itself.

    Raises:
        UserError: as :func:`swap`, or the file cannot name its base.
    """
    base = base if "::" in base else str(Path(base).resolve())
    changes = plan(cfg["model"], loss, slots, **settings)
    if _is_lazy(cfg):
        return _lazy_text(base, cfg, changes)
    if getattr(cfg, "_imported_names", None):
        lines = ["from mmengine.config import read_base", "", "with read_base():"]
        folder = (out or Path("config.py")).resolve().parent
        lines += [f"    from {_dotted(Path(base), folder)} import *", ""]
        return "\n".join(lines + _assignments(changes)) + "\n"
    if any(isinstance(key, int) for found, *_ in changes for key in found.path):
        # A file cannot change one entry of a list of its base.
        lines = [f"_base_ = {base!r}", "", "model = _base_.model"]
        return "\n".join(lines + _assignments(changes)) + "\n"
    tree: dict[str, Any] = {}
    for found, changed in changes:
        node, stock = tree, _at(cfg["model"], found.path)
        for key in found.path:
            node = node.setdefault(str(key), {})
        for name, value in changed.items():
            # MMEngine takes the key away only where it has something to delete.
            replaces = isinstance(value, dict) and name in stock
            node[name] = {"_delete_": True, **value} if replaces else value
    return f"_base_ = {base!r}\n\nmodel = {_shown(tree)}\n"


def _lazy_text(base: str, cfg: Any, changes: list[tuple[Any, dict[str, Any]]]) -> str:
    _, in_zoo, name = base.rpartition("detectron2::")
    classes = ", ".join(sorted({found.head for found, _ in changes}))
    source = "from detectron2 import model_zoo" if in_zoo else (
        "from detectron2.config import LazyConfig"
    )  # fmt: skip
    call = f"model_zoo.get_config({name!r})" if in_zoo else f"LazyConfig.load({base!r})"
    keys = sorted(map(str, cfg))
    lines = [
        source, "", f"from polyfocal.detectron2 import {classes}", "", f"_base = {call}",
        f"{', '.join(keys)} = ({', '.join(f'_base.{key}' for key in keys)})",
    ]  # fmt: skip
    return "\n".join(lines + _assignments(changes)) + "\n"


def _assignments(changes: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    lines = []
    for found, changed in changes:
        place = "model" + "".join(
            f"[{key}]" if isinstance(key, int) else f".{key}" for key in found.path
        )
        lines += [f"{place}.{key} = {_shown(value)}" for key, value in changed.items()]
    return lines


def _dotted(file: Path, folder: Path) -> str:
    """A file as ``read_base`` imports it from a folder."""
    *up, name = Path(os.path.relpath(file.with_suffix(""), folder)).parts
    level = up.count("..")
    parts = [*up[level:], name]
    if not all(part.isidentifier() for part in parts):
        raise UserError(
            f"read_base imports a config by a name of Python, and {'/'.join(parts)}.py has none:"
            " rename it, or write the new config beside it"
        )
    return "." * (level + 1) + ".".join(parts)


def as_table(found: Sequence[Any]) -> str:
    """What losses are and what fits in their places, for a terminal."""
    lines = []
    for loss in found:
        kind = None if loss.slot is None else heads.KINDS[loss.slot.kind]
        if kind is None:
            fits = "not in the table of heads: see docs/heads.md"
        elif loss.slot.kind == "method":
            fits = loss.slot.note.rpartition("`: ")[2]
        elif loss.slot.kind == "name":
            fits = f"{heads.FAMILIES[heads.SIGMOID]}, in polyfocal.{loss.head}"
        else:
            fits = ", or ".join(heads.FAMILIES[of] for of in kind.fits) or f"none: {kind.take}"
        now = name_of(loss.loss["type"])
        lines.append(f"{loss.where}\n    of {loss.head}, now {now}\n    fits: {fits}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, type):  # of this package, imported above
        return value.__name__
    if isinstance(value, dict):
        return "dict(" + ", ".join(f"{k}={_shown(v)}" for k, v in value.items()) + ")"
    return repr(value)


def load(cfg: Any) -> Any:
    """The config of a path, of a name in an installed framework, or the loaded one itself.

    Raises:
        UserError: there is none, or it is not that of a detector.
    """
    if not isinstance(cfg, str | Path):
        if not isinstance(cfg, dict) and not hasattr(cfg, "filename") and not _is_lazy(cfg):
            raise UserError(
                f"swap takes a config of MMDetection, MMDetection3D or Detectron2, not a"
                f" {type(cfg).__name__}"
            )
        if "model" not in cfg:
            raise UserError("the config has no model: expected that of a detector")
        return cfg
    framework, in_framework, name = str(cfg).rpartition("::")
    if not in_framework and not Path(cfg).is_file():
        raise UserError(f"there is no config {cfg}")
    if Path(name).suffix in (".yaml", ".yml"):
        raise UserError(f"{cfg}: docs/detectron2.md says where a yaml of Detectron2 takes a loss")
    try:
        if framework == "detectron2":
            loaded = _detectron2("detectron2.model_zoo").get_config(name)
        elif not in_framework and _wants_detectron2(Path(cfg)):
            loaded = _detectron2("detectron2.config").LazyConfig.load(str(cfg))
        elif in_framework:
            loaded = importlib.import_module("mmengine.hub").get_config(str(cfg))
        else:
            loaded = importlib.import_module("mmengine.config").Config.fromfile(cfg)
    except UserError:
        raise
    except Exception as error:  # a config is a program: it can fail in any way
        raise UserError(
            f"{cfg} cannot be read as a config: {type(error).__name__}: {error}"
        ) from error
    return load(loaded)


def _is_lazy(cfg: Any) -> bool:
    return type(cfg).__name__ == "DictConfig"


def _wants_detectron2(file: Path) -> bool:
    """Whether a file is a LazyConfig: it imports Detectron2, or other files without read_base."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError):
        return False  # Config.fromfile says what is wrong
    for node in body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.level > 0:
                return True
        if any(name.partition(".")[0] == "detectron2" for name in names):
            return True
    return False


def _detectron2(module: str = "polyfocal.detectron2.swapping") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"a config of Detectron2 needs Detectron2: {error}") from error


def name_of(kind: Any) -> str:
    """The bare name of a type: of a string with a scope, or of a class, loaded or not."""
    if isinstance(kind, str):
        return kind.rpartition(".")[2]
    return str(getattr(kind, "__name__", None) or getattr(kind, "name", kind)).rpartition(".")[2]


def _at(node: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def _heads(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(node, dict):
        if "type" in node:
            yield path, node
        for key, value in node.items():
            yield from _heads(value, (*path, key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _heads(value, (*path, index))


def _proposes(model: dict[str, Any], path: tuple[str | int, ...]) -> bool:
    """Whether a head gives the proposals of a detector of two stages."""
    return "rpn_head" in path and "roi_head" in _at(model, path[: path.index("rpn_head")])


def _of_head(path: tuple[str | int, ...], node: dict[str, Any], proposes: bool) -> Iterator[Found]:
    kind, head = node["type"], name_of(node["type"])
    cls = _class_of(kind)
    defaults = _defaults(cls) if cls is not None else {}
    for name in dict.fromkeys([*node, *defaults]):
        loss = node.get(name, defaults.get(name))
        if not isinstance(loss, dict) or "type" not in loss:
            continue
        slot = _slot(kind, head, cls, name)
        ours = name_of(loss["type"]) in (*heads.ADAPTERS, *losses.__all__)
        if slot is not None or name_of(loss["type"]) in _POLY1 or (ours and "loss" in name):
            yield Found(path, head, name, dict(loss), slot, name in _MAIN and not proposes)


def _class_of(kind: Any) -> type | None:
    """The class of a type in a config, if its framework is installed."""
    if isinstance(kind, type):
        return kind
    if not isinstance(kind, str):
        return None
    scope, _, name = kind.rpartition(".")
    for framework in (scope,) if scope in ("mmdet", "mmdet3d", "polyfocal") else _installed():
        try:
            registry = importlib.import_module(f"{framework}.registry").MODELS
            if framework != "polyfocal":
                importlib.import_module(f"{framework}.models")
        except ImportError:
            continue
        cls = registry.get(f"{framework}.{name}" if framework == "polyfocal" else name)
        if isinstance(cls, type):
            return cls
    return None


def _installed() -> list[str]:
    """Frameworks to look in, MMDetection3D only where it is in use: importing it takes seconds."""
    return ["mmdet", *(["mmdet3d"] if "mmdet3d" in sys.modules else [])]


def _defaults(cls: type) -> dict[str, Any]:
    """The losses that a head takes if its config has none."""
    init = next((vars(k)["__init__"] for k in cls.__mro__ if "__init__" in vars(k)), None)
    found = {}
    for parameter in inspect.signature(init).parameters.values() if init else ():
        default = parameter.default
        if isinstance(default, dict) and name_of(default.get("type")) in _POLY1:
            found[parameter.name] = default
    return found


def _slot(kind: Any, head: str, cls: type | None, name: str) -> heads.Slot | None:
    if cls is not None:
        return heads.slot_of(cls, name)
    scope = kind.rpartition(".")[0] if isinstance(kind, str) else ""
    for slot in heads.SLOTS:
        if (slot.head, slot.name) == (head, name) and scope in ("", slot.framework):
            return slot
    return None


def _changes(found: Found, loss: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The new settings of a head: its type where that changes, and the config of its loss."""
    kind = "labels" if found.slot is None else found.slot.kind
    where = f"{found.head}.{found.name}"
    if kind in ("unused", "pictures", "overlap of masks", "several positives"):
        raise UserError(f"{where} gives {heads.KINDS[kind].gives}: take {heads.KINDS[kind].take}")
    changes: dict[str, Any] = {}
    if kind == "name":
        changes["type"], kind = f"polyfocal.{found.head}", "sigmoid labels"
    new = _poly1(found, kind, where) if loss == "poly1" else _named(loss, found, kind, where)
    if loss == "poly1" and "epsilon" not in settings:
        settings = {"epsilon": 1.0, **settings}
    new = {"type": new.pop("type"), **settings, **{k: new[k] for k in new if k not in settings}}
    weighed = name_of(found.loss["type"]) in _FOCAL and not _is_sigmoid(found.loss)
    if "alpha" not in settings and not weighed:
        new |= no_alpha(losses.LOSSES[name_of(new["type"])], new)
    built = _built(new)
    adapter = _adapter(kind, heads.family(built))
    if adapter is None:
        reason = heads.misplaced(type(found.head, (), {}), found.name, built, heads.KINDS[kind])
        if reason is not None:
            raise UserError(reason)
    else:
        new = dict(type=f"polyfocal.{adapter}", loss=new)
    return {**changes, found.name: new}


def _poly1(found: Found, kind: str, where: str) -> dict[str, Any]:
    stock, name = found.loss, name_of(found.loss["type"])
    if name in (*heads.ADAPTERS, *losses.__all__) and name not in _POLY1:
        raise UserError(f"{where} is a {name}, a loss of this package already: set its epsilon")
    if name not in _POLY1:
        raise UserError(f"{where} is a {name}, which has no Poly-1 form in this package")
    new: dict[str, Any] = {"type": f"polyfocal.{_POLY1[name][0]}"}
    if name != "GaussianFocalLoss":
        new["use_sigmoid"] = _is_sigmoid(stock)
    new |= _kept(found, where)
    if kind.startswith("probabilities"):
        new["activated"] = True
    elif new.get("activated") is False:
        del new["activated"]
    return new


def _kept(found: Found, where: str) -> dict[str, Any]:
    """The settings of what stands there that mean the same in its Poly-1 form."""
    stock, name = found.loss, name_of(found.loss["type"])
    if name == "CrossEntropyLoss":
        if _is_sigmoid(stock) and stock.get("class_weight") is not None:
            raise UserError(
                f"{where} is a sigmoid CrossEntropyLoss with class_weight, which there weighs"
                " positives only and here the columns: take it out, or write the loss by hand"
            )
        if stock.get("ignore_index") is not None:
            raise UserError(
                f"{where} is a CrossEntropyLoss with ignore_index={stock['ignore_index']}, whose"
                " mean is over all rows there and over those that count here: write the loss by"
                " hand"
            )
    # None is a value of alpha, that of no such weight.
    return {
        key: stock[key]
        for key in (*_SHARED.get(name, ()), "reduction", "loss_weight")
        if key in stock and (stock[key] is not None or key == "alpha")
    }


def _is_sigmoid(stock: dict[str, Any]) -> bool:
    """The form of a loss of MMDetection; only the cross-entropy is a softmax by default."""
    softmax = name_of(stock["type"]) == "CrossEntropyLoss"
    return bool(stock.get("use_sigmoid", not softmax) or stock.get("use_mask"))


def _named(loss: str, found: Found, kind: str, where: str) -> dict[str, Any]:
    cls = losses.LOSSES.get(loss)
    if cls is None:
        known = ", ".join(sorted(losses.LOSSES))
        raise UserError(f"loss={loss!r}: expected poly1 or one of {known}")
    new: dict[str, Any] = {"type": f"polyfocal.{loss}"}
    takes = inspect.signature(cls).parameters
    if "use_sigmoid" in takes:
        fits = heads.KINDS[kind].fits
        new["use_sigmoid"] = heads.SOFTMAX not in fits or _is_sigmoid(found.loss)
        if heads.SIGMOID not in fits and heads.SOFTMAX in fits:
            new["use_sigmoid"] = False
        default = takes["use_sigmoid"].default
        if default is False and loss != "Poly1CrossEntropyLoss":
            new["use_sigmoid"] = False
    stock = name_of(found.loss["type"])
    kept = _kept(found, where)
    if loss != stock and _POLY1.get(stock, ("",))[0] != loss:
        of_labels = stock in _OF_LABELS and not issubclass(cls, QualityLoss)
        if not of_labels or new.get("use_sigmoid") != _is_sigmoid(found.loss):
            kept = {key: kept[key] for key in ("reduction", "loss_weight") if key in kept}
    kept.pop("activated", None)
    new |= {key: value for key, value in kept.items() if key in takes or key in _BESIDE}
    if kind.startswith("probabilities") and "activated" in takes:
        new["activated"] = True
    return new


def _adapter(kind: str, family: str | None) -> str | None:
    if kind == "masks":
        return "MaskLoss"
    if kind == "minus one":
        return "MinusOneBackground"
    takes_own = heads.ROI_SOFTMAX in heads.KINDS[kind].fits
    if (kind == "rows" and family == heads.SIGMOID) or (takes_own and family == heads.OWN_SOFTMAX):
        return "RoILoss"
    return None


def _built(new: dict[str, Any]) -> nn.Module:
    """The loss of a config, so that its settings are checked."""
    # As a config builds it, with dictionaries and paths; without MMEngine the class itself.
    cls: Any = _class_of(new["type"]) or losses.LOSSES[name_of(new["type"])]
    known = inspect.signature(cls).parameters
    skipped = {"type", *_BESIDE, *from_data(cls, new)}
    if isinstance(new.get("class_weight"), float):
        skipped.add("class_weight")  # DETR's, of which the head makes a list
    try:
        return cls(**{k: v for k, v in new.items() if k not in skipped})
    except TypeError as error:
        wrong = [k for k in new if k not in known and k not in skipped]
        if not wrong:
            raise UserError(str(error)) from error
        raise UserError(
            f"{name_of(new['type'])} has no setting {wrong[0]!r}: it has {', '.join(known)}"
        ) from error
