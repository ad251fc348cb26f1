"""The search for a loss's settings, on scikit-learn's digits and on a few digit scenes."""

import json
import re
import sqlite3
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

import optuna
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from optuna.trial import TrialState
from searching import SETTINGS, Fake

from polyfocal import losses
from polyfocal.adapters import prepare
from polyfocal.coco import hold_out
from polyfocal.commands import tune
from polyfocal.data.splits import held_out
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.errors import UserError
from polyfocal.experiments import tuned as reported
from polyfocal.experiments import tuning
from polyfocal.experiments.request import Request, Setting
from polyfocal.experiments.study import Outcome, Run, paired_difference
from polyfocal.mmengine import runs
from polyfocal.mmengine.configs import read_config
from polyfocal.mmengine.experiment import Experiment
from polyfocal.mmengine.hooks import ExactResumeHook

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
CLASSIFIER = CONFIGS / "classification" / "poly1.py"
RETINANET = CONFIGS / "retinanet_poly1.py"
SHORT = ("--demo", "--epochs", 1, "--cfg-options", "train_cfg.max_epochs=2")


def run(*arguments):
    return tune.main([str(argument) for argument in arguments])


def search_of(folder):
    storage = f"sqlite:///{folder / tuning.STORAGE_FILE}"
    return optuna.load_study(study_name="tune", storage=storage)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    settings = DigitScenes(num_train=10, num_val=3, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", settings)


def test_from_a_config_to_a_better_one(tmp_path, capsys):
    folder = tmp_path / "search"
    against = CONFIGS / "classification" / "cross_entropy.py"
    arguments = (CLASSIFIER, "--work-dir", folder, "--seeds", 2, "--against", against, *SHORT)
    assert run(*arguments, "--trials", 2) == 0
    shown = capsys.readouterr().out
    first, second = search_of(folder).trials
    assert first.params == {"epsilon": 2.0, "loss_weight": 1.0}, "the config's own come first"
    assert -1 <= second.params["epsilon"] <= 5 and 0.25 <= second.params["loss_weight"] <= 4
    assert len(re.findall(r"^trial \d: ", shown, re.MULTILINE)) == 2

    best = Config.fromfile(folder / "best.py")
    found = tuning.rounded(max((first, second), key=lambda trial: trial.value).params)
    assert {name: best.model.loss[name] for name in found} == found
    own = Config.fromfile(CLASSIFIER)
    own.model.loss.update(found)
    assert best.model == own.model, "and nothing else has changed"
    loss = MODELS.build(best.model.loss)
    assert isinstance(loss, losses.Poly1CrossEntropyLoss) and loss.epsilon == found["epsilon"]

    report = (folder / "report.md").read_text()
    row = "config" if found["epsilon"] == 2 else "trial_1"
    for name in {"config", row, "cross_entropy"}:
        top1 = [
            json.loads((folder / name / f"seed_{seed}" / "result.json").read_text())
            for seed in (1, 2)
        ]
        mean = sum(result["measured"]["top1"] for result in top1) / 2
        assert f"| {name} | {100 * mean:.1f} ± " in report
    assert f"{row} is " in report and "cross_entropy, ± " in report
    assert f"| 0 | 2 | 1 | 1 | {first.value:.3f} |" in report
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")

    # The same command again repeats nothing; one more trial is one more.
    assert run(*arguments, "--trials", 2) == 0
    assert "trial 1: " not in capsys.readouterr().out.split("* best")[0]
    assert run(*arguments, "--trials", 3, "--workers", 2, "--seeds", 0) == 0
    trials = search_of(folder).get_trials(states=tuning.DONE)
    assert 3 <= len(trials) <= 4, "two may have been under way"
    assert len({trial.params["epsilon"] for trial in trials}) == len(trials)
    # Of another length, trials would not compare.
    arguments = [2 if argument == 1 else argument for argument in arguments]
    assert run(*arguments, "--trials", 4) == 2
    assert "is a search with other epochs: give another --work-dir" in capsys.readouterr().err


def test_searches_at_the_same_time_try_different_settings(tmp_path):
    studies = [tuning.open_study(tmp_path, SETTINGS, {}) for _ in range(2)]
    searching = dict(seed=0, minutes=None, report=lambda trial: None)

    def train(epsilon, watcher):
        if studies:  # the first trial is under way: the other process begins
            tuned.search(studies.pop(), trials=1, **searching)
        return 0.5

    tuned = tuning.Tuning(Request(lambda request: Fake(train), "mine.py"), tmp_path, epochs=4)
    tuned.search(studies.pop(), trials=6, **searching)
    trials = search_of(tmp_path).get_trials(states=tuning.DONE)
    assert len(trials) == 6
    assert len({trial.params["epsilon"] for trial in trials}) == 6


def test_the_search_sees_no_picture_of_val(scenes, tmp_path, monkeypatch):
    """A detector's trial: where its config points to, and what it reports and leaves behind."""
    seen = []
    original = runs.train_into

    def spy(place, experiment, **settings):
        seen.append(experiment.config)
        return original(place, experiment, **settings)

    monkeypatch.setattr(runs, "train_into", spy)
    options = ("--cfg-options", "train_dataloader.num_workers=0", "val_dataloader.num_workers=0")
    arguments = (RETINANET, "--data", scenes, "--profile", "tiny", "--work-dir", tmp_path)
    assert run(*arguments, "--trials", 1, "--seeds", 0, "--epochs", 1, *options) == 0
    (cfg,) = seen
    assert str(scenes / "annotations" / "val.json") not in cfg.pretty_text
    parts = {
        loader: json.loads(Path(cfg[f"{loader}_dataloader"].dataset.ann_file).read_text())
        for loader in ("train", "val", "test")
    }
    names = {
        loader: {image["file_name"] for image in part["images"]} for loader, part in parts.items()
    }
    whole = json.loads((scenes / "annotations" / "train.json").read_text())
    assert names["train"] | names["val"] == {image["file_name"] for image in whole["images"]}
    assert not names["train"] & names["val"] and (len(names["train"]), len(names["val"])) == (8, 2)
    assert cfg.val_evaluator.ann_file == cfg.val_dataloader.dataset.ann_file
    assert parts["test"] == parts["val"]
    (trial,) = search_of(tmp_path).trials
    assert trial.state == TrialState.COMPLETE and list(trial.intermediate_values) == [1]
    assert trial.params == {"epsilon": 1.0, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}
    left = {path.name for path in (tmp_path / "trials" / "trial_0").iterdir()}
    assert left == {"console.log"}, "no weights"


def test_held_out(scenes, tmp_path):
    """A fifth, the same whatever the order, whole pictures with their objects."""
    chosen = held_out(range(100))
    assert sum(chosen) == 20
    order = [7 * i % 100 for i in range(100)]
    assert [held_out(order)[order.index(i)] for i in range(100)] == chosen
    with pytest.raises(UserError, match="4 training samples"):
        held_out(range(4))
    file = scenes / "annotations" / "train.json"
    parts = [json.loads(part.read_text()) for part in hold_out(file, tmp_path)]
    whole = json.loads(file.read_text())
    for part in parts:
        images = {image["id"] for image in part["images"]}
        wanted = [one for one in whole["annotations"] if one["image_id"] in images]
        assert part["annotations"] == wanted and part["categories"] == whole["categories"]
    assert sum(len(part["annotations"]) for part in parts) == len(whole["annotations"])


def test_a_hook_that_fits_something_on_val_does_so_on_the_held_out_part(scenes, tmp_path):
    """AdaFocal's gammas, of a search; what it trains on stays the training part."""
    experiment = prepare(Request(prepare, RETINANET, data=scenes, profile="tiny"))
    cfg = experiment.config
    loaders = [Config(dict(one=cfg[f"{split}_dataloader"])).one for split in ("val", "train")]
    cfg.custom_hooks = [dict(type="polyfocal.AdaFocalHook", dataloader=one) for one in loaders]
    experiment.hold_out(tmp_path)
    kept, out = (cfg[f"{split}_dataloader"].dataset.ann_file for split in ("train", "val"))
    assert kept != out
    assert [hook.dataloader.dataset.ann_file for hook in cfg.custom_hooks] == [out, kept]


def test_held_out_of_a_classifier():
    dataset = {"type": "polyfocal.ImageDataset", "root": None, "split": "train"}
    from polyfocal.registry import DATASETS

    whole, kept, out = (
        set(DATASETS.build({**dataset, "held_out": part}).data.ids.tolist())
        for part in (None, False, True)
    )
    assert kept | out == whole and not kept & out and len(out) == len(whole) // 5


def prepared(tmp_path, train):
    """A search whose trainings are ``train(epsilon, watcher)``, prepared once for all trials."""
    asked = []

    def adapter(request):
        asked.append(request)
        return Fake(train)

    tuned = tuning.Tuning(Request(adapter, "mine.py"), tmp_path, epochs=4)
    study = tuning.open_study(tmp_path, SETTINGS, {})

    def search(**budget):
        found = []
        budget = {"minutes": None, "trials": None, **budget}
        tuned.search(study, seed=0, report=found.append, **budget)
        assert len(asked) == 1
        return found

    return study, search


def test_prunes_what_lags_behind(tmp_path):
    done = []

    def train(epsilon, watcher):
        count = len(done)
        done.append(0)
        for epoch in range(1, 5):
            done[-1] = epoch
            # The first five are good, the sixth is not, the seventh is better.
            watcher.evaluated(epoch, {"top1": [0.5, 0.1, 0.9][max(0, count - 4)]})
        return 0.5

    _, search = prepared(tmp_path, train)
    found = search(trials=7)
    states = [trial.state for trial in found]
    assert states == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED, TrialState.COMPLETE]
    assert done == [4, 4, 4, 4, 4, 2, 4], "after the second epoch, when there is something to see"


