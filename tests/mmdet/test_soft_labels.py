"""Objects of several classes: from annotations through the pipeline to the loss of a dense head."""

import json

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
import torch.nn.functional as F
from mmdet_models import batch, tiny_model
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from prepared import prepare_experiment

from polyfocal.coco import DatasetError, evaluate
from polyfocal.commands import train
from polyfocal.data.annotations import read_annotations
from polyfocal.errors import UserError
from polyfocal.mmdet.datasets import CocoDataset
from polyfocal.mmdet.soft_labels import use_soft_labels
from polyfocal.shipped import CONFIGS

CONFIG = CONFIGS / "retinanet_soft_labels.py"
# Plain binary cross-entropy, so that torch can be asked what is right.
BCE = dict(type="polyfocal.FocalLoss", use_sigmoid=True, gamma=0.0, alpha=None)
CATEGORIES = [{"id": 10, "name": "car"}, {"id": 20, "name": "taxi"}, {"id": 30, "name": "dog"}]
# Of the first picture; the fourth is left out by every data set.
OBJECTS = [
    {"category_id": 10, "bbox": [2, 2, 20, 20]},
    {"category_id": 20, "bbox": [30, 4, 24, 30], "category_ids": [20, 10]},
    {"category_id": 30, "bbox": [5, 34, 25, 25], "category_scores": [0.25, 0.0, 0.75]},
    {"category_id": 30, "bbox": [5, 5, 0, 0], "category_ids": [10, 30]},
    {
        "category_id": 30,
        "bbox": [34, 36, 20, 20],
        "category_ids": [30, 20],
        "category_scores": [0.75, 0.25],
    },
]
ROWS = [[1.0, 1.0, 0.0], [0.25, 0.0, 0.75], [0.0, 0.25, 0.75]]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        images = []
        for number in (1, 2):
            picture = np.full((64, 64, 3), 40 * number, np.uint8)
            Image.fromarray(picture).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        annotations = [
            {"image_id": image["id"], "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0, **one}
            for image in images
            for one in (OBJECTS if image["id"] == 1 else OBJECTS[2:3])
        ]
        for number, one in enumerate(annotations, start=1):
            one["id"] = number
        (folder / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


def data_set(folder, pipeline, **settings):
    with DefaultScope.overwrite_default_scope("mmdet"):
        return CocoDataset(
            ann_file=str(folder / "annotations" / "train.json"),
            data_prefix=dict(img=str(folder / "train")),
            metainfo=dict(classes=tuple(one["name"] for one in CATEGORIES)),
            pipeline=pipeline,
            **settings,
        )


def test_a_data_set_has_a_row_for_each_combination(folder):
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="PackDetInputs"),
    ]
    found = data_set(folder, pipeline, soft_labels=True)
    assert found.class_scores.tolist() == ROWS and found.class_scores.dtype == np.float32
    one, two = (found[index]["data_samples"].gt_instances for index in (0, 1))
    assert one.labels.tolist() == [0, 3 + 0, 3 + 1, 3 + 2] and two.labels.tolist() == [3 + 1]
    assert one.bboxes.tensor[1].tolist() == [30, 4, 54, 34]
    # What counts classes sees the main one; and without the option nothing is different.
    assert found.get_cat_ids(0) == [0, 1, 2, 2]
    plain = data_set(folder, pipeline)
    assert plain[0]["data_samples"].gt_instances.labels.tolist() == [0, 1, 2, 2]


def test_a_row_goes_with_its_object_through_what_drops_and_adds_objects(folder):
    mosaic = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
    ]
    inner = data_set(folder, mosaic, soft_labels=True)
    boxes = {3: (24, 30), 4: (25, 25), 5: (20, 20), 0: (20, 20)}  # sizes by label
    with DefaultScope.overwrite_default_scope("mmdet"):
        crop = Compose([dict(type="RandomCrop", crop_size=(40, 40), allow_negative_crop=True)])
        flip = Compose([dict(type="RandomFlip", prob=1.0)])
    np.random.seed(0)
    seen = set()
    for _ in range(20):
        sample = flip(crop(inner[0]))
        for box, label in zip(sample["gt_bboxes"].tensor, sample["gt_bboxes_labels"], strict=True):
            width, height = (box[2:] - box[:2]).tolist()
            assert width <= boxes[int(label)][0] and height <= boxes[int(label)][1]
            if (width, height) == boxes[int(label)]:
                seen.add(int(label))
    assert len(seen) > 1


