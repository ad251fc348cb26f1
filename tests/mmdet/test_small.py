"""The small profile on a pretrained backbone, and trainings on its kept features."""

import copy
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import mmdet.utils
import numpy as np
import torch
from cells import cells, change
from lite0 import use_random_weights
from mmdet.registry import MODELS
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from PIL import Image
from prepared import prepare_experiment

from polyfocal.commands.train import main as train
from polyfocal.data.files import DatasetError
from polyfocal.data.unpickling import read_weights
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.efficientnet import EfficientNetLite0
from polyfocal.errors import UserError
from polyfocal.mmdet import frozen as frozen_module
from polyfocal.mmdet.frozen import FrozenFeaturesHook, _Reader
from polyfocal.mmengine.curvature import fixed_batches

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["train_dataloader.num_workers=0", "val_dataloader.num_workers=0"]


@pytest.fixture(autouse=True)
def weights(monkeypatch, tmp_path_factory):
    mmdet.utils.register_all_modules()
    return use_random_weights(monkeypatch, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    settings = DigitScenes(num_train=6, num_val=2, size=64, digits=(1, 2), digit_size=(20, 40))
    folder = write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", settings)
    return folder


def built(cfg):
    hub = MessageHub.get_current_instance()
    hub.update_info_dict(dict(iter=0, max_iters=10, epoch=0, max_epochs=1))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    return model


@pytest.mark.parametrize(
    "name", ["retinanet_poly1", "mask_rcnn_poly1", "deformable_detr_poly1", "rtmdet_s_poly1"]
)
def test_small_profile_trains_and_predicts(name, scenes, weights):
    cfg = prepare_experiment(CONFIGS / f"{name}.py", data=scenes, profile="small").config
    model = built(cfg)
    assert isinstance(model.backbone, EfficientNetLite0)
    stem = torch.load(weights, weights_only=True)["_conv_stem.weight"]
    assert torch.equal(model.backbone.stem[0].conv.weight, stem)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = {id(g["params"][0]): g["lr"] for g in optimizer.optimizer.param_groups}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = {name.split(".")[0]: groups[id(p)] for name, p in trained}
    assert rates["backbone"] == pytest.approx(3e-4) and rates["neck"] == pytest.approx(3e-3)

    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    before = copy.deepcopy(model.state_dict())
    log = model.train_step(batch, optimizer)
    assert log["loss"].isfinite() and log["loss"] > 0
    moved = {n for n, value in model.state_dict().items() if not value.equal(before[n])}
    parts = {".".join(name.split(".")[:3]) for name in moved if name.startswith("backbone.")}
    assert parts == {"backbone.stages.2", "backbone.stages.3"}
    assert not any("running" in name for name in moved)
    with torch.no_grad():
        loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
        sample, *_ = model.eval().test_step(next(iter(loader)))
    assert sample.pred_instances.bboxes.isfinite().all()


@pytest.mark.parametrize("name", ["retinanet_poly1", "deformable_detr_poly1"])
def test_kept_features_are_those_of_the_pictures(name, scenes, tmp_path):
    """Of a batch with the same draws of mirroring: the boxes, the padding, the losses."""
    frozen = prepare_experiment(
        CONFIGS / f"{name}.py", data=scenes, profile="small", freeze=True
    ).config
    plain = prepare_experiment(
        CONFIGS / f"{name}.py",
        data=scenes,
        profile="small",
        options={"model.backbone.frozen_stages": 4},
    ).config
    model = built(plain)
    built(frozen)
    batches = []
    for cfg in (plain, frozen):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        np.random.seed(3)
        torch.manual_seed(3)
        batches.append(next(iter(loader)))
    pictures, blanks = batches
    turned = [sample.metainfo["flip"] for sample in pictures["data_samples"]]
    assert turned == [sample.metainfo["flip"] for sample in blanks["data_samples"]]
    for one, other in zip(*(b["data_samples"] for b in batches), strict=True):
        boxes = [sample.gt_instances.bboxes.tensor for sample in (one, other)]
        assert torch.equal(*boxes)
    assert not any(picture.any() for picture in blanks["inputs"])

    dataset = Runner.build_dataloader(frozen.train_dataloader, seed=0).dataset
    reader = _Reader(FrozenFeaturesHook(str(tmp_path)).store, model, dataset)
    reader.fill()
    found = reader.batch(blanks["data_samples"])
    with torch.no_grad():
        inputs = model.data_preprocessor(copy.deepcopy(pictures), False)["inputs"]
        wanted = model.backbone(inputs)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        # One picture after another or together differ in the last bits, before they are rounded.
        torch.testing.assert_close(one, other, rtol=2**-10, atol=1e-4)
    kept = len(list(tmp_path.rglob("*.f16")))
    assert kept == 12, "six pictures and their mirror images"

    losses = []
    for batch in (pictures, blanks):
        torch.manual_seed(5)
        if batch is blanks:
            reader.give(batch["data_samples"])
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        losses.append(model(**data, mode="loss"))
    again = model.data_preprocessor(copy.deepcopy(pictures), False)["inputs"]
    assert torch.equal(again, inputs), "pictures are normalised as before"
    for key, value in losses[0].items():
        if "loss" in key:
            mine = losses[1][key]
            several = isinstance(value, list)
            for a, b in zip(value, mine, strict=True) if several else [(value, mine)]:
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_pictures_of_several_sizes_are_padded_with_what_padding_gives(tmp_path):
    """In a picture and far from it the features are those of the padded batch."""
    root = cells(tmp_path / "cells", pictures=2, size=(192, 192))

    def narrow(content):
        content["images"][1].update(width=64, height=64)

    change(root, "train", narrow)
    Image.new("RGB", (64, 64), "gray").save(root / "images" / "train" / "cell_1.png")
    config = CONFIGS / "retinanet_poly1.py"
    cfg = prepare_experiment(config, data=root, profile="small", freeze=True).config
    model = built(cfg)
    cfg.train_dataloader.batch_sampler = None
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    samples = next(iter(loader))["data_samples"]
    # Each is resized to the usual side, that of the larger one: it is a square of it.
    sizes = {sample.metainfo["img_shape"][:2] for sample in samples}
    assert sizes == {(192, 192)}
    for sample in samples:
        if sample.metainfo["ori_shape"] == (64, 64):
            sample.set_metainfo({"img_shape": (64, 64)})
    reader = _Reader(FrozenFeaturesHook(str(tmp_path / "kept")).store, model, loader.dataset)
    narrow_one = next(s for s in samples if s.metainfo["ori_shape"] == (64, 64))
    _, steps = reader.samples[narrow_one.metainfo["img_path"]]
    reader.samples[narrow_one.metainfo["img_path"]] = (
        reader.samples[narrow_one.metainfo["img_path"]][0],
        steps[:1],  # not resized
    )
    (finest, *_) = reader.batch(samples)
    place = samples.index(narrow_one)
    picture = torch.full((1, 3, 192, 192), 0.0)
    picture[..., :64, :64] = (128 - 127.5) / 127.5
    with torch.no_grad():
        (wanted, *_) = model.backbone(picture)
    for part in (slice(0, 8), slice(30, 36)):
        torch.testing.assert_close(
            finest[place][:, part, part], wanted[0][:, part, part], rtol=2**-10, atol=1e-4
        )


def test_a_frozen_training_leaves_a_detector_that_is_tested_on_pictures(
    scenes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(scenes), "--profile", "small"]
    options = ["--cfg-options", "train_cfg.max_epochs=2", "train_cfg.val_interval=2", *SHORT]
    config = str(CONFIGS / "retinanet_poly1.py")
    for computed in (12, 0):
        folder = str(tmp_path / f"run_{computed}")
        assert train([config, *data, "--freeze", "--work-dir", folder, *options]) == 0
        shown = capsys.readouterr().out
        # (24 x 16² + 40 x 8² + 112 x 4² + 320 x 2²) numbers of two bytes, and a checksum
        assert f"features of 6 pictures in 2 directions (0.3 MiB): {computed} to compute" in shown
        assert "the backbone is frozen" in shown
    first, second = (
        read_weights(tmp_path / f"run_{n}" / "epoch_2.pth")["state_dict"] for n in (12, 0)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    cfg = prepare_experiment(config, data=scenes, profile="small", train=False).config
    model = built(cfg)
    pretrained = copy.deepcopy(model.backbone.state_dict())
    model.load_state_dict(first)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, pretrained[name])
    assert list((tmp_path / "run_12" / "predictions").glob("*.png"))


def test_processes_share_what_is_to_compute(scenes, tmp_path, monkeypatch):
    """Each computes its half, also if the other has finished before it looks."""
    config = CONFIGS / "retinanet_poly1.py"
    cfg = prepare_experiment(config, data=scenes, profile="small", freeze=True).config
    model = built(cfg)
    dataset = Runner.build_dataloader(cfg.train_dataloader, seed=0).dataset
    monkeypatch.setattr(frozen_module, "get_world_size", lambda: 2)
    for rank, kept in ((0, 6), (1, 12)):
        monkeypatch.setattr(frozen_module, "get_rank", lambda rank=rank: rank)
        _Reader(FrozenFeaturesHook(str(tmp_path)).store, model, dataset).fill()
        assert len(list(tmp_path.rglob("*.f16"))) == kept


def test_features_belong_to_how_pictures_are_normalised(scenes, tmp_path):
    keys = []
    for name, value in (("bgr_to_rgb", True), ("bgr_to_rgb", False), ("mean", [127.50001] * 3)):
        options = {f"model.data_preprocessor.{name}": value}
        config = CONFIGS / "retinanet_poly1.py"
        cfg = prepare_experiment(
            config, data=scenes, profile="small", freeze=True, options=options
        ).config
        model = built(cfg)
        dataset = Runner.build_dataloader(cfg.train_dataloader, seed=0).dataset
        reader = _Reader(FrozenFeaturesHook(str(tmp_path)).store, model, dataset)
        path = dataset.get_data_info(0)["img_path"]
        keys.append(reader._key(path, (64, 64), None))
    assert len(set(keys)) == 3


def test_the_curvature_is_that_of_pictures_not_of_blanks(scenes):
    config, batches = CONFIGS / "retinanet_poly1.py", []
    for freeze in (False, True):
        cfg = prepare_experiment(config, data=scenes, profile="small", freeze=freeze).config
        built(cfg)
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        batches.append(fixed_batches(loader, 2))
    for plain, kept in zip(*batches, strict=True):
        for one, other in zip(plain["inputs"], kept["inputs"], strict=True):
            assert one.any() and torch.equal(one, other)
    assert not loader.dataset[0]["inputs"].any(), "a training goes on with blanks"


def test_a_trial_is_judged_on_features_too(scenes, tmp_path, monkeypatch):
    """Held-out pictures are computed once for all trials; what is measured is a number."""
    pytest.importorskip("optuna", reason="needs Optuna")
    from polyfocal.adapters import prepare
    from polyfocal.experiments.request import Request

    monkeypatch.chdir(tmp_path)
    options = {"train_dataloader.num_workers": 0, "val_dataloader.num_workers": 0}
    config = CONFIGS / "retinanet_poly1.py"
    request = Request(
        prepare, config, data=scenes, profile="small", freeze=True, options={**options}
    )
    experiment = request.prepare()
    experiment.hold_out(tmp_path / "split")
    experiment.use_epochs(1)
    measured = experiment.measure(tmp_path / "trial", seed=0)
    assert 0 <= measured["bbox_mAP"] <= 1
    console = (tmp_path / "trial" / "console.log").read_text()
    assert "features of 5 pictures in 2 directions" in console
    assert "features of 1 pictures in 1 directions" in console, "which is not mirrored"
    assert not (tmp_path / "trial" / "run" / "predictions").exists()
    kept = list((tmp_path / "work_dirs" / "features").rglob("*.f16"))
    assert len(kept) == 11, "of the sixth picture not the mirror image"


def test_freeze_needs_the_small_profile(scenes, capsys):
    config = str(CONFIGS / "retinanet_poly1.py")
    assert train([config, "--data", str(scenes), "--profile", "tiny", "--freeze"]) == 2
    assert "give --profile small" in capsys.readouterr().err


BIAS = dict(type="polyfocal.BiasHead", num_classes=3, num_anchors=9, sees="colour")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {
                "model.bbox_head.loss_cls": dict(
                    _delete_=True, type="polyfocal.DebiasedFocalLoss", use_sigmoid=True, bias=BIAS
                )
            },
            "--freeze reads no pictures, .* sees='colour'",
        ),
        ({"model.backbone.frozen_stages": 2}, "frozen_stages=2 of the backbone: .* expected 4"),
        (
            {"model.data_preprocessor.type": "BoxInstDataPreprocessor"},
            "BoxInst compares their colours",
        ),
    ],
)
def test_freeze_refuses_a_model_that_needs_pictures(scenes, tmp_path, options, message):
    """Their blanks would all have the same colour, and a part of the backbone no gradient."""
    cfg = prepare_experiment(
        CONFIGS / "retinanet_poly1.py", data=scenes, profile="small", freeze=True, options=options
    ).config
    model = built(cfg)
    dataset = Runner.build_dataloader(cfg.train_dataloader, seed=0).dataset
    with pytest.raises(UserError, match=message):
        _Reader(FrozenFeaturesHook(str(tmp_path)).store, model, dataset)