def test_keeps_a_budget_of_minutes(tmp_path):
    def train(epsilon, watcher):
        for _ in range(60):  # three seconds, if nobody stops it
            time.sleep(0.05)
            watcher.step()
        return 0.5

    study, search = prepared(tmp_path, train)
    start = time.monotonic()
    (trial,) = search(minutes=1 / 60)
    assert time.monotonic() - start > 0.9
    assert trial.state == TrialState.FAIL, "it was stopped"
    # What was cut short tells nothing; it comes first when there is more time.
    assert search(minutes=1 / 60) == [], "its time is over"
    (waiting,) = study.get_trials(states=(TrialState.WAITING,))
    assert waiting.system_attrs["fixed_params"] == {"epsilon": 1.0}
    found = search(minutes=1 / 6)
    assert next(t.params["epsilon"] for t in found if t.state == TrialState.COMPLETE) == 1.0
    assert tuning.searched_seconds(study) > 3


def test_goes_on_after_an_interruption(tmp_path):
    interruptions = iter([KeyboardInterrupt])

    def train(epsilon, watcher):
        if len(study.trials) == 3:
            for interruption in interruptions:
                raise interruption
        return 0.5

    study, search = prepared(tmp_path, train)
    with pytest.raises(KeyboardInterrupt):
        search(trials=5)
    search(trials=5)
    done = [t.params["epsilon"] for t in study.get_trials(states=tuning.DONE)]
    assert len(done) == len(set(done)) == 5
    (failed,) = study.get_trials(states=(TrialState.FAIL,))
    assert failed.params["epsilon"] in done, "the one that was under way was done again"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), torch.cuda.OutOfMemoryError(), MemoryError()]
)
def test_a_trial_that_the_machine_ended_is_done_again(tmp_path, error):
    """The first one above all: it has the config's own setting."""
    errors = iter([error])

    def train(epsilon, watcher):
        for one in errors:
            raise one
        return 0.5

    study, search = prepared(tmp_path, train)
    with pytest.raises(type(error)):
        search(trials=2)
    search(trials=2)
    first, second = study.get_trials(states=tuning.DONE)
    assert (first.number, first.params["epsilon"]) == (1, 1.0) and second.params["epsilon"] != 1.0


