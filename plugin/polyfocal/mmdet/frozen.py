"""Training on the features of a frozen backbone, in the place of pictures.

The pipeline of a data set goes on as it is, boxes, masks and mirroring included, on a blank in the
place of each picture. A hook knows each sample's picture, size and direction, and gives the
backbone the features that it computed of them once. The model, and so its checkpoints, are those of
a training on pictures.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform, LoadImageFromFile, RandomFlip, Resize
from mmdet.datasets.transforms import PackDetInputs
from mmdet.models.data_preprocessors import BoxInstDataPreprocessor
from mmengine.config import Config, ConfigDict
from mmengine.dist import all_reduce, barrier, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS as ALL_HOOKS
from mmengine.registry import TRANSFORMS as ALL_TRANSFORMS
from torch import Tensor

from polyfocal.data.files import DatasetError
from polyfocal.efficientnet import CHANNELS, EfficientNetLite0
from polyfocal.errors import UserError
from polyfocal.features import FeatureStore
from polyfocal.losses import BiasHead
from polyfocal.mmengine.configs import is_a, leaf_datasets, walk
from polyfocal.mmengine.objects import leaves, unwrapped
from polyfocal.mmengine.registry import HOOKS, TRANSFORMS

FOLDER = "work_dirs/features"
"""Where features are kept, below the current directory, for all trainings."""

_META_KEYS = ("img_path", "img_shape", "flip", "flip_direction")
_DIRECTIONS: dict[str | None, tuple[int, ...]] = {
    None: (),
    "horizontal": (1,),
    "vertical": (0,),
    "diagonal": (0, 1),
}
_FAR = 512  # pixels; wider than what a feature sees


def freeze_backbone(cfg: Config) -> list[str]:
    """Change the config of the small profile, in place, so that it trains on kept features.

    Args:
        cfg: After :func:`polyfocal.mmdet.tiny.use_small_profile`.

    Returns:
        What a person should know, a sentence each.
    """
    cfg.model.backbone.frozen_stages = len(CHANNELS)
    notes = [f"the backbone is frozen; its features are kept in {FOLDER}."]
    if cfg.model.data_preprocessor.pop("batch_augments", None):
        notes.append("batch_augments of the config are left out: features have one size.")
    use_features(cfg, "train")
    if not is_frozen(cfg):  # whose hook may have a folder and a limit of its own
        hook = ConfigDict(type="polyfocal.FrozenFeaturesHook")
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
    return notes


def use_features(cfg: Config, split: str) -> None:
    """Have a loader leave the pictures unread, since the backbone is given their features.

    Args:
        cfg: The config.
        split: ``"train"`` or ``"val"``.
    """
    scope = cfg.get("default_scope")
    for dataset in leaf_datasets(cfg[f"{split}_dataloader"].dataset):
        for place, step in enumerate(dataset.pipeline):
            if is_a(step, ALL_TRANSFORMS, scope, LoadImageFromFile):
                dataset.pipeline[place] = ConfigDict(type="polyfocal.BlankPicture", load=step)
            elif is_a(step, ALL_TRANSFORMS, scope, PackDetInputs) and "meta_keys" in step:
                step.meta_keys = tuple(dict.fromkeys((*step.meta_keys, *_META_KEYS)))


def uses_features(cfg: Config, split: str) -> bool:
    """Whether a loader leaves the pictures unread."""
    steps = walk(cfg[f"{split}_dataloader"].dataset)
    return any(is_a(step, ALL_TRANSFORMS, "mmdet", BlankPicture) for step in steps)


def is_frozen(cfg: Config) -> bool:
    """Whether a config trains on kept features."""
    hooks = cfg.get("custom_hooks") or []
    return any(is_a(hook, ALL_HOOKS, "mmdet", FrozenFeaturesHook) for hook in hooks)


@TRANSFORMS.register_module()
class BlankPicture(BaseTransform):
    """A blank of a picture's size, of one channel, instead of the picture.

    Args:
        load: The ``LoadImageFromFile`` that would read the picture.

    Attributes:
        reads_pictures: Whether the picture is read nevertheless, for a model that is not given its
            features.
    """

    def __init__(self, load: dict[str, Any]) -> None:
        self.load = ALL_TRANSFORMS.build(load)
        self.reads_pictures = False

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Do what reading the picture does, except for its content."""
        if self.reads_pictures:
            return self.load(results)
        shape = (results["height"], results["width"])
        results["img"] = np.zeros(shape, np.uint8)
        results["img_shape"] = results["ori_shape"] = shape
        return results


