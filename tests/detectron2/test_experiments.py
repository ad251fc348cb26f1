"""A config on data: its schedule, its evaluators, and what Detectron2 makes of the files."""

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2_models")

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.modeling.meta_arch import PanopticFPN
from detectron2.structures import Boxes, Instances
from detectron2_models import CONFIGS
from PIL import Image
from prepared import prepare_detectron2

from polyfocal.coco import load_split
from polyfocal.detectron2.data import (
    CalibrationEvaluator,
    CocoEvaluator,
    count_objects,
    load_picture,
    number_from_1,
    register_split,
)
from polyfocal.detectron2.lazy_experiment import LazyExperiment
from polyfocal.detectron2.yaml_experiment import YamlExperiment
from polyfocal.errors import UserError

SIDE = 64
COCO_TRAIN = 117_266  # pictures with objects


def write(folder, annotations, split="train", count=4, classes=("a", "b"), encoding="utf-8"):
    """A data set of ``count`` grey pictures with these annotations, ids given in their order."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", (SIDE, SIDE), (90, 90, 90)).save(folder / "images" / f"{number}.png")
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(count)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, start=1)],
        "annotations": [
            {"id": n, "iscrowd": 0, "category_id": 1, "area": 100.0, **one}
            for n, one in enumerate(annotations)
        ],
    }
    file = folder / "annotations" / f"{split}.json"
    file.write_text(json.dumps(content), encoding=encoding)
    return file


def boxes(count=4, **more):
    return [{"image_id": n, "bbox": [5 + n, 5, 20, 20], **more} for n in range(count)]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, boxes(), split)
    return tmp_path


def solver(experiment):
    return experiment.cfg.SOLVER


def test_yaml_schedule_follows_the_overrides(folder):
    path = CONFIGS / "retinanet_poly1.yaml"
    plain = prepare_detectron2(path, data=folder)
    steps = round(90000 / COCO_TRAIN * 4)  # as many passes over 4 pictures
    assert (steps, 0) == (solver(plain).MAX_ITER, solver(plain).WARMUP_ITERS)
    for options, warm_up, milestones in (
        ("SOLVER.MAX_ITER 90", 1, (60, 80)),
        ("SOLVER.MAX_ITER 900", 10, (600, 800)),
        ("SOLVER.MAX_ITER 900 SOLVER.STEPS (700,)", 10, (700,)),
        ("SOLVER.MAX_ITER 900 SOLVER.WARMUP_ITERS 3", 3, (600, 800)),
        ("SOLVER.MAX_ITER 2", 0, (1,)),  # 1 and 2: none at the very end
    ):
        experiment = prepare_detectron2(path, data=folder, options=options.split())
        found = solver(experiment)
        assert (warm_up, milestones) == (found.WARMUP_ITERS, found.STEPS), options
        assert experiment.settings().eval_period == -(-found.MAX_ITER // 3)
        (note,) = [note for note in experiment.notes if "steps are" in note]
        assert note.startswith(f"{found.MAX_ITER} steps are {found.MAX_ITER * 4:g} passes over 4 ")
        assert "changes that" not in note
    given = prepare_detectron2(path, data=folder, options=["TEST.EVAL_PERIOD", "7"])
    assert given.settings().eval_period == 7
    assert any("SOLVER.MAX_ITER changes that" in note for note in given.notes)


def test_the_built_learning_rate_has_its_warm_up_and_steps(folder):
    """The rates of a training of 900 steps, as Detectron2 computes them."""
    options = ["SOLVER.MAX_ITER", "900", "SOLVER.WARMUP_METHOD", "constant"]
    experiment = prepare_detectron2(CONFIGS / "retinanet_poly1.yaml", data=folder, options=options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = experiment.build_schedule(optimizer)
    rates = []
    for _ in range(900):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in ((0, 1e-5), (9, 1e-5), (10, 0.01), (599, 0.01), (600, 1e-3), (800, 1e-4)):
        assert rates[step] == pytest.approx(rate), step


def test_lazy_schedule_follows_the_overrides(folder):
    path = CONFIGS / "retinanet_poly1.py"
    experiment = prepare_detectron2(path, data=folder, options=["train.max_iter=120"])
    settings = experiment.settings()
    assert (settings.max_iter, settings.eval_period, settings.checkpoint_period) == (120, 40, 10)
    options = ["train.max_iter=120", "train.eval_period=7", "train.checkpointer.period=5"]
    settings = prepare_detectron2(path, data=folder, options=options).settings()
    assert (settings.eval_period, settings.checkpoint_period) == (7, 5)


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [
        ("retinanet_poly1.py", ["dataloader.train.total_batch_size=4"], "optimizer.lr 0.0025"),
        ("retinanet_poly1.yaml", ["SOLVER.IMS_PER_BATCH", "4"], "SOLVER.BASE_LR 0.0025"),
    ],
)
def test_another_batch_keeps_the_passes_and_names_the_rate(folder, name, options, rate):
    experiment = prepare_detectron2(CONFIGS / name, data=folder, options=options)
    assert experiment.settings().max_iter == round(90000 * 16 / COCO_TRAIN)
    assert any(f"{rate} would be in proportion" in note for note in experiment.notes)
    key, _, value = rate.partition(" ")
    both = [*options, f"{key}={value}"] if name.endswith(".py") else [*options, key, value]
    experiment = prepare_detectron2(CONFIGS / name, data=folder, options=both)
    assert not any("in proportion" in note for note in experiment.notes)


def test_reference_world_size_scales_as_in_detectron2(folder):
    options = ["SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.MAX_ITER", "900"]
    experiment = prepare_detectron2(CONFIGS / "retinanet_poly1.yaml", data=folder, options=options)
    found = solver(experiment)
    assert (found.IMS_PER_BATCH, found.MAX_ITER, found.STEPS) == (2, 7200, (4800, 6400))
    assert pytest.approx(0.00125) == found.BASE_LR
    assert any("scaled to 1 processes" in note for note in experiment.notes)
    options[-1:] = ["900", "SOLVER.IMS_PER_BATCH", "10"]
    with pytest.raises(UserError, match="IMS_PER_BATCH 10: expected a multiple of .*SIZE, 8"):
        prepare_detectron2(CONFIGS / "retinanet_poly1.yaml", data=folder, options=options)


@pytest.mark.parametrize("key", ["TEST.AUG.ENABLED", "TEST.PRECISE_BN.ENABLED"])
def test_what_the_tool_does_not_do_is_refused(folder, key):
    with pytest.raises(UserError, match=f"{key} True, which this tool does not do"):
        prepare_detectron2(CONFIGS / "retinanet_poly1.yaml", data=folder, options=[key, "True"])


def test_half_a_yaml_change_is_refused(folder, tmp_path):
    base = CONFIGS / "base_retinanet.yaml"
    file = tmp_path / "half.yaml"
    loss = "{type: Poly1FocalLoss, epsilon: 1.0, use_sigmoid: true}"
    file.write_text(f"_BASE_: {base}\nMODEL: {{RETINANET: {{CLS_LOSS: {loss}}}}}\n")
    with pytest.raises(UserError, match="MODEL.RETINANET.CLS_LOSS would have no effect"):
        prepare_detectron2(file, data=folder)


def test_evaluators_of_a_config_are_kept(folder):
    experiment = LazyExperiment(CONFIGS / "retinanet_poly1.py")
    assert isinstance(evaluator_on(experiment, folder), CocoEvaluator)
    for settings, kind in (
        (dict(max_dets_per_image=300), CocoEvaluator),
        (dict(tasks=("bbox",), max_dets_per_image=200), COCOEvaluator),
    ):
        experiment = LazyExperiment(CONFIGS / "retinanet_poly1.py")
        experiment.cfg.dataloader.evaluator = L(COCOEvaluator)(dataset_name="x", **settings)
        evaluator = evaluator_on(experiment, folder)
        assert type(evaluator) is kind
        limit = evaluator.max_dets if kind is CocoEvaluator else evaluator._max_dets_per_image[2]
        assert limit == settings["max_dets_per_image"]
    assert evaluator._tasks == ("bbox",)


def test_several_evaluators_of_a_config_are_kept(folder):
    stock = L(COCOEvaluator)(dataset_name="x", tasks=("bbox",))
    ours = L(CalibrationEvaluator)(dataset_name="x", iou=0.7, max_dets=50)
    experiment = LazyExperiment(CONFIGS / "retinanet_poly1.py")
    experiment.cfg.dataloader.evaluator = [ours, stock, L(COCOEvaluator)(dataset_name="x")]
    first, second, third = evaluators_on(experiment, folder)
    assert (type(first), first.iou, first.max_dets) == (CalibrationEvaluator, 0.7, 50)
    assert (type(second), type(third)) == (COCOEvaluator, CocoEvaluator)
    assert first.dataset_name == second._metadata.name == str(folder / "annotations/val.json")

    experiment = LazyExperiment(CONFIGS / "retinanet_poly1.py")
    experiment.cfg.dataloader.evaluator = L(DatasetEvaluators)(evaluators=[stock])
    wrapper = evaluator_on(experiment, folder)
    number_from_1(wrapper)
    (inner,) = wrapper._evaluators
    assert min(inner._coco_api.anns) == 1


@pytest.mark.parametrize(("objects", "limit"), [(4, 37), (150, 200)])
def test_the_limit_of_detections_is_raised_only(tmp_path, objects, limit):
    """37 stays, unless a picture holds more than COCO's 100 objects."""
    for split in ("train", "val"):
        write(tmp_path, [{**one, "image_id": 0} for one in boxes(objects)], split)
    option = ["TEST.DETECTIONS_PER_IMAGE", "37"]
    file = tmp_path / "mine.yaml"
    base = CONFIGS / "retinanet_poly1.yaml"
    file.write_text(f"_BASE_: {base}\nTEST: {{DETECTIONS_PER_IMAGE: 37}}\n")
    experiment = prepare_detectron2(file, data=tmp_path)
    assert limit == experiment.cfg.TEST.DETECTIONS_PER_IMAGE
    ((_, (evaluator,)),) = experiment.build_evaluations().values()
    assert evaluator.max_dets == max(limit, 100)
    given = prepare_detectron2(base, data=tmp_path, options=option)
    assert given.cfg.TEST.DETECTIONS_PER_IMAGE == 37
    lazy = LazyExperiment(CONFIGS / "retinanet_poly1.py")
    lazy.cfg.model.max_detections_per_image = 37
    evaluators_on(lazy, tmp_path, max_dets=max(limit, 100))
    assert lazy.cfg.model.max_detections_per_image == limit


