"""The study tool: the shipped studies, and runs that end, stop and go on."""

import copy
import csv
import functools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from mmdet.registry import TRANSFORMS
from mmengine.registry import DefaultScope

from polyfocal.commands import reproduce as tool
from polyfocal.experiments.batch import Slurm
from polyfocal.experiments.study import chosen, find_study, read_study, study_names
from polyfocal.mmengine import studies
from polyfocal.mmengine.configs import merge_options, read_config, walk
from polyfocal.mmengine.hooks import ExactResumeHook
from polyfocal.mmengine.search import losses_of

ROOT = Path(__file__).parents[2]

# As the papers have them: PolyLoss, table 1; Focal Loss, table 1 (a) and (b).
PUBLISHED = {
    "polyloss_coco": {
        "cross_entropy": {"bbox_AR@100": 47.2, "segm_AR@100": 42.3},
        "poly1": {"bbox_AR@100": 49.7, "segm_AR@100": 44.4},
    },
    "polyloss_lidar": {
        "focal": {"Car_3D_AP40_moderate_strict": 63.3, "Pedestrian_3D_AP40_moderate_strict": 68.9}
    },
    "retinanet_gamma_alpha": {
        f"gamma_{gamma}_alpha_{alpha}": dict(
            zip(("bbox_mAP", "bbox_mAP_50", "bbox_mAP_75"), numbers, strict=False)
        )
        for gamma, alpha, *numbers in (
            ("0", "0.75", 31.1, 49.4, 33.0),
            ("0.1", "0.75", 31.4, 49.9, 33.1),
            ("0.2", "0.75", 31.9, 50.7, 33.4),
            ("0.5", "0.5", 32.9, 51.7, 35.2),
            ("1", "0.25", 33.7, 52.0, 36.2),
            ("2", "0.25", 34.0, 52.5, 36.5),
            ("5", "0.25", 32.2, 49.6, 34.8),
            ("0", "0.1", 0.0),
            ("0", "0.25", 10.8),
            ("0", "0.5", 30.2),
            ("0", "0.9", 30.8),
            ("0", "0.99", 28.7),
            ("0", "0.999", 25.1),
        )
    },
    "retinanet_epsilon": {},
    "cyclical_long_tail": {},
    "topk_label_noise": {},
}


def run(*arguments):
    return tool.main([str(argument) for argument in arguments])


def study(name):
    return read_study(find_study(name, tool.STUDIES))


def planned(name, *options):
    args = tool.parse_args([name, *map(str, options)])
    given = {key: getattr(args, key) for key in ("data", "profile", "demo", "epochs")}
    return study(name).runs(args.seeds, **given, options=args.cfg_options)


def test_published_numbers():
    names = study_names(tool.STUDIES)
    assert {name for name in names if study(name).source} == PUBLISHED.keys()
    for name, rows in PUBLISHED.items():
        table = study(name)
        found = {row: one.published for row, one in table.rows.items() if one.published}
        assert found == rows
        assert "not verified" in " ".join(table.notes) or name == "retinanet_gamma_alpha"
        assert re.search(r"arXiv:\d{4}\.\d{5}", table.source)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_options_fit_the_configs(name):
    """The full experiment's overrides have a place in its configs, and change what they name."""
    if name == "polyloss_lidar":
        pytest.importorskip("mmdet3d", reason="needs MMDetection3D: make setup-3d")
    read = functools.cache(read_config)
    for one in planned(name, "--seeds", 1):
        cfg = copy.deepcopy(read(ROOT / one.settings["config"]))
        plain = len(list(walk(cfg._cfg_dict)))
        merge_options(cfg, json.loads(json.dumps(one.settings["options"])))
        assert len(list(walk(cfg._cfg_dict))) == plain
        assert cfg.auto_scale_lr.enable and cfg.auto_scale_lr.base_batch_size in (16, 48, 64)
        model = cfg.model
        loss = model.get("loss") or model.get("roi_head", model).bbox_head.loss_cls
        named = re.fullmatch(r"epsilon_(.+)", one.name)
        if named:
            assert loss.epsilon == float(named[1])
        named = re.fullmatch(r"gamma_(.+)_alpha_(.+)", one.name)
        if named:
            assert (loss.gamma, loss.alpha) == (float(named[1]), float(named[2]))
        named = re.fullmatch(r"cyclical_factor_(\d)", one.name)
        if named:
            assert loss.get("factor", 4.0) == float(named[1])