@HOOKS.register_module()
class FrozenFeaturesHook(Hook):
    """Gives a frozen backbone the features of the pictures that a loader has left unread.

    It computes those that are not kept yet when the training starts, of each picture as it is and
    mirrored in the ways of the pipeline's ``RandomFlip``.

    Args:
        folder: Folder where the features are kept.
        limit_gb: GiB that this folder may take.
    """

    priority = "VERY_HIGH"

    def __init__(self, folder: str = FOLDER, limit_gb: float = 20.0) -> None:
        self.store = FeatureStore(Path(folder), round(limit_gb * 2**30))
        self._readers: dict[str, _Reader] = {}

    def before_train(self, runner: Any) -> None:
        """Compute what is missing."""
        self._reader(runner, "train")

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Give the features of a batch."""
        self._give(runner, "train", data_batch)

    def before_val_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Likewise, where the val loader leaves the pictures unread too."""
        self._give(runner, "val", data_batch)

    def _give(self, runner: Any, split: str, batch: Any) -> None:
        reader = self._reader(runner, split)
        if reader is not None:
            reader.give(batch["data_samples"])

    def _reader(self, runner: Any, split: str) -> "_Reader | None":
        if split not in self._readers:
            loop = runner.train_loop if split == "train" else runner.val_loop
            dataset = loop.dataloader.dataset
            self._readers[split] = _Reader(self.store, unwrapped(runner.model), dataset)
            self._readers[split].fill()
        reader = self._readers[split]
        return reader if reader.samples else None