def test_the_report_says_which_trial_has_the_configs_own_setting(tmp_path):
    def train(epsilon, watcher):
        if len(study.trials) == 1:
            raise ValueError(epsilon)
        return 0.5

    study = tuning.open_study(tmp_path, SETTINGS, {"epochs": 4})
    searching = dict(seed=0, minutes=None, report=lambda trial: None)
    tuned = tuning.Tuning(Request(lambda request: Fake(train), "mine.py"), tmp_path, epochs=4)
    with pytest.raises(ValueError):
        tuned.search(study, trials=1, **searching)
    for trials, whose in ((1, "No trial"), (2, "Trial 2")):
        tuned.search(study, trials=trials, **searching)
        reported.write_report(tmp_path / "report.md", study, "mine.py", ["epsilon"], [], 3)
        text = (tmp_path / "report.md").read_text()
        assert f"{whose} has the config's own setting." in text
        study.enqueue_trial({"epsilon": 1.0})


def test_the_configs_own_setting_keeps_all_its_digits(tmp_path, monkeypatch):
    """Others have three, more than a search can tell apart."""
    settings = {"epsilon": Setting(1.2345, losses.Range(-1.0, 5.0))}
    monkeypatch.setattr(Fake, "settings", lambda self: settings)
    seen = []
    request = Request(lambda request: Fake(lambda epsilon, _: seen.append(epsilon) or 0.5), "a.py")
    tuned = tuning.Tuning(request, tmp_path, epochs=4)
    study = tuning.open_study(tmp_path, settings, {})
    tuned.search(study, seed=0, minutes=None, trials=2, report=lambda trial: None)
    own, other = (trial.params for trial in study.trials)
    assert seen == [1.2345, tuning.rounded(other)["epsilon"]]
    assert tuned.values_of(own) == {"epsilon": 1.2345}


