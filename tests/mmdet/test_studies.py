"""One run of a study: it goes on after an interruption, and several processes can share it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from polyfocal.adapters import prepare
from polyfocal.errors import UserError
from polyfocal.experiments.request import Request
from polyfocal.mmengine.configs import merge_options, read_config
from polyfocal.mmengine.hooks import ExactResumeHook
from polyfocal.mmengine.search import losses_of
from polyfocal.mmengine.studies import loss_options

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
        experiment = Request(prepare, CONFIG, demo=True, options=options).prepare()
        return experiment.measure(tmp_path, seed=3, resume=True)

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


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ("retinanet_focal", ["model.bbox_head.loss_cls"]),
        ("mask_rcnn_ce", ["model.roi_head.bbox_head.loss_cls"]),
        (
            "cascade_mask_rcnn_poly1",
            [f"model.roi_head.bbox_head.{stage}.loss_cls" for stage in range(3)],
        ),
        ("classification/focal", ["model.loss"]),
    ],
)
def test_a_loss_in_the_place_of_the_configs(config, places):
    """In every head, with the weight that the loss had; or other settings of the same loss."""
    file = ROOT / "configs" / f"{config}.py"
    before = read_config(file)
    assert list(losses_of(before.model)) == places
    sigmoid = config == "retinanet_focal"
    new = {"type": "polyfocal.FocalLoss", "use_sigmoid": sigmoid, "gamma": 5.0, "alpha": None}
    for loss in (new, {"gamma": 3.0}):
        cfg = read_config(file)
        merge_options(cfg, loss_options(file, loss))
        for place, old in losses_of(before.model).items():
            kept = {"loss_weight": old.loss_weight} if "loss_weight" in old else {}
            wanted = {**kept, **new} if loss is new else {**old, **loss}
            assert losses_of(cfg.model)[place].to_dict() == wanted
        for one in losses_of(cfg.model).values():
            one.clear()
        rest = read_config(file)
        for one in losses_of(rest.model).values():
            one.clear()
        assert cfg.model == rest.model, "and nothing else has changed"
    with pytest.raises(UserError, match=f"{places[0]} of .* has use_sigmoid={sigmoid}, and the"):
        loss_options(file, {**new, "use_sigmoid": not sigmoid})
