"""What a Runner has built: the objects of a data set, by class, and what is inside of wrappers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS, DefaultScope

from polyfocal.errors import UserError
from polyfocal.mmengine.configs import leaf_datasets

_MOST_NAMES = 20  # classes that a line on the console names


@dataclass(frozen=True)
class TrainingObjects:
    """The objects of a data set, without those that it leaves out by itself.

    Attributes:
        samples: Pictures or scans.
        counts: Objects by the name of their class; for a classifier, pictures.
    """

    samples: int
    counts: dict[str, int]

    def __str__(self) -> str:
        total = sum(self.counts.values())
        what = f"{total} objects in {self.samples} samples"
        if len(self.counts) <= _MOST_NAMES:
            names = ", ".join(f"{name} ({count})" for name, count in self.counts.items())
            return f"{what}: {names}"
        rarest, most = (choose(self.counts, key=self.counts.__getitem__) for choose in (min, max))
        text = f"{what}: from {self.counts[rarest]} ({rarest}) to {self.counts[most]} ({most})"
        without = sum(count == 0 for count in self.counts.values())
        return f"{text}; {without} of {len(self.counts)} classes have none" if without else text


def training_objects(dataset: Any) -> TrainingObjects | None:
    """Count the objects of a built data set; None if it does not tell.

    Every picture counts once, however often a wrapper repeats it. Regions to ignore do not count.

    Args:
        dataset: One of OpenMMLab's conventions: ``get_data_info(index)`` gives ``instances`` with
            ``bbox_label`` (MMDetection) or a ``gt_label`` (classifiers), or the data set has
            counted while it read, ``num_ins_per_cat`` (MMDetection3D).
    """
    samples, labels = 0, Counter[int]()
    names: tuple[str, ...] = ()
    for leaf in leaves(dataset):
        names = tuple((getattr(leaf, "metainfo", None) or {}).get("classes") or ())
        samples += len(leaf)
        if hasattr(leaf, "num_ins_per_cat"):
            labels.update(dict(enumerate(leaf.num_ins_per_cat)))
            continue
        for index in range(len(leaf)):
            found = _labels(leaf.get_data_info(index)) if hasattr(leaf, "get_data_info") else None
            if found is None:
                return None
            labels.update(found)
    count = max(len(names), max(labels, default=-1) + 1)
    shown = [names[label] if label < len(names) else str(label) for label in range(count)]
    return TrainingObjects(samples, {name: labels[label] for label, name in enumerate(shown)})


def check_training_objects(dataset: Any, cfg: Config) -> TrainingObjects | None:
    """:func:`training_objects` of the data set of a training, which must have some.

    Raises:
        UserError: There is nothing to train on.
    """
    found = training_objects(dataset)
    if found is not None and not any(found.counts.values()):
        raise nothing_to_train_on(cfg)
    return found


def is_empty(cfg: Config) -> bool:
    """Whether the training data of a config cannot be built because they have no picture.

    MMEngine fails on a data set that drops all of its pictures.
    """
    try:
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
            sizes = [
                len(DATASETS.build(ConfigDict(leaf, serialize_data=False, pipeline=[])))
                for leaf in leaf_datasets(cfg.train_dataloader.dataset)
            ]
    except Exception:  # it fails for another reason
        return False
    return bool(sizes) and not any(sizes)


def nothing_to_train_on(cfg: Config) -> UserError:
    """The error of a training without an object."""
    leaves = list(leaf_datasets(cfg.train_dataloader.dataset))
    files = [str(leaf.ann_file or leaf.get("data_root")) for leaf in leaves]
    rules = [str(dict(leaf.filter_cfg)) for leaf in leaves if leaf.get("filter_cfg")]
    drops = f", filter_cfg={rules[0]}" if rules else ""
    where = " and ".join(files) or "the training split"
    return UserError(
        f"there is nothing to train on in {where}: the data set leaves out every picture or every "
        "object (ignored or crowd regions, boxes outside of their picture, without area or below "
        f"a pixel, classes that are not declared{drops})."
    )


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers that repeat, concatenate, balance or mix them."""
    inner = getattr(dataset, "dataset", None)
    side_by_side = getattr(dataset, "datasets", None)
    if hasattr(dataset, "indices"):  # a part of a data set; only the part knows its samples
        yield dataset
    elif inner is not None:
        yield from leaves(inner)
    elif side_by_side is not None:
        for one in side_by_side:
            yield from leaves(one)
    else:
        yield dataset


def unwrapped(model: Any) -> Any:
    """A model without the wrapper of a distributed training."""
    return model.module if is_model_wrapper(model) else model


def _labels(info: dict[str, Any]) -> list[int] | None:
    if "instances" in info:
        kept = [one for one in info["instances"] if not one.get("ignore_flag")]
        return [one["bbox_label"] for one in kept if "bbox_label" in one]
    if "gt_label" in info:
        label = info["gt_label"]
        return [int(one) for one in label] if hasattr(label, "__iter__") else [int(label)]
    return None