@pytest.mark.parametrize(
    ("size", "expected"), [((800, 1200), (600, 900)), ((300, 1000), (300, 1000))]
)
def test_retinanet_table_has_the_papers_pictures(size, expected):
    """600 pixels of the shorter side, or 1,000 of the longer one."""
    options = planned("retinanet_gamma_alpha")[0].settings["options"]
    cfg = read_config(ROOT / "configs" / "retinanet_focal.py")
    merge_options(cfg, json.loads(json.dumps(options)))
    for loader, place in (("train_dataloader", 2), ("val_dataloader", 1)):
        with DefaultScope.overwrite_default_scope("mmdet"):
            resize = TRANSFORMS.build(cfg[loader].dataset.pipeline[place])
        image = np.zeros((*size, 3), dtype=np.uint8)
        found = resize({"img": image, "img_shape": size})["img"]
        assert found.shape[:2] == expected


def test_plan():
    runs = planned("polyloss_coco", "--demo", "--seeds", 2)
    assert [(one.name, one.seed) for one in runs] == [
        ("cross_entropy", 0),
        ("poly1", 0),
        ("cross_entropy", 1),
        ("poly1", 1),
    ]
    short = {"train_cfg.max_epochs": 5, "train_cfg.val_interval": 5}
    saving = "default_hooks.checkpoint"
    kept = {f"{saving}.interval": 1, f"{saving}.max_keep_ckpts": 2}
    assert runs[0].settings == {
        "config": "configs/mask_rcnn_ce.py",
        "data": None,
        "profile": None,
        "demo": True,
        "options": {**kept, **short},
    }
    # The published experiment: its schedule, at the learning rate of any number of devices.
    full = planned("polyloss_coco", "--data", "coco")[0].settings
    assert full["options"] == {**kept, "auto_scale_lr.enable": True} and full["data"] == "coco"
    # The tiny profile has its own pipeline and, but in the demo, its own number of epochs.
    tiny = planned("retinanet_gamma_alpha", "--data", "x", "--profile", "tiny")[0].settings
    assert not any("pipeline" in key or "epochs" in key for key in tiny["options"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["polyloss"],
            r"no study polyloss: expected a YAML file, or one of cyclical_long_tail, gamma_",
        ),
        (["polyloss_coco", "--demo", "--data", "x"], "--demo is the built-in data set and --data"),
        (["polyloss_coco", "--demo", "--seeds", 0], "--seeds 0: expected at least 1"),
        (["polyloss_coco", "--epochs", 2], "--epochs is for --demo and --profile tiny or small"),
        (
            ["polyloss_coco", "--only", "poly1/3"],
            r"--only poly1/3: expected ROW .* cross_entropy, ",
        ),
        (["polyloss_coco", "--slurm", "x", "--launcher", "slurm"], "give one of them"),
        (["polyloss_coco", "--data", "/away"], "/away"),
        (["topk_label_noise", "--data", "/away"], "wants /away"),
        (["polyloss_coco", "--config", "x.py"], "--config x.py: the rows of polyloss_coco have"),
        (["gamma_softmax", "--config", "away.py", "--demo"], "there is no config away.py"),
        (
            ["gamma_softmax", "--config", "configs/retinanet_focal.py", "--demo"],
            "configs/retinanet_focal.py has use_sigmoid=True, and the study's polyfocal.FocalLoss",
        ),
        (["shortcut_detection", "--data", "x"], "makes its own pictures: leave --data out"),
        (
            ["shortcut", "--demo", "--cfg-options", "variant.spurious=2"],
            "spurious=2 of the data",
        ),
        (
            ["shortcut", "--demo", "--only", "self_reweighting"],
            "self_reweighting needs the scores of shallow, .*: do shallow first, or name both",
        ),
    ],
)
def test_refuses(arguments, sentence, tmp_path, capsys):
    assert run(*arguments, "--work-dir", tmp_path / "table") == 2
    out, err = capsys.readouterr()
    assert re.search(sentence, err) and err.count("\n") == 1 and "Traceback" not in out + err
    assert not list(tmp_path.rglob("table.*"))


