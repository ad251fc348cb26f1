"""Our COCO data set against MMDetection's own."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

from mmcv.transforms import LoadImageFromFile
from mmdet.registry import DATASETS
from mmengine.registry import DefaultScope
from PIL import Image

import polyfocal.mmdet  # noqa: F401
from polyfocal.coco import load_split
from polyfocal.data.pictures import check_pictures
from polyfocal.mmdet.datasets import picture_loader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    common = {"bbox": [10, 10, 20, 20], "area": 400, "segmentation": square}
    content = {
        "images": [
            {"id": 5 - i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(3)
        ],
        "annotations": [
            {"id": i, "image_id": 5 - i % 3, "category_id": 7 - i % 2, "iscrowd": i == 4, **common}
            for i in range(6)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 6, "name": "dog"}],
    }
    content["annotations"][3]["bbox"] = [90, 10, 20, 20]
    for i in range(3):
        Image.new("RGB", (80, 60)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    return tmp_path


def samples(folder: Path, kind: str, file: str = "train.json") -> list[dict]:
    with DefaultScope.overwrite_default_scope("mmdet"):
        dataset = DATASETS.build(
            dict(
                type=kind,
                ann_file=str(folder / "annotations" / file),
                data_prefix=dict(img=f"{folder / 'images'}/"),
                metainfo=dict(classes=("cat", "dog")),
                filter_cfg=dict(filter_empty_gt=True, min_size=32),
            )
        )
    return [dataset.get_data_info(index) for index in range(len(dataset))]


def test_the_samples_are_mmdetections(folder: Path, capsys: pytest.CaptureFixture) -> None:
    ours = samples(folder, "polyfocal.CocoDataset")
    assert capsys.readouterr().out == ""
    assert ours == samples(folder, "CocoDataset") and len(ours) == 3
    assert [len(sample["instances"]) for sample in ours] == [1, 2, 2]


def test_what_is_missing_is_what_mmdetection_would_make_of_the_whole_file(folder: Path) -> None:
    whole = samples(folder, "CocoDataset")
    file = folder / "annotations" / "train.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        del annotation["area"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    split = load_split(folder, "train")
    assert len(split.notes) == 4  # no iscrowd, no area, an id of 0, an object outside
    assert samples(folder, "polyfocal.CocoDataset") == whole


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 80), "red").save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (80, 60)),
        ({"backend_args": {"backend": "petrel"}}, (80, 60)),  # where the pictures were
        ({"imdecode_backend": "pillow"}, (80, 60)),
        ({"color_type": "color_ignore_orientation"}, (60, 80)),
        ({"imdecode_backend": "pillow", "color_type": "unchanged"}, (60, 80)),
    ],
)
@pytest.mark.parametrize("kind", ["LoadImageFromFile", LoadImageFromFile])
def test_pictures_are_checked_as_a_config_loads_them(
    folder: Path, settings: dict, size: tuple[int, int], kind: object
) -> None:
    path = turned(folder / "images" / "0.jpg")
    load = picture_loader({"type": kind, **settings})
    found = check_pictures([path, path], [(80, 60), (60, 80)], load)
    assert [not one.problem for one in found] == [size == (80, 60), size == (60, 80)]
    (folder / "images" / "broken.png").write_bytes(b"GIF89a")
    for ignore_empty in (False, True):
        load = picture_loader({"type": kind, "ignore_empty": ignore_empty})
        (found,) = check_pictures([folder / "images" / "broken.png"], [(8, 6)], load)
        assert "cannot be read: it is not a picture of a known format" in found.problem