def test_a_config_may_say_where_features_are_kept_and_how_many(scenes, tmp_path):
    config = tmp_path / "mine.py"
    hook = dict(type="polyfocal.FrozenFeaturesHook", folder="elsewhere", limit_gb=50)
    config.write_text(
        f"_base_ = {str(CONFIGS / 'retinanet_poly1.py')!r}\ncustom_hooks = [{hook!r}]\n"
    )
    cfg = prepare_experiment(config, data=scenes, profile="small", freeze=True).config
    assert [dict(one) for one in cfg.custom_hooks] == [hook]


@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_condinst_keeps_the_size_of_the_masks_whose_parameters_it_predicts(
    scenes, tmp_path, profile
):
    config = tmp_path / "mine.py"
    config.write_text("_base_ = 'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py'\n")
    experiment = prepare_experiment(config, data=scenes, profile=profile)
    cfg = experiment.config
    # The config loads polygons, and these masks are run lengths: they would be left out.
    assert any("poly2mask becomes True" in note for note in experiment.notes)
    model = built(cfg)
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    log = model.train_step(batch, build_optim_wrapper(model, cfg.optim_wrapper))
    assert log["loss_mask"].isfinite() and log["loss_mask"] > 0


@pytest.mark.parametrize("name", ["classification/poly1"])
def test_small_is_for_pictures_with_boxes(name, capsys):
    assert train([str(CONFIGS / f"{name}.py"), "--demo", "--profile", "small"]) == 2
    assert "is for a classifier: take --profile tiny" in capsys.readouterr().err


def test_a_picture_of_another_size_than_its_annotations_is_refused(tmp_path):
    root = cells(tmp_path / "cells", pictures=1)
    cfg = prepare_experiment(
        CONFIGS / "retinanet_poly1.py", data=root, profile="small", freeze=True
    ).config
    model = built(cfg)
    dataset = Runner.build_dataloader(cfg.train_dataloader, seed=0).dataset
    path = dataset.get_data_info(0)["img_path"]
    Image.new("RGB", (32, 48)).save(path)
    reader = _Reader(FrozenFeaturesHook(str(tmp_path / "kept")).store, model, dataset)
    with pytest.raises(DatasetError, match="its annotations say 64 x 48"):
        reader.fill()