class Cells(HTMLParser):
    """The texts of a page's table cells."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag in ("td", "th")
        if self.inside:
            self.texts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


OPTIONS = ("topk_label_noise", "--demo", "--seeds", 2, "--epochs", 3)
OPTIONS += ("--only", "cross_entropy", "focal")


def test_a_table_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    """Stopped between two runs and within one, it ends with the table of an uninterrupted one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*OPTIONS, "--work-dir", whole) == 0
    before = ExactResumeHook.before_train_epoch
    stopped = []

    def stop(hook, runner):
        if "seed_1" in runner.work_dir and runner.epoch == 2 and not stopped:
            stopped.append(runner.work_dir)
            raise KeyboardInterrupt
        before(hook, runner)

    monkeypatch.setattr(ExactResumeHook, "before_train_epoch", stop)
    capsys.readouterr()
    assert run(*OPTIONS, "--work-dir", parts) == 130
    assert capsys.readouterr().err == "interrupted; go on with the same command\n"
    assert not (parts / "table.md").exists()
    assert run(*OPTIONS, "--dry-run", "--work-dir", parts) == 0
    assert re.findall(r"^  .*", capsys.readouterr().out, re.MULTILINE) == [
        "  cross_entropy, seed 1: configs/classification/cross_entropy_noisy.py"
        " (goes on after epoch_2.pth)",
        "  focal, seed 1: configs/classification/focal_noisy.py",
    ]
    assert run(*OPTIONS, "--work-dir", parts) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\[\d/4\] (\w+), seed (\d)$", out, re.MULTILINE) == [
        ("cross_entropy", "1"),
        ("focal", "1"),
    ]
    assert len(list((parts / "cross_entropy" / "seed_1" / "run").glob("*/vis_data"))) == 2
    for name in ("table.md", "table.csv", "table.html"):
        assert (parts / name).read_text() == (whole / name).read_text()

    lines = (whole / "table.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in row] for row in rows]
    assert header[2:] == [
        *("published", "ours", "difference", "gain published", "gain ours", "p"),
    ]
    assert len(rows) == 9 and [row[3] != "" for row in rows] == [True] * 6 + [False] * 3
    assert all(re.fullmatch(r"\d\d\.\d ± \d+\.\d", row[3]) for row in rows[:6])
    assert all(re.fullmatch(r"[+-]\d+\.\d ± \d+\.\d", row[6]) for row in rows[3:6])
    assert "4 of 6 runs are done" in "\n".join(lines)
    assert "not the published experiment" in "\n".join(lines)
    assert Cells((whole / "table.html").read_text()).texts == [
        c for r in [header, *rows] for c in r
    ]
    with (whole / "table.csv").open(newline="") as file:
        exact = list(csv.DictReader(file))
    results = [
        json.loads((whole / "focal" / f"seed_{seed}" / "result.json").read_text())["measured"]
        for seed in (0, 1)
    ]
    mean = 50 * (results[0]["top1"] + results[1]["top1"])
    assert exact[3]["row"] == "focal" and float(exact[3]["mean"]) == pytest.approx(mean)

    # Done: nothing is trained again, and other settings would make another table.
    monkeypatch.setattr(tool, "measure_run", lambda *_, **__: pytest.fail("it is done"))
    assert run(*OPTIONS, "--work-dir", parts) == 0
    assert run(*OPTIONS, "--epochs", 4, "--work-dir", parts) == 2
    assert "was measured with other settings (options)" in capsys.readouterr().err


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Makes this a machine whose sbatch copies the script of each job, numbered from 71."""
    pytest.importorskip("submitit", reason="needs submitit: pip install 'polyfocal[slurm]'")

    def command(name, text):
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def start():
        (tmp_path / "bin").mkdir()
        command("srun", "import json, sys\nprint(json.dumps(sys.argv[1:]))")
        command(
            "sbatch",
            "import pathlib, sys\n"
            f"folder = pathlib.Path({str(tmp_path)!r})\n"
            "number = 71 + len(list(folder.glob('*.sh')))\n"
            "script = pathlib.Path(sys.argv[1]).read_text()\n"
            "(folder / f'{number}.sh').write_text(script)\n"
            "print(f'Submitted batch job {number}')",
        )
        return command

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return start


def test_slurm_gets_a_job_for_each_run_that_is_not_done(tmp_path, capsys, slurm):
    work = tmp_path / "table"
    options = ("polyloss_coco", "--data", "my coco", "--seeds", 1, "--work-dir", work)
    jobs = ("--slurm", "lab", "--gpus", 16, "--sbatch-args", "--time=2-0 --account us --exclusive")
    assert run(*options, *jobs) == 2
    assert "there is none on this machine" in capsys.readouterr().err
    command = slurm()
    done = planned(*options)[0]
    place = done.folder(work)
    place.mkdir(parents=True, exist_ok=True)
    content = {"settings": done.settings, "measured": {"bbox_mAP": 0.4}, "seconds": 1.0}
    (place / "result.json").write_text(json.dumps(content))
    assert run(*options, *jobs) == 0
    assert "poly1, seed 0: job 71" in capsys.readouterr().out
    (script,) = tmp_path.glob("*.sh")
    asked = {line for line in script.read_text().splitlines() if line.startswith("#SBATCH")}
    assert asked > {
        f"#SBATCH --{option}"
        for option in (
            *("partition=lab", "job-name=polyloss_coco-poly1-0", "dependency=singleton"),
            *("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=5"),
            *("time=2-0", "account=us", "exclusive"),
        )
    }
    # What the job's shell runs: srun, here one that prints what it gets, and our own command.
    shell = subprocess.run(
        ["/bin/bash", script],
        env={**os.environ, "SLURM_JOB_ID": "71"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--kill-on-bad-exit=1" in json.loads(shell.stdout)
    from submitit.core.utils import DelayedSubmission

    job = DelayedSubmission.load(work / "poly1" / "seed_0" / "job" / "71_submitted.pkl")
    ((python, *words),) = job.args
    assert job.function is subprocess.run and job.kwargs == {"check": True}
    assert [python, *words[:4]] == [sys.executable, "-u", "-m", "polyfocal", "reproduce"]
    args = tool.parse_args(words[4:])
    assert (args.data, args.only, args.launcher) == ("my coco", ["poly1/0"], "slurm")
    (one,) = chosen(planned(*options), args.only)
    assert one.name == "poly1" and Path(args.work_dir) == work
    command("sbatch", "import sys\nsys.exit('sbatch: error: invalid partition')")
    assert run(*options, *jobs) == 2
    refusal = "sbatch refuses poly1, seed 0: sbatch: error: invalid partition"
    assert refusal in capsys.readouterr().err
    assert run(*options, *jobs[:-1], "-A us") == 2
    assert "'-A' is not one of sbatch's long options" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--gpus=4", "--sbatch-args=--time=1-0"])
def test_options_of_jobs_without_jobs_are_refused(option, capsys):
    assert run("polyloss_coco", "--demo", "--dry-run", option) == 2
    assert capsys.readouterr().err == f"error: {option.split('=')[0]} is for the jobs of --slurm.\n"


def test_one_option_of_sbatch():
    """Alone it would look like an option of the tool, so an equals sign stands before it."""
    args = tool.parse_args(["polyloss_coco", "--slurm", "lab", "--sbatch-args=--time=1-0"])
    slurm = Slurm.of(args, args.argv)
    assert slurm.options == {"time": "1-0"}
    assert slurm.job(planned("polyloss_coco")[0])[2:4] == ["polyloss_coco", "--only"]


def test_a_job_that_needs_scores_waits_for_the_run_that_gives_them(tmp_path, slurm):
    slurm()
    work = tmp_path / "table"
    jobs = ("--slurm", "lab", "--gpus", 0)
    assert run("shortcut", "--demo", "--seeds", 1, "--work-dir", work, *jobs) == 0
    scripts = [script.read_text() for script in sorted(tmp_path.glob("*.sh"))]
    assert len(scripts) == len(planned("shortcut", "--demo", "--seeds", 1))
    waits = ["dependency=singleton,afterok:7" in script for script in scripts]
    assert waits == [bool(one.needs) for one in planned("shortcut", "--demo", "--seeds", 1)]
    assert any(waits) and not any("gpu" in script for script in scripts)


def test_jobs_do_the_runs(tmp_path):
    """By submitit's processes on this machine: the table is that of the tool by itself."""
    pytest.importorskip("submitit", reason="needs submitit: pip install 'polyfocal[slurm]'")
    options = ("topk_label_noise", "--demo", "--seeds", 1, "--epochs", 1)
    words = [*map(str, options), "--work-dir", str(tmp_path / "jobs")]
    runs = planned(*options)
    local = Slurm("", 0, {}, ["-m", "polyfocal", "reproduce", *words], cluster="local")
    said = []
    jobs = local.submit("topk", runs[:2], tmp_path / "jobs", said.append)
    for job in jobs:
        job.result()
    assert len(said) == 3
    names = [one.name for one in runs[:2]]
    assert run(*options, "--only", *names, "--work-dir", tmp_path / "here") == 0
    for name in names:
        by_job, here = (
            json.loads((tmp_path / place / name / "seed_0" / "result.json").read_text())
            for place in ("jobs", "here")
        )
        assert by_job["measured"] == here["measured"]


def markdown_rows(folder):
    lines = (folder / "table.md").read_text().splitlines()
    cells = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def measured(folder, row, seed=0):
    return json.loads((folder / row / f"seed_{seed}" / "result.json").read_text())["measured"]


def test_a_colour_misleads_a_classifier(tmp_path, capsys):
    """Another split is measured, and losses look up what other rows' models say."""
    names = ["cross_entropy", "shallow", "product_of_experts", "self_confidence_regularization"]
    options = ("shortcut", "--demo", "--epochs", 6, "--seeds", 2, "--work-dir", tmp_path)
    assert run(*options, "--only", *names[:2]) == 0
    capsys.readouterr()
    assert run(*options, "--only", *names) == 0
    out = capsys.readouterr().out
    started = re.findall(r"^\[\d/8\] (\w+), seed (\d)$", out, re.MULTILINE)
    assert started == [(name, seed) for seed in "01" for name in names[2:]], "the others are done"
    header, *rows = markdown_rows(tmp_path).items()
    labels = {name: row.label for name, row in study("shortcut").rows.items()}
    assert [name for name, _ in rows] == [labels[name] for name in names]
    assert header[1][:2] == ["top-1", "top-1, ood"]
    assert all(cell.count("±") == 1 for _, row in rows for cell in row)
    result = json.loads((tmp_path / "cross_entropy" / "seed_0" / "result.json").read_text())
    assert result["settings"]["options"]["variant.spurious"] == 0.95
    numbers = result["measured"]
    assert "many" in numbers, "the shallow model's few pictures are its own"
    assert numbers["top1"] > numbers["ood_top1"] + 0.2, "the cue misleads"
    assert rows[0][1][0].startswith(
        f"{50 * (numbers['top1'] + measured(tmp_path, names[0], 1)['top1']):.1f} ±"
    )
    assert "Epoch(val)" in (tmp_path / "shallow" / "seed_1" / "console.log").read_text()
    assert "Epoch(val)" not in out and "Logging error" not in out


def test_a_colour_misleads_a_detector(tmp_path):
    """Cross-entropy and the product of experts in RetinaNet, both splits measured."""
    mine = tmp_path / "mine.yml"
    mine.write_text(
        f"_base_: {tool.STUDIES / 'shortcut_detection.yml'}\n"
        "scenes: {num_train: 8, num_val: 2, num_ood: 2}\n"
    )
    options = ("--demo", "--seeds", 1, "--epochs", 1, "--work-dir", tmp_path)
    assert run(mine, *options, "--only", "cross_entropy", "product_of_experts") == 0
    numbers = measured(tmp_path, "product_of_experts")
    assert {"bbox_mAP", "ood_bbox_mAP", "bbox_mAP_50"} <= set(numbers)
    ood = json.loads((tmp_path / "data" / "seed_0" / "annotations" / "ood.json").read_text())
    assert len(ood["images"]) == 2


def test_losses_of_a_long_tail(tmp_path, capsys):
    names = ["focal", "imbalanced_noised_top2", "ldam"]
    options = ("long_tail", "--demo", "--seeds", 1, "--epochs", 1, "--work-dir", tmp_path)
    tail = ("--cfg-options", "variant.long_tail=10")
    assert run(*options, "--only", *names, *tail) == 0
    rows = list(markdown_rows(tmp_path))[1:]
    assert rows == ["focal, gamma 2", "imbalanced noised top-2, scale 60, epsilon 0.01", "LDAM"]
    assert "top-2, mean of classes" in (tmp_path / "table.md").read_text()
    assert "macro_top2" in measured(tmp_path, "ldam")
    # Other settings would make another table: they need another folder.
    assert run(*options, "--only", "focal") == 2
    assert "was measured with other settings (options)" in capsys.readouterr().err


def test_results_are_of_a_config_and_of_what_it_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "measure_run", lambda *_, **__: {"top1": 0.5})
    base = f'_base_ = "{ROOT / "configs" / "classification" / "focal.py"}"\n'
    for name in ("own", "other"):
        Path(f"{name}.py").write_text(base)
    Path("mine.yml").write_text("title: A\nconfig: own.py\ncolumns: {top1: top-1}\nrows: {a: }\n")
    options = ("mine.yml", "--demo", "--seeds", 1)
    assert run(*options) == 0 and run(*options, "--config", "other.py") == 0
    tables = [Path("work_dirs/reproduce", name, "table.md") for name in ("mine", "mine_other")]
    for file, name in zip(tables, ("own", "other"), strict=True):
        assert (
            f"Ours: the built-in data, {name}.py, the tiny profile, one seed." in file.read_text()
        )
    Path("own.py").write_text(f"{base}model = dict(loss=dict(gamma=5.0))\n")
    capsys.readouterr()
    assert run(*options) == 2
    said = "a/seed_0/result.json was measured with other settings (what the config says): give"
    assert said in capsys.readouterr().err
    assert run(*options, "--config", "other.py") == 0
    Path("own.py").write_text(f"# a remark\n{base}")
    assert run(*options) == 0


