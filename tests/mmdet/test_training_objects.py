"""What a training will see of its data, asked of the data set; nothing at all is refused."""

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from cells import CLASSES, cells, change, spoil
from mmdet.registry import DATASETS
from mmengine.registry import DefaultScope
from prepared import prepare_experiment

from polyfocal.errors import UserError
from polyfocal.mmengine.objects import training_objects
from polyfocal.mmengine.runs import train

RETINANET = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"


def built(root, **settings):
    leaf = dict(
        type="CocoDataset",
        ann_file=str(root / "annotations/train.json"),
        data_prefix=dict(img=str(root / "images/train")),
        metainfo=dict(classes=CLASSES),
        pipeline=[],
    )
    return leaf | settings


def count(dataset):
    with DefaultScope.overwrite_default_scope("mmdet"):
        found = training_objects(DATASETS.build(dataset))
    return found.samples, found.counts


def test_what_the_data_set_leaves_out_is_not_counted(tmp_path):
    """Of 12 boxes: one ignored, a crowd, one outside, one flat, one too thin."""
    root = cells(tmp_path / "cells", objects=6, pictures=2)

    def alter(content):
        spoil(content)
        content["images"][1].update(width=31)

    change(root, "train", alter)
    left = {"RBC": 2, "WBC": 2, "Platelets": 3}
    assert count(built(root)) == (2, left)
    small = built(root, filter_cfg=dict(filter_empty_gt=True, min_size=32))
    assert count(small) == (1, {"RBC": 0, "WBC": 0, "Platelets": 1})
    assert count(built(root, indices=[1])) == (1, {"RBC": 2, "WBC": 2, "Platelets": 2})
    wrapped = dict(
        type="RepeatDataset",
        times=5,
        dataset=dict(type="ConcatDataset", datasets=[built(root), small]),
    )
    assert count(wrapped) == (3, {"RBC": 2, "WBC": 2, "Platelets": 4})


def all_ignored(content):
    for one in content["annotations"]:
        one["ignore"] = 1


def all_outside(content):
    for one in content["annotations"]:
        one["bbox"][0] += 1000


def all_small(content):
    for image in content["images"]:
        image.update(width=31, height=31)


@pytest.mark.parametrize("alter", [all_ignored, all_outside, all_small])
@pytest.mark.parametrize("filter_empty_gt", [True, False])
def test_nothing_to_train_on_is_refused(tmp_path, alter, filter_empty_gt):
    root = cells(tmp_path / "cells", size=(31, 31) if alter is all_small else (64, 48))
    change(root, "train", alter)
    (tmp_path / "mine.py").write_text(
        f"{RETINANET}"
        f"where = dict(ann_file='{root}/annotations/train.json', data_root='',\n"
        f"    filter_cfg=dict(filter_empty_gt={filter_empty_gt}, min_size=32),\n"
        f"    data_prefix=dict(img='{root}/images/train/'), metainfo=dict(classes={CLASSES}))\n"
        "train_dataloader = dict(num_workers=0, dataset=where)\n"
        "val_dataloader = dict(num_workers=0, dataset=where)\n"
        f"val_evaluator = dict(ann_file='{root}/annotations/val.json')\n"
        f"work_dir = '{tmp_path}/run'"
    )
    experiment = prepare_experiment(tmp_path / "mine.py", profile="tiny")
    with pytest.raises(UserError) as caught:
        train(experiment)
    assert str(caught.value).startswith(
        f"there is nothing to train on in {root}/annotations/train.json: the data set leaves out "
        "every picture or every object"
    )
    assert "'min_size': 32" in str(caught.value)
    assert not list((tmp_path / "run").glob("*.pth"))