def evaluators_on(experiment, folder, max_dets=100):
    names = {split: register_split(load_split(folder, split)) for split in ("train", "val")}
    from polyfocal.detectron2.experiment import Data

    experiment.use_data(Data(**names, num_train=4, num_classes=2, max_dets=max_dets))
    ((name, (_, evaluators)),) = experiment.build_evaluations().items()
    assert name == names["val"]
    return evaluators


def evaluator_on(experiment, folder):
    (evaluator,) = evaluators_on(experiment, folder)
    return evaluator


def test_two_test_sets_are_both_evaluated(folder):
    names = [register_split(load_split(folder, split)) for split in ("train", "val")]
    experiment = YamlExperiment(CONFIGS / "retinanet_poly1.yaml")
    experiment.cfg.DATASETS.TEST = tuple(names)
    evaluations = experiment.build_evaluations()
    assert list(evaluations) == names
    assert [e.dataset_name for _, (e,) in evaluations.values()] == names


def test_keypoints_are_evaluated_beside_boxes(folder):
    name = register_split(load_split(folder, "val"))
    experiment = YamlExperiment(
        model_zoo.get_config_file("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")
    )
    experiment.cfg.DATASETS.TEST = (name,)
    ours, stock = experiment._evaluators(name)
    assert isinstance(ours, CocoEvaluator) and stock._tasks == ("keypoints",)


