"""The study over gamma, epsilon and the penalty, on scikit-learn's digits."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from mmengine.config import Config

from polyfocal.experiments.study import Outcome, Run

ROOT = Path(__file__).parents[2]
CLASSIFIER = ROOT / "configs" / "classification" / "cross_entropy.py"
RETINANET = ROOT / "configs" / "retinanet_focal.py"
spec = importlib.util.spec_from_file_location("tool_study", ROOT / "tools" / "gamma_study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

FEW = ("--demo", "--epochs", 1, "--batches", 1, "--probes", 2, "--seeds", 0, "--epsilons")


def run(*arguments):
    return study.main([str(argument) for argument in arguments])


def options(*arguments):
    return study.parse_args([str(RETINANET), "--out", "x", *arguments])


def test_study_of_a_classifier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "study"
    arguments = (CLASSIFIER, "--out", out, *FEW, "--gammas", 0, 2, "--penalties", 1e-4)
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    results = {
        name: json.loads((out / name / "seed_0" / "result.json").read_text())
        for name in ("gamma_0", "gamma_2", "penalty_0.0001")
    }
    cross_entropy, focal, penalised = (result["measured"] for result in results.values())
    assert cross_entropy["trace"] == cross_entropy["trace_ce"], "gamma 0 is cross-entropy"
    assert 0 < focal["loss"] < focal["loss_ce"] and focal["trace"] != focal["trace_ce"]
    # What was trained is what the folder's config says: the hook and the loss are in it.
    config = Config.fromfile(out / "penalty_0.0001" / "seed_0" / "penalty_0.0001_seed_0.py")
    assert config.custom_hooks[-1].type == "polyfocal.TracePenaltyHook"
    assert config.custom_hooks[-1].coefficient == 1e-4
    assert config.model.loss.gamma == 0.0
    assert penalised["trace"] < cross_entropy["trace"]

    table = (out / "table.md").read_text()
    assert table.splitlines()[0].startswith("| | accuracy | ECE | trace |")
    assert f"| gamma_2 | {100 * focal['top1']:.1f} | {100 * focal['ece']:.1f} |" in table
    assert table in shown
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(results)
    assert float(rows[1]["eigenvalue_ce"]) == focal["eigenvalue_ce"]
    assert (out / "ece.svg").read_text().startswith("<?xml")

    # Cut while one was under way: only that one is done again, and it is the same.
    (out / "gamma_2" / "seed_0" / "result.json").unlink()
    done = (out / "gamma_0" / "seed_0" / "result.json").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert (out / "gamma_0" / "seed_0" / "result.json").stat().st_mtime_ns == done
    again = json.loads((out / "gamma_2" / "seed_0" / "result.json").read_text())["measured"]
    assert again == focal


def test_grid_of_a_detector():
    args = options("--gammas", "0", "0.5", "2", "3", "--epsilons", "-1", "--penalties", "1e-3")
    cells = study.grid(args, use_sigmoid=True)
    assert list(cells) == [
        *("gamma_0_alpha_0.75", "gamma_0_alpha_0.25", "gamma_0.5_alpha_0.5"),
        *("gamma_0.5_alpha_0.25", "gamma_2_alpha_0.25", "gamma_3_alpha_0.25"),
        *("epsilon_-1", "penalty_0.001"),
    ]
    both = {"focal, alpha paired": 2.0, "focal, alpha fixed": 2.0}
    assert cells["gamma_2_alpha_0.25"]["series"] == {**both, "Poly-1": 0.0}
    assert cells["gamma_0_alpha_0.25"]["series"] == {"focal, alpha fixed": 0.0}
    plain = {"focal, alpha paired": 0.0, "trace penalty": 0.0}
    assert cells["gamma_0_alpha_0.75"]["series"] == plain
    assert cells["penalty_0.001"]["series"] == {"trace penalty": 0.001}
    poly, penalised = cells["epsilon_-1"]["loss"], cells["penalty_0.001"]["loss"]
    assert poly == {"type": "polyfocal.Poly1FocalLoss", "epsilon": -1, "use_sigmoid": True}
    assert (penalised["gamma"], penalised["alpha"]) == (0, 0.75)
    softmax = study.grid(args, use_sigmoid=False)
    assert [cell["loss"].get("alpha", 0) for cell in softmax.values()] == [None] * 4 + [0, None]
    assert softmax["gamma_0"]["series"] == {"focal": 0.0, "Poly-1": 0.0, "trace penalty": 0.0}


@pytest.mark.parametrize(
    ("config", "count"),
    [("retinanet_focal", 1), ("mask_rcnn_ce", 1), ("cascade_mask_rcnn_poly1", 3)],
)
def test_where_the_losses_are(config, count):
    model = Config.fromfile(ROOT / "configs" / f"{config}.py").model
    places = study.losses_of(model)
    assert len(places) == count and all("type" in parent[key] for parent, key in places)


def test_detector_configs_are_written_with_the_loss(tmp_path):
    ours = study.Study(options())
    assert ours.use_sigmoid
    loss = {**study.focal(5.0, 0.25), "use_sigmoid": True}
    written = Config.fromfile(ours._write(tmp_path / "a.py", loss))
    assert written.model.bbox_head.loss_cls == {**loss, "loss_weight": 1.0}
    assert written.val_evaluator.type == "polyfocal.CalibrationMetric"
    assert written.train_dataloader == Config.fromfile(RETINANET).train_dataloader


def test_mean_and_spread(tmp_path):
    outcomes = [
        Outcome(Run("gamma_2", seed), {"bbox_mAP": ap, "trace": trace, "only": 1.0}, 1.0)
        for seed, ap, trace in ((0, 0.40, 820.0), (1, 0.42, 860.0))
    ]
    study.write_tables(outcomes, {"gamma_2": {"series": {"focal": 2.0}}}, tmp_path)
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| | AP | trace |",
        "|---|---:|---:|",
        "| gamma_2 | 41.0 ± 1.4 | 840 ± 28 |",
    ]


def test_rank_correlations(tmp_path):
    # By hand: seed 0 falls as the trace falls (rho 1); in seed 1 one of three pairs is out of order
    # (ranks 1 2 3 against 1 3 2, rho 1 - 6 x 2 / (3 x 8) = 0.5). trace_ce rises where trace falls.
    ece = {0: (0.3, 0.2, 0.1), 1: (0.3, 0.1, 0.2)}
    outcomes = [
        Outcome(Run(f"g{i}", seed), {"ece": ece[seed][i], "trace": 9.0 - i, "trace_ce": 1.0 + i}, 1)
        for seed in ece
        for i in range(3)
    ]
    # The order of the cells is not that of the values, and a series of two has no correlation.
    cells = {f"g{i}": {"series": {"focal": i, **({"two": i} if i else {})}} for i in (2, 0, 1)}
    study.write_tables(outcomes, cells, tmp_path)
    assert (tmp_path / "table.md").read_text().splitlines()[-3:] == [
        "| rank correlation with | trace | trace (cross-entropy) |",
        "|---|---:|---:|",
        "| focal: ECE | +0.75 ± 0.35 | -0.75 ± 0.35 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["away.py", "--out", "x"], "there is no config away.py"),
        ([RETINANET, "--out", "x", "--demo", "--data", "y"], "give one of them"),
        ([RETINANET, "--out", "x", "--penalties", "0"], "--penalties takes numbers above 0, got 0"),
        (
            [RETINANET, "--out", "x", "--gammas", "-1"],
            "--gammas takes numbers of 0 or more, got -1",
        ),
        (
            [RETINANET, "--out", "x", "--gammas", "--epsilons", "--penalties"],
            "the grid is empty",
        ),
        ([RETINANET, "--out", "x", "--data", "away"], "tools/train.py: .*away"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(sentence, err)
