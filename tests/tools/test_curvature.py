"""The curvature tool and the hooks, as a person uses them, on a handful of small pictures."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from PIL import Image

from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.losses.bias import write_scores

ROOT = Path(__file__).parents[2]
RETINANET = ROOT / "configs" / "retinanet_poly1.py"
FAST = (
    "--cfg-options",
    *("train_dataloader.batch_size=2", "train_dataloader.num_workers=0"),
    "train_dataloader.persistent_workers=False",
    *("val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False"),
)


def load(tool):
    spec = importlib.util.spec_from_file_location(f"tool_{tool}", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_tool, curvature_tool = load("train"), load("curvature")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, and the work directory of a RetinaNet trained with both hooks for two steps."""
    folder = tmp_path_factory.mktemp("curvature")
    settings = DigitScenes(num_train=4, num_val=1, size=64, digits=(1, 2), digit_size=(20, 40))
    scenes = write_digit_scenes(folder / "digits", settings)
    config = folder / "hooked.py"
    config.write_text(
        f"_base_ = {str(RETINANET)!r}\n"
        "custom_hooks = [\n"
        "    dict(type='polyfocal.CurvatureHook', steps=3, probes=2, batches=1),\n"
        "    dict(type='polyfocal.TracePenaltyHook', coefficient=1e-3),\n"
        "]\n"
    )
    arguments = [config, "--data", scenes, "--profile", "tiny", "--work-dir", folder / "work"]
    assert run(train_tool, *arguments, *FAST, "train_cfg.max_epochs=1") == 0
    return scenes, folder / "work"


def run(tool, *arguments):
    return tool.main([str(argument) for argument in arguments])


