"""The train and test tools, run as a person runs them, on a handful of small pictures."""

import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from PIL import Image

from polyfocal.demo import DigitScenes, write_digit_scenes

ROOT = Path(__file__).parents[2]
RETINANET = str(ROOT / "configs" / "retinanet_poly1.py")
MASK_RCNN = str(ROOT / "configs" / "mask_rcnn_poly1.py")
FAST = (
    "--cfg-options",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
)


def load(tool):
    spec = importlib.util.spec_from_file_location(f"tool_{tool}", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_tool, test_tool = load("train"), load("test")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    settings = DigitScenes(num_train=6, num_val=3, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "digits", settings)


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """The work directory of a RetinaNet trained for two epochs of three steps."""
    work_dir = tmp_path_factory.mktemp("trained")
    arguments = ["--data", scenes, "--profile", "tiny", "--work-dir", work_dir]
    arguments += ["--log", "tensorboard"]
    assert run(train_tool, RETINANET, *arguments, *FAST, "train_cfg.max_epochs=2") == 0
    return work_dir


def run(tool, *arguments):
    return tool.main([str(argument) for argument in arguments])


def error_of(capsys, tool, *arguments):
    """The one line that a failing tool prints."""
    assert run(tool, *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


def test_training_leaves_what_it_promises(trained):
    assert {"epoch_1.pth", "epoch_2.pth", "last_checkpoint"} <= set(os.listdir(trained))
    (log,) = trained.glob("*/*.log")
    text = log.read_text()
    assert "Epoch(val) [2]" in text and "coco/bbox_AR@100" in text
    assert "model = dict(" in text, "the config is in the log"
    pictures = sorted((trained / "predictions").iterdir())
    assert len(pictures) == 3
    with Image.open(pictures[0]) as picture:
        assert picture.size == (2 * 448, 448), "ground truth and prediction, 64 pixels enlarged"
    assert len({picture.read_bytes() for picture in pictures}) == 3


def test_tensorboard_gets_ap_by_class_and_the_statistics_of_the_loss(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = trained.glob("*/vis_data/events.out.tfevents.*")
    reader = EventAccumulator(str(file.parent))
    reader.Reload()
    numbers = {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}
    (written,) = trained.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    (last,) = [line for line in lines if "coco/bbox_mAP" in line and line["step"] == 2]
    by_class = [name for name in last if re.fullmatch(r"coco/bbox_.+_precision", name)]
    assert len(by_class) >= 2
    for name in ["coco/bbox_mAP", "coco/bbox_AR@100", *by_class]:
        assert numbers[name][-1].step == 2
        assert numbers[name][-1].value == pytest.approx(last[name], rel=1e-6)


def test_console_has_the_table_and_no_dumps(trained, scenes, capsys):
    arguments = (RETINANET, trained / "epoch_2.pth", "--data", scenes, "--profile", "tiny")
    config = (trained / Path(RETINANET).name).read_bytes()
    other = "model.bbox_head.loss_cls.epsilon=0.25"
    assert run(test_tool, *arguments, "--work-dir", trained, *FAST, other) == 0
    assert (trained / Path(RETINANET).name).read_bytes() == config, "the training's, not the test's"
    out = capsys.readouterr().out
    assert re.search(r"AR@100\s*│\s*\d\.\d{3}", out) and "mAP by class" in out
    for noise in (
        "model = dict(",
        "System environment",
        "Hooks will be executed",
        "creating index",
    ):
        assert noise not in out


def test_same_seed_same_weights(trained, scenes, tmp_path):
    arguments = ["--data", scenes, "--profile", "tiny", "--work-dir", tmp_path, *FAST]
    assert run(train_tool, RETINANET, "--seed", 0, *arguments, "train_cfg.max_epochs=2") == 0
    first, again = (
        torch.load(folder / "epoch_2.pth")["state_dict"]["bbox_head.retina_cls.weight"]
        for folder in (trained, tmp_path)
    )
    assert torch.equal(first, again)


def test_killed_training_resumes(scenes, tmp_path, capsys):
    arguments = [
        RETINANET,
        "--data",
        str(scenes),
        "--profile",
        "tiny",
        "--work-dir",
        str(tmp_path),
        *FAST,
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train.py"), *arguments, "train_cfg.max_epochs=500"],
        stdout=subprocess.DEVNULL,
    )
    last = tmp_path / "last_checkpoint"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    epoch = int(re.search(r"epoch_(\d+)\.pth", last.read_text())[1])

    assert run(train_tool, *arguments, f"train_cfg.max_epochs={epoch + 1}", "--resume") == 0
    assert f"Epoch(train) [{epoch + 1}]" in capsys.readouterr().out
    (new_log,) = [log for log in tmp_path.glob("*/*.log") if "resumed epoch" in log.read_text()]
    assert f"resumed epoch: {epoch}, iter: {3 * epoch}" in new_log.read_text()
    checkpoint = torch.load(tmp_path / f"epoch_{epoch + 1}.pth")
    assert checkpoint["meta"]["iter"] == 3 * (epoch + 1)

    # Nothing is left to train, but the result is still told.
    assert run(train_tool, *arguments, f"train_cfg.max_epochs={epoch + 1}", "--resume") == 0
    assert "AR@100" in capsys.readouterr().out


def test_keeps_and_draws_detections(trained, scenes, tmp_path):
    arguments = (RETINANET, trained / "epoch_2.pth", "--data", scenes, "--profile", "tiny")
    low = (*FAST, "model.test_cfg.score_thr=0.0")
    shown = tmp_path / "shown"
    out = tmp_path / "results.json"
    assert (
        run(test_tool, *arguments, "--work-dir", tmp_path, "--out", out, "--show-dir", shown, *low)
        == 0
    )
    boxes = json.loads((tmp_path / "results.bbox.json").read_text())
    assert {box["category_id"] for box in boxes} <= set(range(1, 11))
    assert {box["image_id"] for box in boxes} == {1, 2, 3}
    assert len(list(shown.iterdir())) == 3

    assert (
        run(test_tool, *arguments, "--work-dir", tmp_path, "--out", tmp_path / "r.pkl", *low) == 0
    )
    with open(tmp_path / "r.pkl", "rb") as file:
        samples = pickle.load(file)
    assert len(samples) == 3
    assert sum(len(sample["pred_instances"]["scores"]) for sample in samples) == len(boxes)


def test_test_time_augmentation(trained, scenes, tmp_path):
    arguments = (RETINANET, trained / "epoch_2.pth", "--data", scenes, "--profile", "tiny")
    assert run(test_tool, *arguments, "--tta", "--work-dir", tmp_path, *FAST) == 0


def test_checkpoint_errors(trained, scenes, tmp_path, capsys, monkeypatch):
    data = ("--data", scenes, "--profile", "tiny", "--work-dir", tmp_path)
    weights = trained / "epoch_2.pth"
    error = error_of(capsys, test_tool, MASK_RCNN, weights, *data)
    assert "epoch_2.pth is the checkpoint of another model: of the" in error
    assert "it holds backbone, neck, bbox_head and was trained for 10 classes" in error
    assert "there is no checkpoint away.pth" in error_of(
        capsys, test_tool, RETINANET, "away.pth", *data
    )
    error = error_of(capsys, train_tool, RETINANET, "--resume", "away.pth", *data)
    assert "there is no checkpoint away.pth" in error

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {"weight": torch.ones(1)}, "extra": Evil()}, tmp_path / "evil.pth")
    for tool, option in (
        (test_tool, ()),
        (train_tool, ("--resume",)),
        (train_tool, ("--load-from",)),
    ):
        error = error_of(capsys, tool, RETINANET, *option, tmp_path / "evil.pth", *data)
        assert "evil.pth was refused: it asks for posix.mkdir" in error
    pretrained = (
        "model.init_cfg.type=Pretrained",
        f"model.init_cfg.checkpoint={tmp_path}/evil.pth",
    )
    error = error_of(capsys, train_tool, RETINANET, *data, "--cfg-options", *pretrained)
    assert "evil.pth was refused: it asks for posix.mkdir" in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cfg-options", "model.bbox_head.loss_cls.epsilon=-2"], r"epsilon.*-2"),
        (["--cfg-options", "model.bbox_head.loss_cls.gamma=-1"], r"gamma.*-1"),
        (["--cfg-options", "model.bbox_head.loss_cls.gama=1"], r"Poly1FocalLoss.*'gama'"),
        (["--cfg-options", "model.bbox_hed.num_classes=1"], r"'bbox_hed'"),
        (
            ["--cfg-options", "train_cfg.max_epoch=3"],
            r"the training loop cannot be built: .*'max_epoch'",
        ),
        (
            ["--cfg-options", "optim_wrapper.optimizer.lrr=3"],
            "the optimizer cannot be built: .*lrr",
        ),
        (["--cfg-options", "randomness.seed=-1"], "seed is -1: expected a whole number from 0"),
        (["--resume", "--load-from", "a.pth"], "--resume and --load-from"),
        (["--demo"], "--demo is the built-in data set and --data another one"),
    ],
)
def test_bad_options(scenes, tmp_path, capsys, arguments, sentence):
    data = ("--data", scenes, "--profile", "tiny", "--work-dir", tmp_path)
    error = error_of(capsys, train_tool, RETINANET, *data, *arguments)
    assert re.search(sentence, error)