def test_the_tiny_profile_makes_a_panoptic_model_small():
    """Its semantic head has one width where other heads have a list."""
    path = model_zoo.get_config_file("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py")
    experiment = LazyExperiment(Path(path))
    experiment.use_tiny_profile(96)
    model = experiment.build_model()
    assert isinstance(model, PanopticFPN) and model.sem_seg_head.predictor.in_channels == 32
    assert model.roi_heads.box_predictor.cls_score.in_features == 256


def test_the_tiny_profile_keeps_other_augmentations():
    experiment = LazyExperiment(CONFIGS / "retinanet_poly1.py")
    mapper = experiment.cfg.dataloader.train.mapper
    mapper.augmentations.append(L(T.RandomBrightness)(intensity_min=0.9, intensity_max=1.1))
    experiment.use_tiny_profile(SIDE)
    kinds = [step._target_ for step in experiment.cfg.dataloader.train.mapper.augmentations]
    assert kinds == [T.ResizeShortestEdge, T.RandomFlip, T.RandomBrightness]


def perfect(evaluator, file):
    """What an evaluator says of detections that are the objects themselves."""
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    evaluator.reset()
    for image in content["images"]:
        objects = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        found = Instances((SIDE, SIDE))
        corners = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).view(-1, 4)
        corners[:, 2:] += corners[:, :2]
        found.pred_boxes = Boxes(corners)
        found.pred_classes = torch.tensor([one["category_id"] - 1 for one in objects])
        found.scores = torch.full((len(objects),), 0.9)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("first", [-2, -20])
