"""The reproduction tool: tables, plan and arithmetic, and runs that end, stop and go on."""

import copy
import csv
import functools
import importlib.util
import json
import math
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

from polyfocal.errors import UserError
from polyfocal.experiments.study import Outcome, Run
from polyfocal.mmdet.experiment import merge_options, read_config
from polyfocal.mmdet.tiny import walk
from polyfocal.mmengine.hooks import ExactResumeHook

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("tool_reproduce", ROOT / "tools" / "reproduce.py")
tool = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tool  # where its dataclasses look for their annotations
spec.loader.exec_module(tool)

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


def planned(table, *options):
    args = tool.parse_args([table, *map(str, options)])
    return tool.plan(tool.read_table(table), args)


def test_published_numbers():
    assert tool.table_names() == sorted(PUBLISHED)
    for name, rows in PUBLISHED.items():
        table = tool.read_table(name)
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


def outcomes(**rows):
    return [
        Outcome(Run(name, seed), {"bbox_AR@100": value}, 1.0)
        for name, values in rows.items()
        for seed, value in enumerate(values)
    ]


def test_arithmetic():
    table = tool.read_table("polyloss_coco")
    found = tool.lines(table, outcomes(cross_entropy=[0.40, 0.42, 0.44], poly1=[0.43, 0.44, 0.48]))
    assert [(line.row, line.number) for line in found] == [
        (row, number)
        for row in ("cross_entropy", "poly1")
        for number in ("box AP", "box AR", "mask AP", "mask AR")
    ]
    baseline, poly = found[1], found[5]
    assert (baseline.mean, baseline.spread) == pytest.approx((42.0, 2.0))
    assert baseline.difference == pytest.approx(-5.2)  # 42.0 - 47.2
    assert math.isnan(baseline.gain) and math.isnan(baseline.p)
    assert (poly.mean, poly.spread) == pytest.approx((45.0, math.sqrt(7.0)))
    assert (poly.gain, poly.gain_spread, poly.published_gain) == pytest.approx((3.0, 1.0, 2.5))
    # t = 3 / (1 / sqrt(3)) = sqrt(27); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    assert poly.p == pytest.approx(1 - math.sqrt(27 / 29))
    assert tool.cells(poly) == [
        *("Poly-1, epsilon -1", "box AR", "49.7", "45.0 ± 2.6"),
        *("-4.7", "+2.5", "+3.0 ± 1.0", "0.035"),
    ]
    assert tool.cells(found[4]) == ["Poly-1, epsilon -1", "box AP", *[""] * 6], "nothing measured"


def test_pairs_are_those_of_the_same_seed():
    table = tool.read_table("polyloss_coco")
    found = tool.lines(table, outcomes(cross_entropy=[0.40, 0.42, 0.44], poly1=[0.43]))[5]
    assert (found.seeds, found.gain) == (1, pytest.approx(3.0))
    assert math.isnan(found.gain_spread) and math.isnan(found.p), "one seed is no test"