@pytest.mark.parametrize(
    ("against", "sentence"),
    [
        (["a/trial_3.py"], "--against a/trial_3.py: there is a row or a folder trial_3 already"),
        (["config.py"], "a folder config already"),
        (["split.py"], "a folder split already"),
        (["a/mine.py", "b/mine.py"], "--against b/mine.py: there is a row or a folder mine"),
        (["away.py"], "there is no config away.py"),
    ],
)
def test_refuses_rivals_before_the_search(tmp_path, monkeypatch, against, sentence):
    def adapter(request):
        if request.config == Path("away.py"):
            raise UserError(f"there is no config {request.config}.")
        return Fake(lambda *_: pytest.fail("the search has begun"))

    fake = Request(adapter, "own.py")
    tuned = tuning.Tuning(fake, tmp_path / "search", epochs=4)
    monkeypatch.setattr(reported, "_content", lambda _: {})
    with pytest.raises(UserError, match=sentence):
        reported.tune(tuned, reported.Budget(trials=1), against=against)
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("best", "other", "sentence"),
    [
        ((0.50, 0.52, 0.51), (0.49, 0.53, 0.50), r"WARNING: .* 0\.3 top1 ahead of b, .*noise"),
        ((0.50, 0.52, 0.51), (0.40, 0.425, 0.41), r"^a is 9\.8 top1 ahead of b.* p = 0\.00029\.$"),
        ((0.40, 0.425, 0.41), (0.50, 0.52, 0.51), r"WARNING: a is 9\.8 .* behind b.*do not take"),
        ((0.50,), (0.40,), r"WARNING: a is 10\.0 top1 ahead of b with one seed"),
    ],
)
def test_verdict(best, other, sentence):
    outcomes = [
        Outcome(Run(name, seed), {"top1": value}, 1.0)
        for name, values in (("a", best), ("b", other))
        for seed, value in enumerate(values)
    ]
    (found,) = reported.verdict(outcomes, "a", "top1")
    assert re.search(sentence, found), found