def test_annotation_ids_below_0(tmp_path, first):
    objects = [{**one, "id": first + number} for number, one in enumerate(boxes())]
    file = write(tmp_path, objects, "val")
    name = register_split(load_split(tmp_path, "val"))
    count_objects(name)
    assert perfect(CocoEvaluator(name), file) == pytest.approx(100)
    stock = COCOEvaluator(name, ("bbox",))
    number_from_1(stock)
    assert perfect(stock, file) == pytest.approx(100)


@pytest.mark.parametrize("count", [1, 4])
def test_annotation_ids_from_0(tmp_path, count):
    file = write(tmp_path, boxes(count), "val", count)
    name = register_split(load_split(tmp_path, "val"))
    count_objects(name)  # fills in the metadata
    assert perfect(CocoEvaluator(name), file) == pytest.approx(100)
    stock = COCOEvaluator(name, ("bbox",))
    assert perfect(stock, file) < 90, "what Detectron2 does by itself"
    number_from_1(stock)
    assert perfect(stock, file) == pytest.approx(100)


def test_objects_are_those_that_detectron2_trains_on(tmp_path):
    write(
        tmp_path,
        [
            *boxes(3),
            {"image_id": 0, "bbox": [5, 5, 9, 9], "iscrowd": 1},
            {"image_id": 0, "bbox": [SIDE + 3, 5, 9, 9]},  # beside its picture
            {"image_id": 1, "bbox": [SIDE - 3, 5, 9, 9], "category_id": 2},  # partly beside it
            {"image_id": 2, "bbox": [5, 5, 0, 9], "category_id": 2},
            {"image_id": 2, "bbox": [5, 5, 9, 9], "ignore": 1},
            {"image_id": 3, "bbox": [5, 5, 9, 9], "iscrowd": 1},
        ],
        classes=("a", "b", "c"),
    )
    pictures, counts = count_objects(register_split(load_split(tmp_path, "train")))
    assert (pictures, dict(counts)) == (3, {"a": 3, "b": 1, "c": 0})


@pytest.mark.parametrize(
    "useless",
    [
        dict(iscrowd=1),
        dict(ignore=1),
        dict(bbox=[SIDE + 1, 1, 5, 5]),
        dict(bbox=[1, -9, 5, 5]),
        dict(bbox=[1, 1, 0, 5]),
    ],
    ids=str,
)
def test_a_data_set_without_an_object_to_train_on_is_refused(tmp_path, useless):
    write(tmp_path, boxes(**useless))
    write(tmp_path, boxes(), "val")
    with pytest.raises(UserError, match="nothing to (train on|learn)"):
        prepare_detectron2(CONFIGS / "retinanet_poly1.py", data=tmp_path)


def test_the_objects_are_named(folder):
    experiment = prepare_detectron2(CONFIGS / "retinanet_poly1.py", data=folder)
    assert "4 objects are trained on: a 4, b 0." in experiment.notes
    shared = "4 pictures are in train and in val: scores on val mean little."
    assert shared in experiment.notes


