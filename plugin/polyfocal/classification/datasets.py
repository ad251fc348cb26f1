"""The data set that a DataLoader reads."""

from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch.utils.data import Dataset

from polyfocal.data.cifar import Variant, load_images
from polyfocal.data.splits import held_out as choose_held_out
from polyfocal.mmengine.registry import DATASETS


@DATASETS.register_module()
class ImageDataset(Dataset):
    """A split of a data set with its variant, held in memory.

    Samples are dictionaries: ``inputs``, uint8 (3, H, W), and ``data_samples``, which has ``label``
    and ``sample_idx``, the place of the sample in the whole split, whatever part a variant takes.

    Args:
        root: folder, see :func:`polyfocal.data.cifar.load_images`; None for the digits.
        split: ``"train"``, ``"val"`` or ``"ood"``.
        held_out: True for the fifth of the split's variant that
            :func:`polyfocal.data.splits.held_out` chooses, False for the rest, None for all.
        variant: the keywords of :class:`polyfocal.data.cifar.Variant`.

    Attributes:
        data: the :class:`~polyfocal.data.cifar.LabelledImages`.
        metainfo: ``classes``.
    """

    def __init__(
        self, root: str | None, split: str, held_out: bool | None = None, **variant: Any
    ) -> None:
        self.data = Variant(**variant).apply(load_images(root, split), split)
        if held_out is not None:
            chosen = np.asarray(choose_held_out(self.data.ids.tolist()))
            self.data = self.data.take(np.flatnonzero(chosen == held_out))
        self.metainfo = {"classes": self.data.classes}
        self._images = torch.from_numpy(self.data.images).permute(0, 3, 1, 2).contiguous()
        # Made once: a training reads each sample in every epoch.
        self._samples = [
            BaseDataElement(metainfo={"sample_idx": place, "label": label})
            for place, label in zip(self.data.ids.tolist(), self.data.labels.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.data.labels)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """What is known about a sample without its picture: ``gt_label``, as in MMPretrain."""
        return {"gt_label": int(self.data.labels[index])}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": self._images[index], "data_samples": self._samples[index]}