def test_no_coco(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, train_tool, RETINANET)
    assert "wants data/coco/annotations/instances_train2017.json" in error
    assert "--data DIR" in error and "--demo" in error
    assert not os.listdir(tmp_path), "nothing is left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_what_needs_a_gpu(scenes, tmp_path, capsys):
    data = ("--data", scenes, "--profile", "tiny", "--work-dir", tmp_path / "wd")
    assert "--amp needs a GPU" in error_of(capsys, train_tool, RETINANET, "--amp", *data)
    error = error_of(capsys, train_tool, RETINANET, "--launcher", "slurm", *data)
    assert "one process on each GPU, and torch finds none" in error
    assert not (tmp_path / "wd").exists()


def test_launcher_without_torchrun(scenes, tmp_path, capsys):
    data = ("--data", scenes, "--profile", "tiny", "--work-dir", tmp_path / "wd")
    error = error_of(capsys, train_tool, RETINANET, "--launcher", "pytorch", *data)
    assert "torchrun starts, as tools/dist_train.sh" in error
    assert not (tmp_path / "wd").exists()


def test_usage_errors(capsys):
    for tool, arguments in ((train_tool, [RETINANET]), (test_tool, [RETINANET, "a.pth"])):
        with pytest.raises(SystemExit) as exit_:
            run(tool, *arguments, "--cfg-options", "train_cfg.max_epochs")
        assert exit_.value.code == 2
        assert "--cfg-options takes KEY=VALUE, got train_cfg.max_epochs" in capsys.readouterr().err
        with pytest.raises(SystemExit) as exit_:
            run(tool, "--help")
        assert exit_.value.code == 0 and "examples:" in capsys.readouterr().out