def test_hooks_in_a_detector(trained):
    _, work_dir = trained
    (scalars,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    (logged,) = [line for line in lines if "curvature/trace" in line]
    assert logged["curvature/eigenvalue_1"] > 0
    (log,) = work_dir.glob("*/*.log")
    assert "curvature after epoch 1 (125914 parameters" in log.read_text()


def soft_labels(scenes, folder):
    """Every object is of its class, and half of another one."""
    data = shutil.copytree(scenes, folder / "soft")
    for file in data.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        other = content["categories"][-1]["id"]
        for entry in content["annotations"]:
            entry["category_ids"] = [entry["category_id"], other]
            entry["category_scores"] = [1.0, 0.5]
        file.write_text(json.dumps(content))
    text = f"_base_ = {str(ROOT / 'configs' / 'retinanet_soft_labels.py')!r}\n"
    return text, "polyfocal.SoftLabelsHook", ("--data", data, "--profile", "tiny")


def bias_head(scenes, folder):
    text = f"""\
_base_ = {str(RETINANET)!r}
bias = dict(type="polyfocal.BiasHead", sees="colour", num_classes=80, num_anchors=9)
loss = dict(_delete_=True, type="polyfocal.DebiasedFocalLoss", use_sigmoid=True, bias=bias)
model = dict(bbox_head=dict(loss_cls=loss))
"""
    return text, "polyfocal.BiasHeadHook", ("--data", scenes, "--profile", "tiny")


def stored_scores(_, folder):
    torch.manual_seed(0)
    write_scores(folder / "scores.npz", list(range(1100)), torch.randn(1100, 10).log_softmax(1))
    text = f"""\
_base_ = {str(ROOT / "configs" / "classification" / "focal.py")!r}
bias = dict(type="polyfocal.StoredScores", file={str(folder / "scores.npz")!r})
model = dict(loss=dict(_delete_=True, type="polyfocal.ProductOfExpertsLoss", use_sigmoid=False,
                       bias=bias))
"""
    return text, "polyfocal.StoredScoresHook", ("--demo",)


def epochs_of_tood(scenes, folder):
    """Its first epochs have another loss."""
    text = f"""\
_base_ = {str(ROOT / "configs" / "tood_poly1.py")!r}
model = dict(train_cfg=dict(initial_epoch=1))
"""
    return text, None, ("--data", scenes, "--profile", "tiny")


@pytest.mark.parametrize("write", [soft_labels, bias_head, stored_scores, epochs_of_tood])
def test_the_tool_measures_the_loss_that_the_training_had(trained, tmp_path, write):
    text, needed, data = write(trained[0], tmp_path)
    config, work_dir, out = tmp_path / "config.py", tmp_path / "work", tmp_path / "c.json"
    last = dict(parameters="retina_cls|tood_cls|^head", steps=3, probes=2, batches=1, interval=2)
    hooks = [dict(type="polyfocal.CurvatureHook", **last)]
    if needed:
        hooks.insert(0, dict(type=needed))
    config.write_text(f"{text}custom_hooks = {hooks}\n")
    arguments = (*data, "--work-dir", work_dir)
    options = (*FAST, "train_cfg.max_epochs=2", "default_hooks.checkpoint.interval=1")
    assert run(train_tool, config, *arguments, *options) == 0
    (scalars,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    (logged,) = [line for line in lines if "curvature/trace" in line]
    few = ("--params", last["parameters"], "--steps", 3, "--probes", 2, "--batches", 1)
    checkpoint = work_dir / "epoch_2.pth"
    assert run(curvature_tool, config, checkpoint, *arguments, *few, "--out", out, *options) == 0
    numbers = json.loads(out.read_text())
    assert numbers["loss"] == pytest.approx(logged["curvature/loss"], rel=1e-5)
    assert numbers["trace"] == pytest.approx(logged["curvature/trace"], rel=1e-3)


def test_tool(trained, tmp_path, capsys):
    scenes, work_dir = trained
    data = ("--data", scenes, "--profile", "tiny", "--work-dir", tmp_path)
    out, plot = tmp_path / "c.json", tmp_path / "c.png"
    arguments = (RETINANET, work_dir / "epoch_1.pth", *data, "--params", "retina_cls")
    few = ("--batches", 1, "--probes", 4, "--top-k", 2, "--steps", 30)
    assert run(curvature_tool, *arguments, *few, "--out", out, "--plot", plot, *FAST) == 0
    numbers = json.loads(out.read_text())
    assert numbers["parameters"] == ["bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias"]
    assert numbers["size"] == 64 * 90 * 9 + 90
    first, second = numbers["eigenvalues"]
    assert first >= second and len(numbers["eigenvalue_errors"]) == 2
    density = numbers["density"]
    assert sum(density["weights"]) == pytest.approx(1)
    assert max(density["values"]) <= first * 1.001
    with Image.open(plot) as picture:
        assert picture.width > 500
    shown = capsys.readouterr().out
    assert "eigenvalue 2" in shown and f"{numbers['trace']:.5g}" in shown
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"c.json", "c.png"} | {
        path.name for path in tmp_path.glob("*.py")
    }
    # The same again is the same; another loss at the same weights is another surface.
    assert run(curvature_tool, *arguments, *few, "--out", out, *FAST) == 0
    again = json.loads(out.read_text())
    assert again["eigenvalues"] == numbers["eigenvalues"] and again["trace"] == numbers["trace"]
    other = (*FAST, "model.bbox_head.loss_cls.gamma=0.0")
    assert run(curvature_tool, *arguments, *few, "--out", out, *other) == 0
    assert json.loads(out.read_text())["loss"] > 2 * numbers["loss"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--params", "nowhere"], "has a name that matches 'nowhere'"),
        (["--batches", "0"], "batches=0"),
        (["--probes", "1"], "probes=1"),
        (["--top-k", "0"], "k=0"),
        (["--steps", "0"], "steps=0"),
        (["--out", "a.txt"], "--out takes a name that ends in .json, got a.txt"),
        (["--plot", "a.pdf"], "ends in .png or .svg"),
        (["--out", "nowhere/a.json"], "there is no folder nowhere"),
    ],
)
def test_bad_options(trained, tmp_path, capsys, options, sentence):
    scenes, work_dir = trained
    data = ("--data", scenes, "--profile", "tiny", "--work-dir", tmp_path)
    assert run(curvature_tool, RETINANET, work_dir / "epoch_1.pth", *data, *options, *FAST) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert sentence in err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        run(curvature_tool, "--help")
    assert exit_.value.code == 0 and "examples:" in capsys.readouterr().out
