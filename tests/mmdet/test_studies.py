"""One run of a study: it goes on after an interruption, and several processes can share it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from cells import cells
from mmengine.registry import MODELS

from polyfocal.adapters import prepare
from polyfocal.errors import UserError
from polyfocal.experiments.request import Request
from polyfocal.experiments.study import Run, run_study
from polyfocal.mmengine import studies
from polyfocal.mmengine.configs import merge_options, read_config
from polyfocal.mmengine.hooks import ExactResumeHook
from polyfocal.mmengine.search import innermost_losses
from polyfocal.mmengine.studies import loss_options, measure_run, use_factors

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


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_a_run_that_another_study_trains_is_left_alone(tmp_path):
    """One with other settings, which would begin anew."""
    place = tmp_path / "row" / "seed_0"
    (place / "run").mkdir(parents=True)
    (place / "run" / "epoch_1.pth").write_text("another's")
    code = (
        "import sys, pathlib, time; from polyfocal.folders import own_folder\n"
        "with own_folder(pathlib.Path(sys.argv[1]), 'x'): print('in', flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", code, str(place / "run")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        experiment = prepare(Request(prepare, CONFIG, demo=True))
        with pytest.raises(UserError, match=rf"in use by another training \(process {other.pid} "):
            studies.runs.train_into(place, experiment, resume=True)
        assert (place / "run" / "epoch_1.pth").read_text() == "another's"
    finally:
        other.kill()
        other.wait()


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
        ("mask_rcnn_focal", ["model.roi_head.bbox_head.loss_cls.loss"]),
        ("classification/focal", ["model.loss"]),
    ],
)
def test_a_loss_in_the_place_of_the_configs(config, places):
    """In every head, with the weight that the loss had; or other settings of the same loss."""
    file = ROOT / "configs" / f"{config}.py"
    before = read_config(file)
    assert list(innermost_losses(before)) == places
    sigmoid = config in ("retinanet_focal", "mask_rcnn_focal")
    new = {"type": "polyfocal.FocalLoss", "use_sigmoid": sigmoid, "gamma": 5.0, "alpha": None}
    for loss in (new, {"gamma": 3.0}):
        cfg = read_config(file)
        merge_options(cfg, loss_options(file, loss))
        for place, old in innermost_losses(before).items():
            kept = {"loss_weight": old.loss_weight} if "loss_weight" in old else {}
            wanted = {**kept, **new} if loss is new else {**old, **loss}
            assert innermost_losses(cfg)[place].to_dict() == wanted
        for one in innermost_losses(cfg).values():
            one.clear()
        rest = read_config(file)
        for one in innermost_losses(rest).values():
            one.clear()
        assert cfg.model == rest.model, "and nothing else has changed"
    with pytest.raises(UserError, match=f"{places[0]} of .* has use_sigmoid={sigmoid}, and the"):
        loss_options(file, {**new, "use_sigmoid": not sigmoid})


def measured_config(tmp_path, monkeypatch, config, **settings):
    """The config with which a run of a study is trained."""
    trained = []

    def train_into(place, experiment, **_):
        trained.append(experiment.config)
        (place / "run").mkdir(parents=True)
        return {"top1": 0.5}

    monkeypatch.setattr(studies.runs, "train_into", train_into)
    given = {"config": str(config), "data": None, "profile": None, "demo": True, "options": {}}
    run = Run("row", 3, {**given, **settings})
    assert measure_run(run, run.folder(tmp_path), adapter=prepare) == {"top1": 0.5}
    return trained[0]


def test_options_win_over_the_loss_of_a_row(tmp_path, monkeypatch):
    loss = {"type": "polyfocal.Poly1CrossEntropyLoss", "use_sigmoid": False, "epsilon": 1.0}
    options = {"model.loss.loss_weight": 3.0, "model.loss.epsilon": 2.0, "model.num_classes": 10}
    cfg = measured_config(tmp_path, monkeypatch, CONFIG, loss=loss, options=options)
    assert cfg.model.loss.to_dict() == {**loss, "epsilon": 2.0, "loss_weight": 3.0}
    assert cfg.model.num_classes == 10


def test_cross_entropy_is_measured_without_the_options_of_the_loss(tmp_path, monkeypatch):
    """In a study of curvature, an option inside the loss would make it another loss."""
    asked = []

    def curvature(experiment, *_, **__):
        asked.append(experiment.config.model.loss)
        number = SimpleNamespace(value=1.0, standard_error=0.0, values=torch.ones(1))
        return SimpleNamespace(trace=number, eigenvalues=number, loss=1.0)

    monkeypatch.setattr(studies.runs, "curvature", curvature)
    monkeypatch.setattr(studies.runs, "train_into", lambda *_, **__: {})
    options = {"model.loss.gamma": 5.0}
    given = {"config": str(CONFIG), "data": None, "profile": None, "demo": True}
    run = Run("row", 3, {**given, "options": options, "curvature": {"batches": 1}})
    measure_run(run, run.folder(tmp_path), adapter=prepare)
    assert [loss.gamma for loss in asked] == [5.0, 0.0]
    # The weight that a fair study has found is the loss's own, not that of cross-entropy.
    monkeypatch.setattr(Run, "factors", lambda *_: {"rate": 1.0, "weight": 2.0})
    measure_run(run, run.folder(tmp_path), adapter=prepare)
    assert [loss.get("loss_weight", 1.0) for loss in asked[2:]] == [2.0, 1.0]


def test_a_training_that_counts_iterations_does_not_save_each_of_them():
    cfg = read_config(ROOT / "configs" / "retinanet_focal.py")
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 9, "val_interval": 3}
    saving = cfg.default_hooks.checkpoint
    saving.update(interval=1, by_epoch=False)  # 1 is what a study asks for
    studies.save_seldom(cfg)
    assert saving.interval == 3
    saving.update(interval=1, by_epoch=True)
    studies.save_seldom(cfg)
    assert saving.interval == 1


@pytest.mark.parametrize("seeds", [{}, {"seed": 7, "deterministic": True, "diff_rank_seed": True}])
def test_the_seed_is_the_runs_and_the_rest_of_randomness_the_configs(tmp_path, monkeypatch, seeds):
    config = tmp_path / "mine.py"
    config.write_text(f'_base_ = "{CONFIG}"\nrandomness = {seeds!r}\n')
    cfg = measured_config(tmp_path, monkeypatch, config)
    assert cfg.randomness == {**seeds, "seed": 3}


def test_factors_reach_the_loss_inside_an_adapter_and_the_ends_of_the_schedule():
    cfg = read_config(ROOT / "configs" / "mask_rcnn_focal.py")
    cfg.param_scheduler = [
        {"type": "LinearLR", "start_factor": 0.001},
        {"type": "CosineAnnealingLR", "eta_min": 0.1},
        {"type": "CosineAnnealingMomentum", "eta_min": 0.85},
        {"type": "OneCycleParamScheduler", "param_name": "lr", "eta_max": 0.4},
    ]
    adapter = cfg.model.roi_head.bbox_head.loss_cls
    rate = cfg.optim_wrapper.optimizer.lr
    use_factors(cfg, rate=2.0, weight=0.5)
    assert cfg.optim_wrapper.optimizer.lr == 2 * rate
    assert adapter.loss.loss_weight == 2.0 and "loss_weight" not in adapter
    linear, cosine, momentum, cycle = cfg.param_scheduler
    assert (cosine.eta_min, momentum.eta_min, cycle.eta_max) == (0.2, 0.85, 0.8)
    assert linear == {"type": "LinearLR", "start_factor": 0.001}
    MODELS.build(adapter)


def test_a_row_without_a_loss_takes_any_config(tmp_path, monkeypatch):
    """Not only those whose classification loss a study knows how to replace."""
    config = tmp_path / "mine.py"
    config.write_text(f'_base_ = "{CONFIG}"\n')
    monkeypatch.setattr(studies, "innermost_losses", lambda _: pytest.fail("nobody asked"))
    measured_config(tmp_path, monkeypatch, config)


def test_what_a_tuning_found_is_read_when_it_has_been_written(tmp_path, monkeypatch):
    """By the first of several processes, for which the others wait."""
    found = {"rate": 2.0, "weight": 1.0, "score": 0.5}

    def barrier():
        run = Run("row.tuned", 0, {**given, "fair": fair})
        run_study([run], lambda *_: found, tmp_path, lambda _: None)

    fair = {"rate": [1, 2], "weight": [1], "by": "top1"}
    given = {"config": str(CONFIG), "data": None, "profile": None, "demo": True, "options": {}}
    monkeypatch.setattr(studies, "barrier", barrier)
    cfg = measured_config(tmp_path, monkeypatch, CONFIG, fair=fair)
    own = Request(prepare, CONFIG, demo=True).prepare().config
    assert cfg.optim_wrapper.optimizer.lr == 2 * own.optim_wrapper.optimizer.lr


def test_a_column_that_nothing_measures_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(studies.runs, "train_into", lambda *_, **__: {"top1": 0.5, "ece": 0.1})
    given = {"config": str(CONFIG), "data": None, "profile": None, "demo": True, "options": {}}
    fair = {"rate": [1, 2], "weight": [1], "by": "top_1"}
    run = Run("row.tuned", 0, {**given, "fair": fair})
    with pytest.raises(UserError, match=r"first column, top_1, and .* measures top1, ece: name"):
        measure_run(run, run.folder(tmp_path), adapter=prepare)


def test_weights_and_resuming_as_the_config_says(tmp_path):
    """Where the command line says nothing; and the command line wins."""

    def trained(name, options, **arguments):
        """The learned weights of a training that changes nothing: its rate is 0."""
        still = {"optim_wrapper.optimizer.lr": 0.0, "optim_wrapper.optimizer.weight_decay": 0.0}
        options = {**OPTIONS, **still, **options}
        experiment = prepare(Request(prepare, CONFIG, demo=True, options=options))
        experiment.config.work_dir = str(tmp_path / name)
        experiment.use_seed(len(name))
        studies.runs.train(experiment, **arguments)
        found = torch.load(tmp_path / name / "epoch_2.pth", weights_only=True)["state_dict"]
        return {key: value for key, value in found.items() if key.endswith("weight")}

    def same(one, other):
        return all(torch.equal(value, other[key]) for key, value in one.items())

    first, last = trained("first", {}), str(tmp_path / "first" / "epoch_2.pth")
    other = trained("other one", {})
    assert not same(first, other)
    assert same(trained("from", {"load_from": last}), first)
    file = str(tmp_path / "other one" / "epoch_2.pth")
    assert same(trained("option", {"load_from": last}, load_from=file), other)
    assert same(trained("go on", {"load_from": last, "resume": False}), first)
    trained_before = (tmp_path / "first" / "epoch_2.pth").stat().st_mtime_ns
    trained("first", {"resume": True})  # at its end already
    assert (tmp_path / "first" / "epoch_2.pth").stat().st_mtime_ns == trained_before


def test_pictures_show_the_weights_that_were_measured():
    """The averages of EMAHook, which are swapped in for an evaluation alone."""
    from mmengine.hooks import EMAHook

    class Watched(EMAHook):
        def before_val_epoch(self, runner):
            runner.weights = "averages"

        def after_val_epoch(self, runner, metrics=None):
            runner.weights = "last"

    runner = SimpleNamespace(hooks=[Watched()], weights="last")
    with studies.runs._as_evaluated(runner):
        assert runner.weights == "averages"
    assert runner.weights == "last"


def test_a_further_split_has_the_classes_of_val(tmp_path):
    """In another order of the categories, every label would be another class."""
    root, config = cells(tmp_path), ROOT / "configs" / "retinanet_poly1.py"
    val = json.loads((root / "annotations" / "val.json").read_text())
    shutil.copytree(root / "images" / "val", root / "images" / "more")
    (root / "annotations" / "more.json").write_text(json.dumps(val))
    options = studies._split_options(config, root, "more")
    assert options["test_evaluator.ann_file"] == str(root / "annotations" / "more.json")
    turned = {**val, "categories": val["categories"][::-1]}
    (root / "annotations" / "more.json").write_text(json.dumps(turned))
    with pytest.raises(UserError, match=r"more.json and .*val.json must declare the same categ"):
        studies._split_options(config, root, "more")
