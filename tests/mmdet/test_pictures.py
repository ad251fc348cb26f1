"""Pictures of predictions, as they are written."""

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("mmdet")

import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from PIL import Image

from polyfocal.mmdet.pictures import draw_predictions


class Pictures(list):
    metainfo: ClassVar[dict] = {"classes": ("cat",), "palette": [(255, 0, 0)]}
    paths: ClassVar[list] = []

    def get_data_info(self, index: int) -> dict:
        return {"img_path": self.paths[index]}


class Nothing(torch.nn.Module):
    """A model that finds nothing."""

    def test_step(self, batch: dict) -> list[DetDataSample]:
        return batch["samples"]


@pytest.mark.parametrize("truth", [True, False])
def test_pictures_of_one_name_in_two_folders_do_not_overwrite_each_other(
    tmp_path: Path, truth: bool
) -> None:
    """A pipeline need not pack the path, nor load the ground truth."""
    samples = Pictures()
    samples.paths = [
        str(tmp_path / name) for name in ("a/1.png", "b/1.png", "a/1_2.png", "c/1.jpg")
    ]
    for shade, name in enumerate(("a/1.png", "b/1.png", "a/1_2.png", "c/1.jpg")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (60, 40), 60 * shade).save(path)
        sample = DetDataSample()
        nothing = dict(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        sample.gt_instances = InstanceData(**(nothing if truth else {}))
        sample.pred_instances = InstanceData(**nothing, scores=torch.zeros(0))
        samples.append({"samples": sample})
    runner = SimpleNamespace(
        val_dataloader=SimpleNamespace(dataset=samples),
        work_dir=str(tmp_path),
        visualizer=DetLocalVisualizer(),
        model=Nothing(),
    )
    for _ in range(2):  # a second evaluation writes the same files
        folder = draw_predictions(runner)
        assert sorted(file.name for file in folder.iterdir()) == [
            *("1.png", "1_2.png", "1_2_2.png", "1_3.png")
        ]
    shades = [np.asarray(Image.open(folder / f"{n}.png"))[5, 5, 0] for n in ("1", "1_2", "1_2_2")]
    assert [round(int(shade) / 60) for shade in shades] == [0, 1, 2]
