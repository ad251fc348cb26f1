"""The study tool, run as a person runs it, on few and small runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

ROOT = Path(__file__).parents[2]


def load(tool):
    spec = importlib.util.spec_from_file_location(f"tool_{tool}", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study_tool, train_tool, test_tool = load("study"), load("train"), load("test")


def run(*arguments, tool=study_tool):
    return tool.main([str(argument) for argument in arguments])


def rows(folder):
    lines = (folder / "table.md").read_text().splitlines()[2:]
    return {line.split("|")[1].strip(): line for line in lines}


def test_shortcut(tmp_path, capsys):
    names = ["shallow", "cross_entropy", "product_of_experts", "self_confidence_regularization"]
    options = ("shortcut", "--epochs", 6, "--seeds", 0, 1, "--work-dir", tmp_path)
    assert run(*options, "--only", *names[:2]) == 0
    capsys.readouterr()
    assert run(*options, "--only", *names) == 0
    out = capsys.readouterr().out
    started = re.findall(r"^\[\d/8\] (\w+), seed (\d)$", out, re.MULTILINE)
    assert started == [(name, seed) for seed in "01" for name in names[2:]], "the others are done"
    assert list(rows(tmp_path)) == names
    assert all(line.count("±") == 4 for line in rows(tmp_path).values())
    result = json.loads((tmp_path / "cross_entropy" / "seed_0" / "result.json").read_text())
    assert result["settings"]["variant"] == {"spurious": 0.95}
    assert "many" in result["measured"], "the shallow model's few pictures are its own"
    assert result["measured"]["top1"] > result["measured"]["ood_top1"] + 0.2, "the cue misleads"
    assert "Epoch(val)" in (tmp_path / "shallow" / "seed_1" / "console.log").read_text()
    assert "Epoch(val)" not in out and "Logging error" not in out


def test_long_tail(tmp_path, capsys):
    methods = study_tool.long_tail_methods(2)
    assert len(methods) == 12
    names = ["focal", "imbalanced_noised_top2", "ldam"]
    options = ("--epochs", 1, "--work-dir", tmp_path, "--imbalance", 10)
    assert run("long-tail", *options, "--only", *names) == 0
    assert list(rows(tmp_path)) == names
    assert "macro_top2" in (tmp_path / "table.md").read_text()
    # Other settings would make another table: they need another folder.
    assert run("long-tail", *options[:-1], 20, "--only", "focal") == 2
    assert "was measured with other settings (variant)" in capsys.readouterr().err


def test_detection(tmp_path):
    """Cross-entropy and the product of experts in RetinaNet, both splits measured."""
    options = ("--detection", "--epochs", 1, "--pictures", 8, "--work-dir", tmp_path)
    assert run("shortcut", *options, "--only", "cross_entropy", "product_of_experts") == 0
    result = json.loads((tmp_path / "product_of_experts/seed_0/result.json").read_text())
    assert {"bbox_mAP", "ood_bbox_mAP", "bbox_mAP_50"} <= set(result["measured"])
    assert (tmp_path / "data" / "seed_0" / "annotations" / "ood.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["long-tail", "--only", "away"], "--only away: the study has cross_entropy, focal"),
        (["shortcut", "--detection", "--data", "x"], "--detection makes its own pictures"),
        (["shortcut", "--strength", "2", "--only", "shallow"], "spurious=2.0 of the data"),
        (
            ["shortcut", "--only", "self_reweighting"],
            "self_reweighting needs the scores of shallow, .*: name both with --only",
        ),
        (["long-tail", "--data", "/away", "--only", "focal"], "wants /away"),
    ],
)
def test_refuses(arguments, sentence, tmp_path, capsys):
    assert run(*arguments, "--work-dir", tmp_path) == 2
    out, err = capsys.readouterr()
    assert re.search(sentence, err) and err.count("\n") == 1 and "Traceback" not in out + err


def test_train_and_test_tools(tmp_path, capsys):
    config = ROOT / "configs" / "classification" / "poly1_noisy.py"
    options = ("--demo", "--work-dir", tmp_path)
    assert run(config, *options, "--cfg-options", "train_cfg.max_epochs=1", tool=train_tool) == 0
    checkpoint = tmp_path / "epoch_1.pth"
    assert run(config, checkpoint, *options, tool=test_tool) == 0
    assert "macro_top5" in capsys.readouterr().out
    assert run(config, checkpoint, *options, "--tta", tool=test_tool) == 2
    assert "--tta is for detectors" in capsys.readouterr().err