@pytest.mark.parametrize(
    ("best", "own", "reason"),
    [
        ((0.50, 0.52, 0.51), (0.40, 0.425, 0.41), None),
        ((0.50, 0.52, 0.51), (0.49, 0.53, 0.50), "its lead may be the seeds' noise"),
        ((0.40, 0.425, 0.41), (0.50, 0.52, 0.51), "it is not ahead"),
        ((0.50,), (0.40,), "its lead may be the seeds' noise"),
    ],
)
def test_what_is_not_proven_is_not_taken(best, own, reason):
    outcomes = [
        Outcome(Run(name, seed), {"top1": value}, 1.0)
        for name, values in (("trial_3", best), ("config", own))
        for seed, value in enumerate(values)
    ]
    found = reported.unproven(outcomes, "trial_3", "top1")
    assert (found is None) == (reason is None)
    assert reason is None or f"not that of trial_3, since {reason}." in found


def test_trials_on_a_frozen_backbone_are_full_trainings(tmp_path):
    request = Request(lambda request: Fake(None), "mine.py", profile="small", freeze=True)
    assert tuning.Tuning(request, tmp_path).trial_epochs == 12
    assert tuning.Tuning(request, tmp_path, epochs=5).trial_epochs == 5
    assert tuning.Tuning(Request(request.adapter, "mine.py"), tmp_path).trial_epochs == 4
    assert reported._data_options(request, {}) == ["--profile", "small", "--freeze"]


def test_the_command_of_a_result_does_not_undo_it(tmp_path):
    """An override of what was searched stays out of the command, and others stay in."""
    options = {"model.bbox_head.loss_cls.epsilon": 0.5, "model.bbox_head.loss_cls.epsilonx": 1}
    config = ROOT / "configs" / "retinanet_poly1.py"
    request = Request(prepare, config, options={**options, "train_cfg.max_epochs": 3})
    settings = Experiment(read_config(config)).settings()
    assert reported._data_options(request, {"epsilon": settings["epsilon"]}) == [
        "--cfg-options", "model.bbox_head.loss_cls.epsilonx=1", "train_cfg.max_epochs=3",
    ]  # fmt: skip
    many = {"epsilons.0": Setting(1.0, losses.Range(-1, 5), ("model.loss.epsilons.0",))}
    request = Request(prepare, config, options={"model.loss.epsilons": [1, 2]})
    assert reported._data_options(request, many) == []


def test_paired_difference_is_scipys():
    from scipy.stats import ttest_rel

    first, second = (0.31, 0.28, 0.35, 0.30), (0.27, 0.29, 0.30, 0.24)
    outcomes = [
        Outcome(Run(name, seed), {"AP": value}, 1.0)
        for name, values in (("a", first), ("b", (*second, 0.9)))
        for seed, value in enumerate(values)
    ]
    found = paired_difference(outcomes, "a", "b", "AP")
    assert found.seeds == 4 and found.mean == pytest.approx(0.035)
    assert found.p == pytest.approx(ttest_rel(first, second).pvalue)


@pytest.mark.parametrize(
    ("name", "setting", "heads"),
    [
        ("cascade_mask_rcnn_poly1", "epsilon", 3),
        ("mask_rcnn_topk_lvis", "epsilon", 1),
        ("fcos_cyclical", "factor", 1),
    ],
)
def test_configs_of_other_heads(tmp_path, name, setting, heads):
    """In every head, within an adapter too, and written so that MMEngine reads the same."""
    config = CONFIGS / f"{name}.py"
    cfg = Config.fromfile(config)
    Experiment(cfg).write_variant(tmp_path / "best.py", {setting: 1.5}, ["why"])
    Experiment(cfg).use_values({setting: 1.5})
    assert Config.fromfile(tmp_path / "best.py").model == cfg.model
    assert str(cfg.model).count(f"'{setting}': 1.5") == heads


