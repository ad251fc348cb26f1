"""The train tool of Detectron2, run as a person runs it, on a handful of small pictures."""

import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_detectron2.py"
RETINANET = ROOT / "configs" / "detectron2" / "retinanet_poly1.py"
STOCK = ROOT / "configs" / "detectron2" / "retinanet_focal.py"
MASK_RCNN = ROOT / "configs" / "detectron2" / "mask_rcnn_poly1.py"
YAML = ROOT / "configs" / "detectron2" / "retinanet_cyclical.yaml"
FAST = ("dataloader.train.num_workers=0", "dataloader.test.num_workers=0")


def load_tool():
    spec = importlib.util.spec_from_file_location("tool_train_detectron2", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def run(config, *arguments):
    return tool.main(["--config-file", str(config), *(str(argument) for argument in arguments)])


def error_of(capsys, config, *arguments):
    """The one line that the failing tool prints."""
    assert run(config, *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


def test_without_detectron2_one_sentence_says_what_to_install():
    code = (
        "import sys; sys.modules['detectron2'] = None; sys.argv[0] = sys.argv[1]; del sys.argv[1];"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, TOOL, "--config-file", RETINANET, "--demo"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "plugin")},
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: polyfocal.detectron2 needs Detectron2")
    assert "INSTALL.md" in process.stderr and process.stderr.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit_:
        run(RETINANET, "--help")
    assert exit_.value.code == 0 and "examples:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    pytest.importorskip("detectron2_models")
    from polyfocal.demo import DigitScenes, write_digit_scenes

    settings = DigitScenes(num_train=6, num_val=3, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "digits", settings)


@pytest.fixture
def data(scenes):
    return ("--data", scenes, "--profile", "tiny")


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """The output directory of a RetinaNet trained for four steps."""
    out = tmp_path_factory.mktemp("trained")
    options = (*FAST, "train.max_iter=4", "train.log_period=2", f"train.output_dir={out}")
    assert run(RETINANET, "--data", scenes, "--profile", "tiny", *options) == 0
    return out


def test_training_leaves_what_it_promises(trained):
    assert {"model_final.pth", "last_checkpoint", "log.txt", "metrics.json"} <= set(
        os.listdir(trained)
    )
    log = (trained / "log.txt").read_text()
    assert "Poly1FocalLoss" in log and "sys.platform" in log, "config and environment"
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    assert any("loss_cls" in line and "num_pos_anchors" in line for line in lines)
    assert any("bbox/AP" in line and "bbox/AR@100" in line for line in lines)


def test_evaluates_a_checkpoint_and_prints_the_table(trained, data, tmp_path, capsys):
    options = (*FAST, f"train.output_dir={tmp_path}")
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    assert run(RETINANET, *data, "--eval-only", *options, weights) == 0
    out = capsys.readouterr().out
    assert re.search(r"AR@100\s*│\s*\d\.\d{3}", out) and "mAP by class" in out
    assert "Poly1FocalLoss" not in out, "the config is in the log, not on the console"
    assert run(RETINANET, *data, "--eval-only", "--resume", f"train.output_dir={trained}") == 0
    assert "last" not in capsys.readouterr().err


def test_stock_and_plugin_checkpoints_change_places(trained, data, tmp_path):
    options = (*FAST, "train.max_iter=1")
    weights = f"train.init_checkpoint={trained / 'model_final.pth'}"
    stock = tmp_path / "stock"
    assert run(STOCK, *data, *options, weights, f"train.output_dir={stock}") == 0
    back = f"train.init_checkpoint={stock / 'model_final.pth'}"
    assert run(RETINANET, *data, "--eval-only", back, f"train.output_dir={tmp_path}") == 0


def test_yaml_trains_the_cyclical_loss(data, tmp_path, capsys):
    options = ("SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", tmp_path)
    assert run(YAML, *data, *options) == 0
    assert "mAP by class" in capsys.readouterr().out
    assert (tmp_path / "model_final.pth").is_file()


def test_twins_and_another_training_are_told_apart(trained, data, tmp_path, capsys, scenes):
    out = f"train.output_dir={trained}"
    before = {file.name: file.read_bytes() for file in trained.iterdir() if file.is_file()}
    for option in ([], ["--resume"], ["--eval-only", "--resume"]):
        error = error_of(capsys, STOCK, *data, *option, *FAST, out)
        assert f"{trained} holds another training, of " in error and str(RETINANET) in error
        assert "give another train.output_dir" in error
    yaml = error_of(capsys, RETINANET.with_suffix(".yaml"), *data, "OUTPUT_DIR", trained)
    assert "holds another training" in yaml and "give another OUTPUT_DIR" in yaml
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(scenes, elsewhere)
    other_data = ("--data", elsewhere, "--profile", "tiny")
    assert "holds another training, on " in error_of(
        capsys, RETINANET, *other_data, "--resume", out
    )
    assert {f.name: f.read_bytes() for f in trained.iterdir() if f.is_file()} == before
    # The same config in another place is the same training.
    shutil.copy(STOCK, tmp_path)
    moved = shutil.copy(RETINANET, tmp_path)
    assert run(moved, *data, "--eval-only", "--resume", out) == 0


def test_two_trainings_in_one_folder_at_a_time_are_refused(data, tmp_path, capsys):
    from polyfocal.folders import own_folder

    code = (
        "import sys, pathlib, time; from polyfocal.folders import own_folder\n"
        "with own_folder(pathlib.Path(sys.argv[1]), 'x'): print('in', flush=True); time.sleep(99)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "plugin")},
    )
    try:
        assert process.stdout.readline() == b"in\n"
        error = error_of(capsys, RETINANET, *data, *FAST, f"train.output_dir={tmp_path}")
        assert f"in use by another training (process {process.pid} on " in error
        assert "give another train.output_dir" in error
    finally:
        process.kill()
        process.wait()
    with own_folder(tmp_path, "train.output_dir"):
        pass  # the lock ends with the process


def test_default_folders_of_twins_differ():
    pytest.importorskip("detectron2.config", reason="needs Detectron2, see docs/detectron2.md")
    from polyfocal.detectron2.experiment import default_output_dir

    folders = {
        default_output_dir("./output", RETINANET.with_suffix(suffix)) for suffix in (".py", ".yaml")
    }
    assert folders == {f"work_dirs/detectron2/retinanet_poly1{end}" for end in ("", "_yaml")}
    assert default_output_dir("mine", RETINANET) == "mine"


def test_a_new_start_forgets_what_a_resume_would_go_on_with(data, tmp_path, capsys):
    options = (*FAST, "train.max_iter=1", f"train.output_dir={tmp_path}")
    assert run(RETINANET, *data, *options) == 0
    last = tmp_path / "last_checkpoint"
    assert last.read_text() == "model_final.pth"
    # A new start that ends before its first checkpoint.
    broken = "dataloader.train.mapper.image_format=NONE"
    with pytest.raises(Exception, match="wrong mode"):
        run(RETINANET, *data, *options, broken)
    assert not last.exists() and (tmp_path / "model_final.pth").exists()
    assert run(RETINANET, *data, "--resume", *options) == 0
    assert "holds no checkpoint yet: this is a new start" in capsys.readouterr().out


def test_the_seed_is_that_of_the_first_weights_too(data, tmp_path):
    weights = []
    for number in range(2):
        out = tmp_path / str(number)
        assert run(RETINANET, *data, *FAST, "train.max_iter=1", f"train.output_dir={out}") == 0
        weights.append(torch.load(out / "model_final.pth")["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0, msg=name)


def test_masks_are_evaluated_too(data, tmp_path, capsys):
    options = (*FAST, "train.max_iter=1", f"train.output_dir={tmp_path}")
    assert run(MASK_RCNN, *data, *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("segm/AP" in line for line in lines)
    assert "segm" in capsys.readouterr().out


def test_killed_training_resumes(data, tmp_path, capsys):
    options = [*data, *FAST, "train.checkpointer.period=1", f"train.output_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, TOOL, "--config-file", RETINANET, *options, "train.max_iter=500"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT / "plugin")},
    )
    last = tmp_path / "last_checkpoint"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = int(re.search(r"model_(\d+)\.pth", last.read_text())[1])

    more = f"train.max_iter={step + 3}"
    arguments = [argument for argument in options if argument != "--resume"]
    arguments[4:4] = ["--resume"]
    assert run(RETINANET, *arguments, more) == 0
    assert f"Starting training from iteration {step + 1}" in (tmp_path / "log.txt").read_text()
    checkpoint = torch.load(tmp_path / "model_final.pth")
    assert checkpoint["iteration"] == step + 2

    # Nothing is left to train, but the result is still told.
    capsys.readouterr()
    assert run(RETINANET, *arguments, more) == 0
    assert "AR@100" in capsys.readouterr().out


def test_checkpoint_errors(trained, data, tmp_path, capsys):
    def error(config, file, *options):
        weights = (f"train.init_checkpoint={file}", f"train.output_dir={tmp_path / 'out'}")
        return error_of(capsys, config, *data, *options, *weights)

    sentence = error(MASK_RCNN, trained / "model_final.pth", "--eval-only")
    assert "model_final.pth is the checkpoint of another model: of the" in sentence
    assert "it holds backbone, head" in sentence
    assert "there is no checkpoint away.pth" in error(RETINANET, "away.pth")
    (tmp_path / "text.pth").write_text("not weights")
    assert "text.pth is not a checkpoint" in error(RETINANET, tmp_path / "text.pth")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    content = {"model": {"weight": torch.ones(1)}, "extra": Evil()}
    torch.save(content, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
    for name in ("evil.pth", "evil.pkl"):
        for option in ((), ("--eval-only",)):
            assert f"{name} was refused: it asks for " in error(RETINANET, tmp_path / name, *option)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    assert "--eval-only needs a checkpoint" in error_of(
        capsys, RETINANET, *data, "--eval-only", f"train.output_dir={tmp_path / 'out'}"
    )


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        (RETINANET, ["model.cls_loss.epsilon=-2"], "epsilon=-2: expected"),
        (RETINANET, ["model.cls_loss.gama=1"], "Poly1FocalLoss.*'gama'"),
        (RETINANET, ["model.head.prior=1"], "the model cannot be built: .*'prior'"),
        (RETINANET, ["modle.num_classes=1"], "modle.num_classes=1 does not fit .*no modle"),
        (RETINANET, ["train.max_iters=1"], "train.max_iters=1 does not fit .*max_iter, "),
        (RETINANET, ["train.max_iter=many"], "has 'many' as max_iter: expected a whole number"),
        (RETINANET, ["train.log_period=0"], "has 0 as log_period: expected a whole number >= 1"),
        (RETINANET, ["train.output_dir=/dev/null/x"], "/dev/null/x cannot be written"),
        (YAML, ["SOLVER.MAX_ITER", "-5"], "has -5 as max_iter"),
        (RETINANET, ["train.max_iter"], "is key=value, got 'train.max_iter'"),
        (RETINANET, ["optimizer.lrr=3"], "the optimizer cannot be built: .*lrr"),
        (RETINANET, ["train.max_iter=1", "--demo"], "--demo stands behind an override"),
        (RETINANET, ["--demo"], "--demo is the built-in data set and --data another one"),
        (YAML, ["SOLVER.MAX_ITERS", "1"], "SOLVER.MAX_ITERS 1 does not fit"),
        (YAML, ["SOLVER.MAX_ITER"], "KEY value pairs, got SOLVER.MAX_ITER"),
        (YAML, ["MODEL.RETINANET.CLS_LOSS.gama", "1"], "CyclicalFocalLoss has no keyword 'gama'"),
        ("away.py", [], "there is no config away.py"),
        (ROOT / "pyproject.toml", [], r"must end in \.py \(a LazyConfig\) or \.yaml"),
    ],
)
def test_bad_options(data, tmp_path, capsys, monkeypatch, config, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert re.search(sentence, error_of(capsys, config, *data, *arguments))
    assert not os.listdir(tmp_path), "nothing is left behind"


def test_config_that_is_no_training(data, tmp_path, capsys):
    for text, sentence in (
        ("model = dict()", "it has no 'dataloader'"),
        ("import away", "cannot be read as a config: ModuleNotFoundError"),
    ):
        (tmp_path / "config.py").write_text(text)
        assert sentence in error_of(capsys, tmp_path / "config.py", *data)


def test_data_without_masks(tmp_path, scenes, capsys):
    folder = tmp_path / "boxes"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").symlink_to(scenes / "images")
    for name in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"{name}.json").read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    sentence = error_of(capsys, MASK_RCNN, "--data", folder, "--profile", "tiny")
    assert "needs masks" in sentence and "retinanet_poly1.py" in sentence


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", "the class of every pixel"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py", "the class of every pixel"),
        ("Misc/semantic_R_50_FPN_1x.yaml", "the class of every pixel"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", "the keypoints of objects"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py", "the keypoints of objects"),
    ],
)
def test_models_that_need_more_than_a_folder_holds(name, what, data, tmp_path, capsys, monkeypatch):
    from detectron2 import model_zoo

    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, model_zoo.get_config_file(name), *data)
    assert f"trains {what} too" in error and "train_net.py" in error
    assert not os.listdir(tmp_path)


def test_no_coco(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for config in (RETINANET, YAML):
        error = error_of(capsys, config)
        assert "instances_train2017.json" in error and "--data DIR" in error and "--demo" in error
    assert not os.listdir(tmp_path), "nothing is left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_what_needs_a_gpu(data, tmp_path, capsys):
    out = f"train.output_dir={tmp_path / 'out'}"
    error = error_of(capsys, RETINANET, *data, "train.amp.enabled=True", out)
    assert "mixed precision needs a GPU" in error
    error = error_of(capsys, RETINANET, *data, "--num-gpus", 2, out)
    assert "--num-gpus 2: torch finds 0 here" in error
    assert not (tmp_path / "out").exists()
