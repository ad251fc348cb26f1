"""The train and test tools on a classifier."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

ROOT = Path(__file__).parents[2]


def load(tool):
    spec = importlib.util.spec_from_file_location(f"tool_{tool}", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, tool):
    return load(tool).main([str(argument) for argument in arguments])


def test_train_and_test_tools(tmp_path, capsys):
    config = ROOT / "configs" / "classification" / "poly1_noisy.py"
    options = ("--demo", "--work-dir", tmp_path)
    assert run(config, *options, "--cfg-options", "train_cfg.max_epochs=1", tool="train") == 0
    checkpoint = tmp_path / "epoch_1.pth"
    assert run(config, checkpoint, *options, tool="test") == 0
    assert "macro_top5" in capsys.readouterr().out
    assert run(config, checkpoint, *options, "--tta", tool="test") == 2
    assert "--tta is for detectors" in capsys.readouterr().err