def test_every_declared_range_can_be_built():
    """At both ends, and the default or customary value lies within."""
    common = {"use_sigmoid": False}
    made = [
        losses.FocalLoss(use_sigmoid=True),
        losses.Poly1FocalLoss(epsilon=1.0, use_sigmoid=True),
        losses.Poly1CrossEntropyLoss(),
        losses.PolyNLoss([1.0, 0.5], use_sigmoid=True),
        losses.CyclicalFocalLoss(use_sigmoid=True),
        losses.NoisedTopKLoss(2, 0.2),
        losses.ImbalancedNoisedTopKLoss(2, 0.01, [5, 1], 0.2),
        losses.LDAMLoss([5, 1]),
        losses.DualFocalLoss(2.0),
        losses.SampleDependentFocalLoss(use_sigmoid=True),
        losses.AdaFocalLoss(),
        losses.DebiasedFocalLoss(**common),
        losses.ProductOfExpertsLoss(**common),
        losses.ReweightedCrossEntropyLoss(**common),
        losses.ConfidenceRegularizationLoss(**common),
        losses.GaussianPoly1FocalLoss(epsilon=1.0),
    ]
    needed = {"NoisedTopKLoss": dict(k=2, epsilon=0.2), "DualFocalLoss": dict(gamma=2.0)}
    needed["ImbalancedNoisedTopKLoss"] = dict(
        k=2, epsilon=0.01, class_counts=[5, 1], max_margin=0.2
    )
    needed["LDAMLoss"] = dict(class_counts=[5, 1])
    for loss in made:
        kind = type(loss)
        assert "loss_weight" in loss.tunable(), kind
        for name, range_ in loss.tunable().items():
            assert range_.low < range_.high and (range_.low > 0 or not range_.log)
            for value in (range_.low, range_.high):
                settings = {"use_sigmoid": loss.use_sigmoid} if hasattr(loss, "use_sigmoid") else {}
                settings |= {"epsilon": 1.0} if hasattr(loss, "epsilon") else {}
                settings |= needed.get(kind.__name__, {})
                key, _, place = name.partition(".")
                if place:
                    entries = [0.0, 0.0]
                    entries[int(place)] = value
                    settings[key] = entries
                else:
                    settings[key] = value
                    if kind is losses.PolyNLoss:
                        settings["epsilons"] = [0.0, 0.0]
                kind(**settings)


def test_a_training_of_another_length_keeps_the_shape_of_its_schedule():
    cfg = Config.fromfile(RETINANET)  # 12 epochs, the rate divided after 8 and 11
    Experiment(cfg).use_epochs(3)
    assert cfg.train_cfg.max_epochs == 3
    warmup, steps = cfg.param_scheduler
    assert (warmup.begin, warmup.end) == (0, 500), "in iterations"
    assert steps.milestones == [2, 3] and (steps.begin, steps.end) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([CLASSIFIER, "--demo"], "a search needs a budget: give --minutes M, --trials N or both"),
        ([CLASSIFIER, "--demo", "--minutes", 0], "--minutes 0: expected more than 0"),
        ([CLASSIFIER, "--demo", "--trials", 0], "--trials 0: expected 1 or more"),
        ([CLASSIFIER, "--demo", "--data", "x", "--trials", 1], "give one of them"),
        ([CLASSIFIER, "--demo", "--trials", 1, "--epochs", 13], "--epochs 13: expected 1 to 12"),
        (
            [CLASSIFIER, "--demo", "--trials", 1, "--only", "gamma"],
            r"--only gamma: .*poly1.py has epsilon, loss_weight to search",
        ),
        (["away.py", "--trials", 1], "there is no config away.py"),
        (
            [CLASSIFIER, "--demo", "--trials", 1, "--against", "away.py"],
            "there is no config away.py",
        ),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(sentence, err), err
    assert not (tmp_path / "work_dirs").exists()