@pytest.mark.parametrize("name", ["retina", "fcos", "atss"])
def test_the_loss_gets_the_row_of_each_object(name):
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = tiny_model(name, BCE).train()
    inputs, samples = batch(model)
    for sample in samples:  # each object is of another combination
        count = len(sample.gt_instances.labels)
        sample.gt_instances.labels = torch.arange(count) % 3
    given = []
    watch = model.bbox_head.loss_cls.register_forward_pre_hook(
        lambda loss, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    stock = model.loss(inputs, samples)
    watch.remove()
    # Of one class each, in other words, changes nothing.
    own = torch.eye(3)
    use_soft_labels(model.bbox_head, own)
    for sample in samples:
        sample.gt_instances.labels = sample.gt_instances.labels + 3
    same = model.loss(inputs, samples)
    for key, value in stock.items():
        torch.testing.assert_close(same[key], value)

    rows = torch.tensor([[1.0, 1.0, 0.0], [0.25, 0.0, 0.75], [0.5, 0.5, 0.5]])
    use_soft_labels(model.bbox_head, rows)
    found = model.loss(inputs, samples)
    total = sum(found["loss_cls"]) if isinstance(found["loss_cls"], list) else found["loss_cls"]
    targets = torch.cat([rows, torch.zeros(1, 3)])  # by label, of which 3 is the background
    expected = 0.0
    for (logits, labels, *weights), kwargs in given:
        assert (labels < 3).any() or name != "fcos"
        each = F.binary_cross_entropy_with_logits(logits, targets[labels], reduction="none")
        weight = weights[0].unsqueeze(1) if weights else 1.0
        expected += (each * weight).sum() / kwargs["avg_factor"]
    torch.testing.assert_close(total, expected)
    for key in stock.keys() - {"loss_cls"}:
        torch.testing.assert_close(found[key], stock[key])
    assert model.bbox_head.num_classes == 3 and not any("_target" in k for k in model.state_dict())


def test_the_train_tool_takes_such_data(folder, tmp_path, capsys):
    options = ["train_cfg.max_epochs=1", "default_hooks.logger.interval=1"]
    for part in ("train", "val"):
        options += [
            f"{part}_dataloader.num_workers=0",
            f"{part}_dataloader.persistent_workers=False",
        ]
    arguments = [CONFIG, "--data", folder, "--profile", "tiny", "--work-dir", tmp_path / "run"]
    assert train.main([*map(str, arguments), "--cfg-options", *options]) == 0
    assert (tmp_path / "run" / "epoch_1.pth").is_file()
    experiment = prepare_experiment(CONFIG, data=folder, profile="tiny")
    assert any("5 of 6 annotations" in note and "category_ids" in note for note in experiment.notes)


def test_what_cannot_take_soft_labels():
    rows = torch.rand(2, 3)
    with DefaultScope.overwrite_default_scope("mmdet"):
        retina = tiny_model("retina", BCE).bbox_head
        stock = tiny_model("retina").bbox_head
        dino = tiny_model("dino").bbox_head
    with pytest.raises(UserError, match="are for RetinaHead, FCOSHead, ATSSHead, .* is DINOHead"):
        use_soft_labels(dino, rows)
    with pytest.raises(UserError, match="and this is FocalLoss"):
        use_soft_labels(stock, rows)
    with pytest.raises(UserError, match="of 4 classes, and the head of 3"):
        use_soft_labels(retina, torch.rand(2, 4))
    with pytest.raises(UserError, match="this is NoneType"):
        use_soft_labels(None, rows)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"category_ids": []}, r"has category_ids \[\]; it must be a list of declared categories"),
        ({"category_ids": [10, 11]}, r"category_ids \[10, 11\]; it must be a list of declared"),
        ({"category_ids": [10, 10]}, "each once"),
        ({"category_ids": 10}, "category_ids 10; it must be a list"),
        ({"category_scores": [0.5, 0.5]}, "a list of 3 numbers from 0 to 1, one for each of the d"),
        ({"category_scores": [0.5, 0.5, 2]}, "category_scores .*2.; it must be"),
        ({"category_ids": [10], "category_scores": [0.5, 1]}, "list of 1 numbers .* of its categ"),
    ],
)
def test_bad_annotations(folder, entry, sentence):
    file = folder / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"][0].update(entry)
    file.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=sentence) as error:
        read_annotations(file)
    assert str(error.value).startswith("annotation 1 of ")


def test_an_evaluation_asks_for_each_label(folder):
    truth = folder / "annotations" / "val.json"

    def detection(image, category, box):
        return {"image_id": image, "category_id": category, "score": 0.9, "bbox": box}

    # In picture 1 a car, one that is a taxi too, one dog of two; in picture 2 a dog.
    right = [
        detection(1, 10, [2, 2, 20, 20]),
        detection(1, 20, [30, 4, 24, 30]),
        detection(1, 10, [30, 4, 24, 30]),
        detection(1, 30, [5, 34, 25, 25]),
        detection(1, 30, [34, 36, 20, 20]),
        detection(2, 30, [5, 34, 25, 25]),
    ]
    # The object without area is a car and a dog, which nobody finds: AP ends at the recall that is
    # reached, 2 of 3 cars and 3 of 4 dogs. Of 101 recalls, 67 and 76 are below that.
    found = evaluate(truth, right).per_class
    assert found == pytest.approx({"car": 67 / 101, "taxi": 1.0, "dog": 76 / 101})
    without = [one for one in right if (one["category_id"], one["bbox"][0]) != (10, 30)]
    assert evaluate(truth, without).per_class["car"] == pytest.approx(34 / 101)
