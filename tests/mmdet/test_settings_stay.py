"""With other data, a profile or the demo, what a config says otherwise stays as it was written."""

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from cells import CLASSES, cells, change
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmdet.registry import DATASETS, METRICS
from prepared import prepare_experiment

from polyfocal.errors import UserError
from polyfocal.mmdet.metrics import CocoMetric, check_names
from polyfocal.mmengine.configs import leaf_datasets, type_name, walk

RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"


@DATASETS.register_module(force=True)
class LabData(CocoDataset):
    """A user's data set."""


@METRICS.register_module(force=True)
class LabMetric(MMDetCocoMetric):
    """A user's metric."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return cells(tmp_path_factory.mktemp("data") / "cells", masks=True)


def prepare(tmp_path, text, data=None, base=RETINANET, **settings):
    path = tmp_path / "mine.py"
    path.write_text(f"_base_ = {base!r}\n{text}")
    return prepare_experiment(path, data=data, **settings)


def test_a_metrics_settings(tmp_path, data):
    text = (
        "val_evaluator = dict(max_dets=300, classwise=True, prefix='lab', outfile_prefix='kept')\n"
        "test_evaluator = dict(format_only=True, outfile_prefix='out')\n"
        "default_hooks = dict(checkpoint=dict(save_best='lab/bbox_WBC_precision'))"
    )
    cfg = prepare(tmp_path, text, data).config
    val, test = cfg.val_evaluator, cfg.test_evaluator
    assert (val.type, val.max_dets, val.classwise, val.prefix, val.outfile_prefix) == (
        "polyfocal.CocoMetric", 300, True, "lab", "kept",
    )  # fmt: skip
    assert val.ann_file == test.ann_file == str(data / "annotations/val.json")
    assert (test.format_only, test.outfile_prefix, "prefix" in test) == (True, "out", False)
    metric = METRICS.build(val)
    metric.dataset_meta = {"classes": CLASSES}
    check_names(cfg, [metric], CLASSES)
    names = metric.names(CLASSES)
    assert "lab/bbox_WBC_precision" in names and "lab/bbox_AR@300" in names


def test_several_metrics(tmp_path, data):
    text = (
        "val_evaluator = [\n"
        "    dict(type='CocoMetric', metric='bbox', prefix='boxes', max_dets=50),\n"
        "    dict(type='LabMetric', metric='segm', ann_file='lab.json', prefix='masks'),\n"
        "    dict(type='DumpDetResults', out_file_path='out.pkl'),\n"
        "    dict(type='CocoMetric', ann_file='lab.json', iou_thrs=[0.3, 0.5]),\n"
        "]"
    )
    experiment = prepare(tmp_path, text, data)
    boxes, masks, dump, loose = experiment.config.val_evaluator
    annotations = str(data / "annotations/val.json")
    assert (boxes.type, boxes.prefix, boxes.max_dets) == ("polyfocal.CocoMetric", "boxes", 50)
    assert (masks.type, masks.metric, masks.prefix) == ("LabMetric", "segm", "masks")
    assert boxes.ann_file == masks.ann_file == loose.ann_file == annotations
    assert dump == {"type": "DumpDetResults", "out_file_path": "out.pkl"}
    # polyfocal's counts at COCO's thresholds only: MMDetection's own stays.
    assert (loose.type, loose.iou_thrs) == ("CocoMetric", [0.3, 0.5])
    assert experiment.quality[0] == "segm_mAP" and not experiment.notes


def test_results_go_to_one_metric_of_several(tmp_path, data):
    text = "test_evaluator = [dict(type='VOCMetric', metric='mAP'), dict(type='CocoMetric')]"
    experiment = prepare(tmp_path, text, data)
    assert experiment.keep_detections("found.json") == []
    written = [node for node in walk(experiment.config.test_evaluator) if "outfile_prefix" in node]
    assert [type_name(node) for node in written] == ["CocoMetric"]
    assert written[0].outfile_prefix == "found"


def test_another_format_is_said(tmp_path, data):
    """VOC's config: 3 times a concatenation of two sets of XML files, and VOC's metric."""
    base = "mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py"
    experiment = prepare(tmp_path, "val_evaluator = dict(prefix='voc')", data, base=base)
    cfg = experiment.config
    assert cfg.train_dataloader.dataset.type == "RepeatDataset"
    assert cfg.train_dataloader.dataset.times == 3
    (leaf,) = leaf_datasets(cfg.train_dataloader.dataset)
    assert leaf.filter_cfg == {"filter_empty_gt": True, "min_size": 32, "bbox_min_size": 32}
    assert (type_name(cfg.val_evaluator), cfg.val_evaluator.prefix) == ("CocoMetric", "voc")
    assert cfg.val_evaluator.metric == ["bbox"]
    said = "\n".join(experiment.notes)
    assert "2 data sets stand side by side" in said
    assert "VOCDataset becomes CocoDataset" in said
    assert "VOCMetric becomes CocoMetric, without its eval_mode" in said


def test_wrappers_and_settings_of_a_data_set(tmp_path, data):
    text = (
        "train_dataloader = dict(batch_size=5, sampler=dict(type='InfiniteSampler'),\n"
        "    dataset=dict(\n"
        "    _delete_=True, type='ClassBalancedDataset', oversample_thr=0.5, dataset=dict(\n"
        "        type='LabData', ann_file='lab.json', data_prefix=dict(img='', depth='depth'),\n"
        "        filter_cfg=dict(min_size=7), indices=[0], backend_args=dict(backend='petrel'),\n"
        "        metainfo=dict(classes=('RBC', 'WBC', 'Platelets'), palette=[(1, 2, 3)] * 3),\n"
        "        pipeline=[dict(type='LoadImageFromFile', backend_args=dict(backend='petrel'))],\n"
        "    )))\n"
        "val_dataloader = dict(dataset=dict(metainfo=dict(classes=('cat', 'dog'))))\n"
    )
    experiment = prepare(tmp_path, text, data)
    cfg = experiment.config
    loader = cfg.train_dataloader
    assert (loader.batch_size, loader.sampler.type) == (5, "InfiniteSampler")
    assert (loader.dataset.type, loader.dataset.oversample_thr) == ("ClassBalancedDataset", 0.5)
    leaf = loader.dataset.dataset
    assert leaf.type == "LabData" and leaf.ann_file == str(data / "annotations/train.json")
    assert (leaf.filter_cfg, leaf.indices) == ({"min_size": 7}, [0])
    assert leaf.data_prefix == {"img": f"{data}/images/train/", "depth": "depth"}
    assert leaf.metainfo.palette == [(1, 2, 3)] * 3, "the classes are those of the files"
    assert leaf.backend_args is None and leaf.pipeline[0].backend_args is None, "a disk now"
    assert cfg.val_dataloader.dataset.metainfo.classes == CLASSES
    assert any("(cat, dog) give way to those of" in note for note in experiment.notes)


def test_side_by_side_inside_and_outside_of_wrappers(tmp_path, data):
    one = "dict(type='CocoDataset', ann_file='{0}.json', pipeline=[], indices=[{0}])"
    repeated = f"dict(type='RepeatDataset', times=4, dataset={one.format(1)})"
    text = (
        "train_dataloader = dict(dataset=dict(_delete_=True, type='ClassBalancedDataset',\n"
        "    oversample_thr=0.1, dataset=dict(type='ConcatDataset',\n"
        f"    datasets=[{repeated}, {one.format(2)}])))"
    )
    dataset = prepare(tmp_path, text, data).config.train_dataloader.dataset
    assert [dataset.type, dataset.dataset.type] == ["ClassBalancedDataset", "RepeatDataset"]
    assert dataset.dataset.times == 4 and dataset.dataset.dataset.indices == [1]


def test_limits_are_raised_only(tmp_path, tmp_path_factory):
    crowded = cells(tmp_path_factory.mktemp("crowded") / "cells", objects=130)
    for written, right in ((-1, -1), (100, 200), (500, 500)):
        text = (
            f"model = dict(test_cfg=dict(max_per_img={written}))\n"
            "val_evaluator = dict(max_dets=1000)"
        )
        cfg = prepare(tmp_path, text, crowded).config
        assert cfg.model.test_cfg.max_per_img == right
        assert (cfg.val_evaluator.max_dets, cfg.test_evaluator.max_dets) == (1000, 200)


def test_a_number_that_nobody_measures_is_refused_before_training(tmp_path, data):
    for text, sentence in {
        "default_hooks = dict(checkpoint=dict(save_best='coco/bbox_cat_precision'))": (
            "save_best='coco/bbox_cat_precision' of .*mine.py is not measured: expected one of "
            "coco/bbox_AR@1, .*coco/bbox_mAP_75"
        ),
        "custom_hooks = [dict(type='EarlyStoppingHook', monitor='coco/segm_mAP')]": (
            "monitor='coco/segm_mAP' of .* is not measured"
        ),
    }.items():
        cfg = prepare(tmp_path, text, data).config
        with pytest.raises(UserError, match=sentence):
            check_names(cfg, [METRICS.build(cfg.val_evaluator)], CLASSES)


def test_settings_of_mmdetections_metric(tmp_path, data):
    """RTMDet's config gives ``proposal_nums``, which mean COCO's customary limits."""
    base = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
    cfg = prepare(tmp_path, "", data, base=base).config
    assert tuple(cfg.val_evaluator.proposal_nums) == (100, 1, 10)
    assert isinstance(METRICS.build(cfg.val_evaluator), CocoMetric)
    with pytest.raises(UserError, match=r"proposal_nums=\(300, 1000\): write max_dets=1000"):
        CocoMetric(proposal_nums=(300, 1000))


def test_masks_are_asked_for_by_the_pipeline_too(tmp_path, tmp_path_factory):
    without = cells(tmp_path_factory.mktemp("plain") / "cells")
    base = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    with pytest.raises(UserError, match="needs masks"):
        prepare(tmp_path, "val_evaluator = dict(metric='bbox')", without, base=base)


def test_the_tiny_profile_keeps_readers_and_what_is_packed(tmp_path, data):
    text = (
        "train_pipeline = [\n"
        "    dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True),\n"
        "    dict(type='LoadAnnotations', with_bbox=True),\n"
        "    dict(type='LoadProposals', num_max_proposals=7),\n"
        "    dict(type='RandomChoice', transforms=[[dict(type='RandomFlip', prob=0.3)]]),\n"
        "    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'sample_idx')),\n"
        "]\n"
        "train_dataloader = dict(sampler=dict(_delete_=True, type='InfiniteSampler'),\n"
        "    dataset=dict(_delete_=True, type='MultiImageMixDataset',\n"
        "    pipeline=[dict(type='Mosaic')], dataset=dict(type='CocoDataset',\n"
        "    ann_file='lab.json', pipeline=train_pipeline)))\n"
        "custom_hooks = [\n"
        "    dict(type='YOLOXModeSwitchHook', num_last_epochs=2),\n"
        "    dict(type='PipelineSwitchHook', switch_epoch=2, switch_pipeline=train_pipeline),\n"
        "    dict(type='EMAHook'),\n"
        "]\n"
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=9, val_interval=3)\n"
        "default_hooks = dict(checkpoint=dict(by_epoch=False, interval=3))\n"
        "log_processor = dict(by_epoch=False)"
    )
    cfg = prepare(tmp_path, text, data, profile="tiny").config
    dataset = cfg.train_dataloader.dataset
    assert type_name(dataset) == "CocoDataset", "a mosaic is augmentation"
    assert [type_name(step) for step in dataset.pipeline] == [
        "LoadImageFromFile", "LoadProposals", "LoadAnnotations", "Resize", "RandomFlip",
        "PackDetInputs",
    ]  # fmt: skip
    assert dataset.pipeline[0].color_type == "unchanged"
    assert dataset.pipeline[4].prob == 0.3
    assert dataset.pipeline[5].meta_keys == ("img_id", "img_path", "sample_idx")
    assert [hook.type for hook in cfg.custom_hooks] == ["EMAHook"]
    # It counts in epochs, and an epoch has an end.
    assert cfg.train_cfg.max_epochs == 12 and cfg.train_dataloader.sampler.type == "DefaultSampler"
    assert cfg.default_hooks.checkpoint.by_epoch and cfg.log_processor.by_epoch


def test_pretrained_weights_in_a_list(tmp_path, data):
    inits = "[dict(type='Kaiming', layer='Conv2d'), dict(type='Pretrained', checkpoint='away')]"
    text = f"model = dict(neck=dict(init_cfg={inits}))"
    neck = prepare(tmp_path, text, data, profile="tiny").config.model.neck
    assert [init.type for init in neck.init_cfg] == ["Kaiming"]


def test_tta_and_pictures_of_a_plain_pipeline(tmp_path, data):
    text = "val_dataloader = dict(dataset=dict(pipeline=[dict(type='PackDetInputs')]))\n"
    text += "test_dataloader = val_dataloader\n"
    text += "default_hooks = dict(_delete_=True, checkpoint=dict(type='CheckpointHook'))"
    experiment = prepare(tmp_path, text + "\ntta_model = None\ntta_pipeline = None", data)
    experiment.use_tta()
    experiment.draw_all("shown")
    cfg = experiment.config
    (step,) = cfg.test_dataloader.dataset.pipeline
    assert {"img_id", "scale_factor", "flip"} <= set(step.transforms[1][0].meta_keys)
    assert cfg.default_hooks.visualization.test_out_dir == "shown"


def test_weights_that_a_config_starts_from(tmp_path, data):
    """A profile changes the model, which they do not fit; an option comes after the profile."""
    text = "load_from = 'lab.pth'"
    assert prepare(tmp_path, text, data).config.load_from == "lab.pth"
    experiment = prepare(tmp_path, text, data, profile="tiny")
    assert experiment.config.load_from is None
    assert any("load_from=lab.pth of the config is left out" in one for one in experiment.notes)
    options = {"load_from": "mine.pth"}
    cfg = prepare(tmp_path, text, data, profile="tiny", options=options).config
    assert cfg.load_from == "mine.pth"
    assert not any("load_from" in one for one in prepare(tmp_path, "", data, profile="tiny").notes)


def test_more_objects_than_queries(tmp_path):
    """Are said; and no model is asked for more detections than it has queries."""
    crowd = cells(tmp_path / "crowd", objects=120)
    said = "a picture holds up to 120 objects, and the model finds 100 at most, one for each query"
    for base, key in (
        ("mmdet::detr/detr_r50_8xb2-150e_coco.py", "num_queries"),
        ("mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py", "num_proposals"),
    ):
        experiment = prepare(tmp_path, "", crowd, base=base)
        assert any(said in note and key in note for note in experiment.notes)
        limits = [node.get("max_per_img", 0) for node in walk(experiment.config.model.test_cfg)]
        assert max(limits) <= 100
    base = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"  # 300 queries
    experiment = prepare(tmp_path, "", crowd, base=base)
    assert not any("for each query" in note for note in experiment.notes)
    assert experiment.config.model.test_cfg.max_per_img == 200


def test_limits_of_other_names_are_raised_too(tmp_path):
    crowd = cells(tmp_path / "crowd", objects=120)
    base = "mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py"
    experiment = prepare(tmp_path, "", crowd, base=base)
    assert experiment.config.model.test_cfg.topk == 200
    experiment.use_tta()
    assert experiment.config.model.tta_cfg.max_per_img == 200


def test_the_classes_of_a_model_of_masks(tmp_path):
    """All are things, as many as the data has, and each weighs what it weighed."""
    masks = cells(tmp_path / "masks", masks=True)
    base = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"
    cfg = prepare(tmp_path, "", masks, base=base).config
    for node in (cfg.model.panoptic_head, cfg.model.panoptic_fusion_head):
        assert (node.num_things_classes, node.num_stuff_classes) == (len(CLASSES), 0)
    assert cfg.model.panoptic_head.loss_cls.class_weight == [1.0] * len(CLASSES) + [0.1]
    weights = [2.0] + [1.0] * 79 + [0.1]
    text = f"model = dict(panoptic_head=dict(loss_cls=dict(class_weight={weights})))"
    with pytest.raises(UserError, match="different weights for 80 classes, and the data have 3"):
        prepare(tmp_path, text, masks, base=base)


def test_a_head_without_classes_is_refused(tmp_path, data):
    base = "mmdet::crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py"
    with pytest.raises(UserError, match=r"MultiInstanceRoIHead \(CrowdDet\), which knows no class"):
        prepare(tmp_path, "", data, base=base)


@pytest.mark.parametrize("kind", ["glip", "grounding_dino"])
def test_names_that_a_model_of_phrases_cannot_tell_apart(tmp_path, kind):
    base = {
        "glip": "mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py",
        "grounding_dino": "mmdet::grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py",
    }[kind]
    root = cells(tmp_path / "cells")
    prepare(tmp_path, "", root, base=base)

    def rename(content):
        names = ["Scratch (minor)", "dent", "scratch (major)"]
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name

    change(root, "train", rename)
    change(root, "val", rename)
    with pytest.raises(UserError, match=r"'Scratch \(minor\)' and 'scratch \(major\)' of .*val"):
        prepare(tmp_path, "", root, base=base)
    prepare(tmp_path, "", root)


def test_a_data_set_of_a_hook_is_said_to_stay(tmp_path, data):
    text = (
        "custom_hooks = [dict(type='polyfocal.AdaFocalHook', dataloader=dict(dataset=dict("
        "type='CocoDataset', data_root='lab/', ann_file='val.json')))]"
    )
    notes = prepare(tmp_path, text, data).notes
    assert "the data set of AdaFocalHook stays that of the config, lab/val.json." in notes


def test_run_lengths_in_the_pipeline_of_the_last_epochs(tmp_path, tmp_path_factory):
    from polyfocal.demo import DigitScenes, write_digit_scenes

    few = DigitScenes(num_train=3, num_val=2, size=64, digits=(1, 2), digit_size=(20, 40))
    scenes = write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", few)
    experiment = prepare(tmp_path, "", scenes, base="mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py")
    loads = [
        step
        for tree in (experiment.config.train_dataloader, experiment.config.custom_hooks)
        for step in walk(tree)
        if step.get("with_mask")
    ]
    assert len(loads) == 2 and all(step.poly2mask for step in loads)
    assert sum("poly2mask becomes True" in note for note in experiment.notes) == 1