def test_refuses_a_loss_of_others(scenes, tmp_path, capsys):
    stock = (CONFIGS / "retinanet_focal.py", "--data", scenes, "--profile", "tiny")
    assert run(*stock, "--work-dir", tmp_path / "a", "--trials", 1) == 2
    err = capsys.readouterr().err
    assert re.search(r"of .*retinanet_focal.py is FocalLoss, which declares nothing", err), err


def test_refuses_a_file_that_is_no_search(tmp_path, capsys):
    (tmp_path / "search.db").write_text("something else")
    assert run(CLASSIFIER, "--demo", "--trials", 1, "--work-dir", tmp_path) == 2
    err = capsys.readouterr().err
    assert "search.db cannot be used as the file of a search: " in err and err.count("\n") == 1


def test_a_training_in_full_length_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Killed after its first epoch, and then with another config in the place of the old one."""
    config = tmp_path / "mine.py"
    config.write_text(f'_base_ = "{CLASSIFIER}"\n')
    options = ("--cfg-options", "train_cfg.max_epochs=3", "default_hooks.checkpoint.interval=1")
    arguments = (config, "--demo", "--trials", 1, "--seeds", 1, "--work-dir", tmp_path / "search")
    begin_epoch = ExactResumeHook.before_train_epoch

    def killed(self, runner):  # a trial has one epoch
        if runner.epoch == 1:
            raise KeyboardInterrupt
        begin_epoch(self, runner)

    monkeypatch.setattr(ExactResumeHook, "before_train_epoch", killed)
    assert run(*arguments, *options) == 130
    assert "go on with the same command" in capsys.readouterr().err
    monkeypatch.setattr(ExactResumeHook, "before_train_epoch", begin_epoch)
    assert run(*arguments, *options) == 0
    place = tmp_path / "search" / "config" / "seed_1"
    lines = [
        json.loads(line)
        for log in sorted(place.glob("run/*/vis_data/scalars.json"))
        for line in log.read_text().splitlines()
    ]
    epochs = [line["epoch"] for line in lines if "loss" in line]
    assert set(epochs) == {1, 2, 3} and epochs == sorted(epochs), "none of them twice"
    config.write_text(f'_base_ = "{CLASSIFIER}"\nmodel = dict(loss=dict(epsilon=1.0))\n')
    assert run(*arguments, *options) == 2
    assert "is a search with other content, settings" in capsys.readouterr().err


def test_waits_for_a_locked_search(tmp_path, monkeypatch):
    """Longer than the 5 s that SQLite waits by itself; a lock without end becomes a sentence."""
    study = tuning.open_study(tmp_path, SETTINGS, {})
    file = tmp_path / tuning.STORAGE_FILE
    other = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(7, other.execute, ["COMMIT"])
    release.start()
    start = time.monotonic()
    study.ask()
    assert time.monotonic() - start > 5 and len(study.get_trials()) == 1
    release.join()

    monkeypatch.setattr(tuning, "_PATIENCE", 0.2)
    study = tuning.open_study(tmp_path, SETTINGS, {})
    other.execute("BEGIN EXCLUSIVE")
    sentence = r"search.db cannot be used: .*database is locked.*the same command goes on"
    with pytest.raises(UserError, match=sentence), tuning.storage_errors(tmp_path):
        study.ask()
    other.close()


def test_a_request_prepares_itself_once(scenes, monkeypatch):
    """And each asking gets an experiment of its own, so that none changes another's."""
    looked = []
    request = Request(
        lambda request: looked.append(request) or prepare(request), CLASSIFIER, demo=True
    )
    first, second = request.prepare(), request.prepare()
    first.use_values({"epsilon": 0.5})
    first.use_epochs(1)
    assert second.config.model.loss.epsilon == 2.0 and second.epochs == 12
    assert looked == [request]
    with pytest.raises(AttributeError):
        request.demo = False