def test_a_byte_order_mark_and_missing_keys(tmp_path):
    file = write(tmp_path, boxes(), encoding="utf-8-sig")
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    for one in content["annotations"]:
        del one["iscrowd"], one["area"]
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    pictures, counts = count_objects(register_split(load_split(tmp_path, "train")))
    assert (pictures, counts["a"]) == (4, 4)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_picture_turned_by_its_exif_is_taken_as_detectron2_loads_it(tmp_path, kind):
    file = write(tmp_path, boxes(1), count=1)
    picture = Image.fromarray(np.full((SIDE, 2 * SIDE, 3), 90, np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "images" / f"0.{kind}", exif=exif.tobytes())
    assert load_picture(tmp_path / "images" / f"0.{kind}").shape == (2 * SIDE, SIDE, 3)
    content = json.loads(file.read_text())
    for (width, height), fits in (((SIDE, 2 * SIDE), True), ((2 * SIDE, SIDE), False)):
        content["images"][0].update(width=width, height=height, file_name=f"0.{kind}")
        file.write_text(json.dumps(content))
        if fits:
            load_split(tmp_path, "train", load_picture)
        else:
            with pytest.raises(UserError, match=f"has {SIDE}x{2 * SIDE} pixels"):
                load_split(tmp_path, "train", load_picture)


def test_a_picture_that_would_be_white_is_refused(tmp_path):
    write(tmp_path, boxes(1), count=1)
    dark = np.full((SIDE, SIDE), 3000, np.uint16)  # of 12 bits
    Image.fromarray(dark).save(tmp_path / "images" / "0.png")
    with pytest.raises(UserError, match="above 255 white.*convert it to PNG or JPEG of 8 bits"):
        load_split(tmp_path, "train", load_picture)


def uneven(folder):
    """Three objects of class a, one of b; a crowd and an ignored one do not count."""
    for split in ("train", "val"):
        few = boxes(3)
        few.append({"image_id": 3, "bbox": [9, 9, 20, 20], "category_id": 2})
        few.append({"image_id": 0, "bbox": [9, 9, 9, 9], "category_id": 2, "iscrowd": 1})
        few.append({"image_id": 1, "bbox": [9, 9, 9, 9], "category_id": 2, "ignore": 1})
        for one in few:
            x, y, w, h = one["bbox"]
            one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        write(folder, few, split)
    return folder


def test_class_weights_from_the_data_in_yaml(tmp_path):
    key = "MODEL.RETINANET.CLS_LOSS.class_weight"
    path, data = CONFIGS / "retinanet_poly1.yaml", uneven(tmp_path)
    experiment = prepare_detectron2(path, data=data, options=[key, "balanced"])
    assert experiment.cfg.MODEL.RETINANET.CLS_LOSS.class_weight == [0.666667, 2.0]
    assert "- 0.666667" in experiment.dump()
    assert f"{key} is balanced of the training data: a 0.667, b 2." in experiment.notes
    tested = prepare_detectron2(path, data=data, options=[key, "balanced"], train=False)
    assert tested.cfg.MODEL.RETINANET.CLS_LOSS.class_weight is None


def test_class_weights_of_a_box_head_have_a_background(tmp_path):
    data = uneven(tmp_path)
    key = "MODEL.ROI_BOX_HEAD.CLS_LOSS.class_weight"
    options = [key, "balanced"]
    found = prepare_detectron2(CONFIGS / "mask_rcnn_poly1.yaml", data=data, options=options)
    assert found.cfg.MODEL.ROI_BOX_HEAD.CLS_LOSS.class_weight == [0.666667, 2.0, 1.0]
    lazy = tmp_path / "lazy.py"
    lazy.write_text(
        "from detectron2.config import LazyConfig\n"
        f"cfg = LazyConfig.load({str(CONFIGS / 'mask_rcnn_poly1.py')!r})\n"
        "model, dataloader, optimizer = cfg.model, cfg.dataloader, cfg.optimizer\n"
        "lr_multiplier, train = cfg.lr_multiplier, cfg.train\n"
        "loss = model.roi_heads.box_predictor.cls_loss\n"
        "loss.class_weight = dict(method='effective', beta=0.5)\n"
    )
    found = prepare_detectron2(lazy, data=data)
    # Effective numbers 1.75 and 1 of three objects and one.
    weights = list(found.cfg.model.roi_heads.box_predictor.cls_loss.class_weight)
    assert weights == pytest.approx([2 / 2.75, 2 * 1.75 / 2.75, 1.0], abs=1e-5)
    assert "0.727273" in found.dump()


@pytest.mark.parametrize("flat", [dict(area=0), dict(bbox=[5, 5, 0.5, 0.5])], ids=str)
def test_what_detectron2_trains_on_and_mmdetection_does_not(tmp_path, flat):
    write(tmp_path, boxes(**flat))
    write(tmp_path, boxes(), "val")
    with pytest.raises(UserError, match="nothing to learn"):
        load_split(tmp_path, "train")
    notes = "\n".join(prepare_detectron2(CONFIGS / "retinanet_poly1.py", data=tmp_path).notes)
    assert "4 objects are trained on: a 4, b 0." in notes and "no use" not in notes


def test_class_weights_are_for_heads_of_classes(tmp_path):
    path, data = CONFIGS / "mask_rcnn_poly1.py", uneven(tmp_path)
    lazy = LazyExperiment(path)
    heads = {placed.place: placed.head for placed in lazy.losses()}
    assert heads["model.roi_heads.box_predictor.cls_loss"] == "box"
    assert set(heads.values()) <= {"box", "mask head", "proposal head"}
    key = "MODEL.RPN.CLS_LOSS"
    options = [key, "{'type': 'FocalLoss', 'use_sigmoid': True, 'class_weight': 'sqrt'}"]
    options += ["MODEL.PROPOSAL_GENERATOR.NAME", "PolyfocalRPN"]
    with pytest.raises(UserError, match="a proposal head does not tell classes apart"):
        prepare_detectron2(CONFIGS / "mask_rcnn_poly1.yaml", data=data, options=options)