FAIR = """\
title: A
config: configs/classification/cross_entropy.py
columns: {top1: top-1}
fair: {rate: [1, 2], weight: [1, 0.5]}
rows:
  plain:
  poly1: {loss: {type: polyfocal.Poly1CrossEntropyLoss, use_sigmoid: false, epsilon: 1.0}}
"""


def test_a_fair_study_tunes_each_row_and_trains_with_what_it_found(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.yml").write_text(FAIR)
    options = [tmp_path / "mine.yml", "--demo", "--epochs", 1, "--seeds", 2]
    options += ["--work-dir", tmp_path / "out"]
    assert run(*options, "--dry-run") == 0
    assert "2 tunings and 2 rows x 2 seeds = 6 runs, 0 done" in capsys.readouterr().out
    assert run(*options, "--only", "plain/1") == 2
    assert "plain.tuned is not done: name plain with --only, without a seed." in (
        capsys.readouterr().err
    )
    # Stopped in a tuning, it goes on there.
    train, stopped = studies.runs.train_into, []

    def stop(place, *args, **keywords):
        if place.parent.name == "rate_2_weight_1" and not stopped:
            stopped.append(place)
            raise KeyboardInterrupt
        return train(place, *args, **keywords)

    monkeypatch.setattr(studies.runs, "train_into", stop)
    assert run(*options, "--only", "plain") == 130
    assert run(*options, "--only", "plain", "--epochs", 2) == 2
    assert "was measured with other settings (options)" in capsys.readouterr().err
    first = "plain.tuned/seed_0/rate_1_weight_1/seed_0/result.json"
    before = (tmp_path / "out" / first).stat().st_mtime_ns
    assert run(*options, "--only", "plain") == 0 and run(*options) == 0
    assert (tmp_path / "out" / first).stat().st_mtime_ns == before
    out = capsys.readouterr().out
    for row in ("plain", "poly1"):
        found = measured(tmp_path / "out", f"{row}.tuned")
        tried = {
            tuple(map(float, re.findall(r"[\d.]+", place.name))): json.loads(
                (place / "seed_0" / "result.json").read_text()
            )["measured"]["top1"]
            for place in (tmp_path / "out" / f"{row}.tuned" / "seed_0").glob("rate_*")
        }
        assert len(tried) == 3 and found["score"] == max(tried.values())
        assert tried[found["rate"], found["weight"]] == found["score"]
        for seed in (0, 1):
            started = tmp_path / "out" / row / f"seed_{seed}" / "run" / "started.json"
            cfg = json.loads(started.read_text())
            own = read_config(ROOT / "configs" / "classification" / "cross_entropy.py")
            rate = own.optim_wrapper.optimizer.lr * found["rate"]
            assert cfg["optim_wrapper"]["optimizer"]["lr"] == pytest.approx(rate)
            assert cfg["model"]["loss"]["loss_weight"] == found["weight"]
            split = cfg["train_dataloader"]["dataset"]
            assert split.get("held_out") is None, "the whole split is trained on"
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| top-1 against plain | difference | effect |" in text
    assert "| tuned | learning rate x | loss weight x | on the held-out part |" in text
    assert "poly1.tuned, seed 0" in out
    (log,) = re.findall(r"What a run says while it trains: (\S+poly1\S+)", out)
    assert sorted(Path("/").glob(log[1:])), "what a tuning says is in a folder of its factors"


def test_gamma_calibration_and_curvature(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").write_text(
        f"_base_: {tool.STUDIES / 'gamma_softmax.yml'}\ncurvature: {{batches: 1, probes: 2}}\n"
    )
    out = tmp_path / "study"
    names = ("gamma_0", "gamma_2", "penalty_0.0001")
    options = ("mine.yml", "--demo", "--epochs", 1, "--seeds", 1, "--work-dir", out)
    assert run(*options, "--only", *names) == 0
    shown = capsys.readouterr().out
    cross_entropy, focal, penalised = (measured(out, name) for name in names)
    assert cross_entropy["trace"] == cross_entropy["trace_ce"], "gamma 0 is cross-entropy"
    assert 0 < focal["loss"] < focal["loss_ce"] and focal["trace"] != focal["trace_ce"]
    # What was trained is what the folder's config says: the hook and the loss are in it.
    (file,) = {
        file
        for file in (out / "penalty_0.0001" / "seed_0" / "run").glob("*/vis_data/config.py")
        if (file.parent / "scalars.json").is_file()
    }
    config = read_config(file)
    assert config.custom_hooks[-1].type == "polyfocal.TracePenaltyHook"
    assert config.custom_hooks[-1].coefficient == 1e-4
    assert config.model.loss.gamma == 0.0
    assert penalised["trace"] < cross_entropy["trace"]

    header, *rows = markdown_rows(out).items()
    assert header[1][:3] == ["accuracy", "ECE", "trace"]
    assert rows[1][0] == "gamma_2"
    assert rows[1][1][:2] == [f"{100 * focal['top1']:.1f}", f"{100 * focal['ece']:.1f}"]
    assert all(cell in shown for _, row in rows for cell in row)
    with (out / "runs.csv").open() as stream:
        exact = list(csv.DictReader(stream))
    assert [row["name"] for row in exact] == list(names)
    assert float(exact[1]["eigenvalue_ce"]) == focal["eigenvalue_ce"]
    assert (out / "ece.svg").read_text().startswith("<?xml")

    # Cut while one was under way: only that one is done again, and it is the same.
    (out / "gamma_2" / "seed_0" / "result.json").unlink()
    done = (out / "gamma_0" / "seed_0" / "result.json").stat().st_mtime_ns
    assert run(*options, "--only", *names) == 0
    assert (out / "gamma_0" / "seed_0" / "result.json").stat().st_mtime_ns == done
    assert measured(out, "gamma_2") == focal


def test_the_grid_of_gamma():
    rows = study("gamma_sigmoid").rows
    both = {"focal, alpha paired": 2.0, "focal, alpha fixed": 2.0}
    assert rows["gamma_2_alpha_0.25"].series == {**both, "Poly-1": 0.0}
    for table, kind in (
        ("gamma_sigmoid", True),
        ("gamma_softmax", False),
        ("gamma_blood_cells", True),
    ):
        for name, row in study(table).rows.items():
            assert row.loss["use_sigmoid"] is kind
            what, value = name.split("_")[:2]
            found = row.hooks[0]["coefficient"] if what == "penalty" else row.loss[what]
            assert found == float(value)
            alpha = re.search("alpha_(.+)", name)
            if alpha:
                assert row.loss["alpha"] == float(alpha[1])
            if what == "penalty":  # of cross-entropy: where the series begins
                begin = next(
                    r for r in study(table).rows.values() if r.series.get("trace penalty") == 0
                )
                assert row.loss == begin.loss and row.series == {"trace penalty": float(value)}


@pytest.mark.parametrize("name", study_names(tool.STUDIES))
def test_every_row_of_every_study_has_its_loss_in_its_config(name):
    """What a study puts into a config has a place there."""
    if name == "polyloss_lidar":
        pytest.importorskip("mmdet3d", reason="needs MMDetection3D: make setup-3d")
    for row in study(name).rows.values():
        losses = losses_of(read_config(ROOT / row.config).model)
        assert losses and all(key.startswith("model.") for key in losses)


def test_results_of_an_older_study_are_read_or_refused(tmp_path, capsys):
    """Of an older version a paper's table is read; a study that had another form is refused."""
    old = {
        "config": "configs/classification/cross_entropy_noisy.py",
        "data": None,
        "profile": None,
        "demo": True,
        "options": {
            "default_hooks.checkpoint.interval": 1,
            "default_hooks.checkpoint.max_keep_ckpts": 2,
            "train_cfg.max_epochs": 3,
            "train_cfg.val_interval": 3,
        },
    }
    place = tmp_path / "cross_entropy" / "seed_0"
    place.mkdir(parents=True)
    result = {"name": "cross_entropy", "seed": 0, "settings": old}
    result |= {"measured": {"top1": 0.5}, "seconds": 1.0}
    (place / "result.json").write_text(json.dumps(result))
    assert run(*OPTIONS[:-2], "cross_entropy/0", "--work-dir", tmp_path) == 0
    assert "| cross-entropy | top-1 |  | 50.0 |" in (tmp_path / "table.md").read_text()
    result["settings"] = {"topk": 2, "variant": {"long_tail": 100}}
    (place / "result.json").write_text(json.dumps(result))
    assert run("long_tail", "--demo", "--only", "cross_entropy", "--work-dir", tmp_path) == 2
    err = capsys.readouterr().err
    assert "was measured with other settings (config, demo, options, topk, variant): give" in err
