"""A classifier trains where MMEngine is and MMDetection and MMCV are not."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.util, runpy, sys

AWAY = ("mmdet", "mmcv", "mmdet3d")


class Away:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in AWAY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in AWAY else find(name, *more)
sys.meta_path.insert(0, Away())
runpy.run_path(sys.argv[1], run_name="tool")["main"](sys.argv[2:])
assert not [name for name in sys.modules if name.split(".")[0] in AWAY]
"""


def test_a_classifier_trains(tmp_path):
    config = ROOT / "configs" / "classification" / "poly1.py"
    options = ("--demo", "--work-dir", tmp_path, "--cfg-options", "train_cfg.max_epochs=1")
    command = [sys.executable, "-c", PROGRAM, ROOT / "tools" / "train.py", config, *options]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "macro_top1" in found.stdout and (tmp_path / "epoch_1.pth").is_file()