class _Reader:
    """The features of the pictures of a data set.

    Args:
        store: Where the features are kept.
        model: A detector on a frozen :class:`EfficientNetLite0`.
        dataset: The built data set; without blanks it has no features.
    """

    def __init__(self, store: FeatureStore, model: Any, dataset: Any) -> None:
        self.store, self.backbone = store, model.backbone
        self.preprocess = model.data_preprocessor
        if not isinstance(self.backbone, EfficientNetLite0):
            raise UserError("FrozenFeaturesHook needs the backbone polyfocal.EfficientNetLite0.")
        self.samples: dict[str, tuple[dict[str, Any], list[Any]]] = {}
        self.directions: dict[str | None, None] = {None: None}
        for leaf in leaves(dataset):
            steps = leaf.pipeline.transforms
            if not any(isinstance(step, BlankPicture) for step in steps):
                continue
            shown = [s.load if isinstance(s, BlankPicture) else s for s in steps]
            shown = [s for s in shown if isinstance(s, LoadImageFromFile | Resize)]
            for index in range(len(leaf)):
                info = leaf.get_data_info(index)
                self.samples[info["img_path"]] = (info, shown)
            for step in steps:
                if isinstance(step, RandomFlip) and step.prob:
                    named = step.direction
                    names = [named] if isinstance(named, str) else named
                    self.directions.update(dict.fromkeys(names))
        if self.samples:
            self._check(model)
        self._pictures: dict[str, bytes] = {}
        state = hashlib.sha256()
        for name, value in self.backbone.state_dict().items():
            state.update(name.encode() + value.cpu().numpy().tobytes())
        normal = {name: value.tolist() for name, value in self.preprocess.named_buffers()}
        channels = self.preprocess._channel_conversion  # whether their order is turned
        settings = (normal, channels, self.preprocess.pad_value, self.backbone.out_indices)
        state.update(repr(settings).encode())
        self._state = state.digest()
        self._blank: list[Tensor] | None = None

    def _check(self, model: Any) -> None:
        """Refuse a model that features alone would train otherwise."""
        if self.backbone.frozen_stages != len(CHANNELS):
            raise UserError(
                f"frozen_stages={self.backbone.frozen_stages} of the backbone: on kept features "
                f"expected {len(CHANNELS)}, all of it; leave --freeze out to train a part of it."
            )
        if any(isinstance(part, BiasHead) and part.sees == "colour" for part in model.modules()):
            raise UserError(
                "--freeze reads no pictures, and the model has a BiasHead with sees='colour': "
                "expected 'geometry' or 'features' there, or a training without --freeze."
            )
        if isinstance(self.preprocess, BoxInstDataPreprocessor):
            raise UserError(
                "--freeze reads no pictures, and BoxInst compares their colours: train it without."
            )

    def fill(self) -> None:
        """Compute what is not kept yet; processes that train together share the work."""
        wanted = [
            (path, size, direction, self._key(path, size, direction))
            for path, size in ((path, self._size(path)) for path in self.samples)
            for direction in self.directions
        ]
        if not wanted:
            return
        needed = sum(
            2 * sum(int(np.prod(shape)) for shape in self._shapes(size)) + 4
            for _, size, _, _ in wanted
        )
        if is_main_process():
            self.store.make_room((key for *_, key in wanted), needed)
        barrier()
        # Shared out before looking: meanwhile the others write.
        missing = [
            (path, size, direction)
            for path, size, direction, key in wanted[get_rank() :: get_world_size()]
            if not self.store.has(key, self._shapes(size))
        ]
        count = torch.tensor(len(missing))
        all_reduce(count)
        if is_main_process():
            print(
                f"features of {len(self.samples)} pictures in {len(self.directions)} directions "
                f"({needed / 2**20:.1f} MiB): {int(count)} to compute",
                flush=True,
            )
        for path, size, direction in missing:
            self.of(path, size, direction)
        barrier()

    def of(self, path: str, size: tuple[int, int], direction: str | None) -> list[Tensor]:
        """The features of one picture in a size and a direction."""
        key = self._key(path, size, direction)
        return self.store.get(key, self._shapes(size), lambda: self.compute(path, size, direction))

    @torch.no_grad()
    def compute(self, path: str, size: tuple[int, int], direction: str | None) -> list[Tensor]:
        """The features that the backbone computes for one picture alone.

        Raises:
            DatasetError: The picture cannot be read, or is not as large as its annotations say.
        """
        info, steps = self.samples[path]
        results: dict[str, Any] | None = dict(info)
        for step in steps:
            if results is None:
                raise DatasetError(f"{path} cannot be read as a picture.")
            results = step(results)
            if isinstance(step, LoadImageFromFile) and results is not None:
                found = results["img"].shape[:2]
                if found != (info["height"], info["width"]):
                    raise DatasetError(
                        f"{path} has {found[1]} x {found[0]} pixels, and its annotations say "
                        f"{info['width']} x {info['height']}."
                    )
        image = results["img"] if results else np.empty((0, 0, 3))
        if image.shape[:2] != size:
            raise UserError(
                f"--freeze knows {path} in {image.shape[:2]} pixels, and the pipeline makes {size}"
                " of it: it must resize pictures to one size and do no more than mirror them."
            )
        if axes := _DIRECTIONS[direction]:
            image = np.flip(image, axes)
        picture = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        inputs = self.preprocess({"inputs": [picture], "data_samples": None}, False)["inputs"]
        return [one[0] for one in self.backbone(inputs)]

    def give(self, samples: Sequence[Any]) -> None:
        """Have the model's next call take the features of a batch, and its blanks as they are."""
        self.backbone.give(self.batch(samples))
        preprocess = self.preprocess
        before = preprocess._channel_conversion, preprocess._enable_normalize
        preprocess._channel_conversion = preprocess._enable_normalize = False

        def restore(*_: Any) -> None:
            preprocess._channel_conversion, preprocess._enable_normalize = before
            handle.remove()

        handle = preprocess.register_forward_hook(restore)

    def batch(self, samples: Sequence[Any]) -> list[Tensor]:
        """The features of a batch, padded as its pictures would be."""
        device = next(self.backbone.parameters()).device
        infos = [sample.metainfo for sample in samples]
        sizes = [tuple(info["img_shape"][:2]) for info in infos]
        turned = [info.get("flip_direction") if info.get("flip") else None for info in infos]
        found = [
            self.of(info["img_path"], size, direction)
            for info, size, direction in zip(infos, sizes, turned, strict=True)
        ]
        height, width = (max(self._padded(size)[axis] for size in sizes) for axis in (0, 1))
        features = []
        for level, stride in enumerate(self.backbone.strides):
            shape = (-(-height // stride), -(-width // stride))
            ones = [one[level] for one in found]
            if any(one.shape[1:] != shape for one in ones):
                whole = self._beyond()[level].expand(len(ones), -1, *shape).clone()
                for place, one in zip(whole, ones, strict=True):
                    place[:, : one.shape[1], : one.shape[2]] = one.to(device)
            else:
                whole = torch.stack(ones).to(device).float()
            features.append(whole)
        return features

    @torch.no_grad()
    def _beyond(self) -> list[Tensor]:
        """The features of padding far from a picture, (C, 1, 1) per stage."""
        if self._blank is None:
            device = next(self.backbone.parameters()).device
            value = float(self.preprocess.pad_value)
            found = self.backbone(torch.full((1, 3, 2 * _FAR, 2 * _FAR), value, device=device))
            middles = [one.shape[-1] // 2 for one in found]
            self._blank = [
                one[0, :, m : m + 1, m : m + 1].clone()
                for one, m in zip(found, middles, strict=True)
            ]
        return self._blank

    def _size(self, path: str) -> tuple[int, int]:
        """(height, width) of a picture as the model gets it."""
        info, steps = self.samples[path]
        results = {"img": np.zeros((info["height"], info["width"]), np.uint8)}
        for step in steps:
            if isinstance(step, Resize):
                results = step({**results, "img_shape": results["img"].shape[:2]})
        return results["img"].shape[:2]

    def _padded(self, size: tuple[int, int]) -> tuple[int, ...]:
        whole = self.preprocess.pad_size_divisor
        return tuple(-(-side // whole) * whole for side in size)

    def _shapes(self, size: tuple[int, int]) -> list[tuple[int, ...]]:
        padded = self._padded(size)
        stages = zip(self.backbone.channels, self.backbone.strides, strict=True)
        return [(c, *(-(-side // stride) for side in padded)) for c, stride in stages]

    def _key(self, path: str, size: tuple[int, int], direction: str | None) -> str:
        if path not in self._pictures:
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
            self._pictures[path] = hashlib.sha256(content).digest()
        # How a picture is read and resized, as the transforms write themselves.
        how = [repr(step) for step in self.samples[path][1]]
        settings = repr((self._padded(size), size, direction, how))
        whole = self._state + self._pictures[path] + settings.encode()
        return hashlib.sha256(whole).hexdigest()
