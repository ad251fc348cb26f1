"""One run of a study: it goes on after an interruption, and several processes can share it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from polyfocal.mmdet.studies import train_and_measure
from polyfocal.mmengine.hooks import ExactResumeHook

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "classification" / "focal.py"
OPTIONS = {
    "train_cfg.max_epochs": 2,
    "train_cfg.val_interval": 2,
    "default_hooks.checkpoint.interval": 1,
}


def test_goes_on_only_with_the_config_it_was_started_with(tmp_path, monkeypatch):
    trained = []
    before = ExactResumeHook.before_train_epoch

    def count(hook, runner):
        trained.append(runner.epoch)
        before(hook, runner)

    monkeypatch.setattr(ExactResumeHook, "before_train_epoch", count)

    def measure(**more):
        trained.clear()
        options = {**OPTIONS, **more}
        return train_and_measure(CONFIG, tmp_path, seed=3, demo=True, options=options, resume=True)

    first = measure()
    assert trained == [0, 1] and 0 < first["top1"] < 1
    (tmp_path / "run" / "epoch_2.pth").unlink()
    (tmp_path / "run" / "last_checkpoint").unlink()
    assert measure() == first
    assert trained == [1], "the epoch after the last checkpoint"
    assert measure() == first
    assert trained == [], "only evaluated"
    other = measure(**{"model.loss.gamma": 5.0})
    assert trained == [0, 1] and other != first
    assert not list((tmp_path / "run").glob("*.tmp"))
    started = json.loads((tmp_path / "run" / "started.json").read_text())
    assert started["model"]["loss"]["gamma"] == 5.0


def test_two_processes_make_one_table(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tools" / "reproduce.py"), "topk_label_noise", "--launcher", "pytorch"]
    command += ["--demo", "--seeds", "1", "--epochs", "1", "--only", "cross_entropy", "focal"]
    work = tmp_path / "work"
    done = subprocess.run(
        [*command, "--work-dir", str(work)],
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    assert done.stdout.count("[2/2] focal, seed 0\n") == 1, "one process speaks"
    results = sorted(work.glob("*/seed_0/result.json"))
    assert [file.parts[-3] for file in results] == ["cross_entropy", "focal"]
    log = (work / "focal" / "seed_0" / "console.log").read_text()
    assert "[9/9]" in log, "1,077 pictures in batches of 64 by two processes"
    assert "2 of 3 runs are done" in (work / "table.md").read_text()