def test_no_difference_between_two_data_sets():
    table = tool.read_table("polyloss_lidar")
    key = "Car_3D_AP40_moderate_strict"
    found = tool.lines(table, [Outcome(Run("focal", 0), {key: 55.0}, 1.0)])
    car = next(line for line in found if line.row == "focal" and line.number == "car 3D")
    assert (car.published, car.mean) == (63.3, 55.0), "KITTI's AP is in per cent already"
    assert math.isnan(car.difference)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["polyloss"], r"no table polyloss: expected one of cyclical_long_tail, polyloss_coco, "),
        (["polyloss_coco", "--demo", "--data", "x"], "--demo is the built-in data set and --data"),
        (["polyloss_coco", "--demo", "--seeds", 0], "--seeds 0: expected at least 1"),
        (["polyloss_coco", "--epochs", 2], "--epochs is for --demo and --profile tiny"),
        (
            ["polyloss_coco", "--only", "poly1/3"],
            r"--only poly1/3: expected ROW .* cross_entropy, ",
        ),
        (["polyloss_coco", "--slurm", "x", "--launcher", "slurm"], "give one of them"),
        (["polyloss_coco", "--data", "/away"], "/away"),
        (["topk_label_noise", "--data", "/away"], "wants /away"),
    ],
)
def test_refuses(arguments, sentence, tmp_path, capsys):
    assert run(*arguments, "--work-dir", tmp_path / "table") == 2
    out, err = capsys.readouterr()
    assert re.search(sentence, err) and err.count("\n") == 1 and "Traceback" not in out + err
    assert not list(tmp_path.rglob("table.*"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rows: 3", "is not a table"),
        ("title: [", "is not a table"),
        ("{title: a, source: b, columns: {}, rows: {a: {label: a, config: b, away: c}}}", "away"),
        (
            "{title: a, source: b, columns: {},"
            " rows: {a: {label: a, config: b, published: {x: 1}}}}",
            "publishes x, which is none of its columns",
        ),
    ],
)
def test_refuses_a_file_that_is_no_table(text, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "TABLES", tmp_path)
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        tool.read_table("mine")


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
    monkeypatch.setattr(tool, "train_and_measure", None)
    assert run(*OPTIONS, "--work-dir", parts) == 0
    assert run(*OPTIONS, "--epochs", 4, "--work-dir", parts) == 2
    assert "was measured with other settings (options)" in capsys.readouterr().err


def test_slurm_gets_a_job_for_each_run_that_is_not_done(tmp_path, capsys, monkeypatch):
    bin_dir, work = tmp_path / "bin", tmp_path / "table"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", str(bin_dir))
    options = ("polyloss_coco", "--data", "my coco", "--seeds", 1, "--work-dir", work)
    slurm = ("--slurm", "lab", "--gpus", 16, "--sbatch-args", "--time=2-0 -A us")
    assert run(*options, *slurm) == 2
    assert "there is none on this machine" in capsys.readouterr().err
    sbatch = bin_dir / "sbatch"
    sbatch.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"file = open({str(tmp_path / 'jobs')!r}, 'a')\n"
        "print(json.dumps(sys.argv[1:]), file=file)\nprint(71)\n"
    )
    sbatch.chmod(0o755)
    done = planned(*options)[0]
    place = done.folder(work)
    place.mkdir(parents=True, exist_ok=True)
    content = {"settings": done.settings, "measured": {"bbox_mAP": 0.4}, "seconds": 1.0}
    (place / "result.json").write_text(json.dumps(content))
    assert run(*options, *slurm) == 0
    assert "poly1, seed 0: job 71" in capsys.readouterr().out
    (job,) = map(json.loads, (tmp_path / "jobs").read_text().splitlines())
    assert job[: job.index("--wrap")] == [
        *("--parsable", "--partition", "lab", "--job-name", "polyloss_coco-poly1-0"),
        *("--dependency", "singleton", "--ntasks", "16", "--ntasks-per-node", "8"),
        *("--gres", "gpu:8", "--cpus-per-task", "5"),
        *("--output", str(work / "poly1" / "seed_0" / "slurm-%j.txt"), "--time=2-0", "-A", "us"),
    ]
    # What the job's shell runs: srun, here one that prints what it gets, and our own command.
    srun = bin_dir / "srun"
    srun.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    srun.chmod(0o755)
    shell = subprocess.run(
        ["/bin/sh", "-c", job[-1]],
        env={**os.environ, "SLURM_JOB_ID": "71"},
        capture_output=True,
        text=True,
        check=True,
    )
    command = json.loads(shell.stdout)
    args = tool.parse_args(command[command.index(str(ROOT / "tools" / "reproduce.py")) + 1 :])
    assert (args.data, args.only, args.launcher) == ("my coco", ["poly1/0"], "slurm")
    (one,) = tool.chosen(planned(*options), args.only)
    assert one.name == "poly1" and Path(args.work_dir) == work
    sbatch.write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    assert run(*options, *slurm) == 2
    assert "sbatch refuses poly1, seed 0: invalid partition" in capsys.readouterr().err
