"""A fair study tunes each row with the same budget, and says how certain its differences are."""

import math
from pathlib import Path

import pytest

from polyfocal.errors import UserError
from polyfocal.experiments.fair import (
    compare_rows,
    comparison_table,
    fair_tables,
    holm,
    tune_fairly,
)
from polyfocal.experiments.report import remarks
from polyfocal.experiments.study import Outcome, read_study, run_study
from polyfocal.experiments.trained import TrainedRun

STUDY = """\
title: A
config: a.py
columns: {top1: top-1, ece: ECE}
fair: {rate: [1, 0.5, 2], weight: [1, 4]}
rows:
  plain:
  other: {label: another}
"""


def study(tmp_path, text=STUDY):
    (tmp_path / "mine.yml").write_text(text)
    return read_study(tmp_path / "mine.yml")


def test_the_rate_is_searched_first_and_then_the_weight_at_it():
    tried = []

    def score(factors):
        tried.append((factors["rate"], factors["weight"]))
        return -abs(math.log2(factors["rate"]) - 1) - abs(math.log2(factors["weight"]) - 2)

    spec = {"rate": [1, 0.5, 2], "weight": [1, 4], "by": "top1"}
    assert tune_fairly(spec, score) == {"rate": 2.0, "weight": 4.0, "score": 0.0}
    # Nothing is trained twice: 3 + 2 - 1.
    assert tried == [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (2.0, 4.0)]
    assert tune_fairly(spec, lambda _: 0.5) == {"rate": 1.0, "weight": 1.0, "score": 0.5}


def test_holm():
    """By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and no p below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.6, math.nan, 0.7])
    assert corrected[::2] == [1.0, 1.0] and math.isnan(corrected[1])
    assert holm([]) == []


def test_tunings_come_first_and_the_runs_need_them(tmp_path):
    runs = study(tmp_path).runs([2], demo=True)
    assert [(run.name, run.seed) for run in runs[:2]] == [("plain.tuned", 0), ("other.tuned", 0)]
    assert [run.tunes for run in runs] == [True, True, *[False] * 4]
    plain = runs[2]
    assert plain.settings["fair"] == {"rate": [1, 0.5, 2], "weight": [1, 4], "by": "top1"}
    assert plain.needs == {("plain.tuned", 0)} and runs[0].needs == set()
    # The name of a row stands for its tuning too, a row with a seed for itself.
    assert "plain" in runs[0].names and "plain/0" not in runs[0].names
    place = plain.folder(tmp_path)
    with pytest.raises(
        UserError, match=r"plain takes the learning rate .* plain.tuned is not done"
    ):
        plain.factors(place)
    found = {"rate": 2.0, "weight": 4.0, "score": 0.7}
    run_study(runs[:1], lambda run, place: found, tmp_path, lambda line: None)
    assert plain.factors(place) == {"rate": 2.0, "weight": 4.0}
    assert runs[0].factors(runs[0].folder(tmp_path)) == {}


def test_differences_effects_and_corrected_p(tmp_path):
    """Differences of 2, 3 and 4 per cent: mean 3, deviation 1, t = 3 sqrt(3), 2 degrees."""
    mine = study(tmp_path)
    runs = mine.runs([3], demo=True)
    measured = {"plain": (0.5, 0.5, 0.5), "other": (0.52, 0.53, 0.54)}
    outcomes = [
        Outcome(run, {"rate": 2.0, "weight": 0.5, "score": 0.45}, 1.0)
        if run.tunes
        else Outcome(run, {"top1": measured[run.name][run.seed], "ece": 0.1}, 1.0)
        for run in runs
    ]
    (found,) = compare_rows(mine, outcomes, tmp_path, None)
    assert found.effect == pytest.approx(3) and found.interval is None
    t = 3 * math.sqrt(3)
    expected = 1 - t / math.sqrt(2 + t**2)  # Student's p with 2 degrees of freedom, in closed form
    assert found.difference.p == pytest.approx(expected) and found.p == found.difference.p
    table = comparison_table(mine, [found])
    assert table.header[0] == "top-1 against plain"
    assert table.rows == [["another", "+3.0 ± 1.0", "+3.0", "", "0.035", "0.035"]]
    comparisons, tuned = fair_tables(mine, outcomes, tmp_path, None)
    assert comparisons == table
    assert tuned.rows == [["plain", "2", "0.5", "45.0"], ["another", "2", "0.5", "45.0"]]
    said = " ".join(remarks(mine, runs, len(outcomes)))
    assert "3 seeds" in said and "by 4 trainings at most" in said and "(Holm)" in said
    assert fair_tables(mine, outcomes[:2], tmp_path, None) == [tuned]


@pytest.mark.parametrize(
    ("fair", "sentence"),
    [
        ("{rate: [1, 2]}", "fair.weight is None: expected a list of factors above 0, with 1 in it"),
        ("{rate: [2], weight: [1]}", r"fair.rate is \[2\]: expected"),
        ("{rate: [1, 0], weight: [1]}", r"fair.rate is \[1, 0\]: expected"),
        ("{rate: [1, x], weight: [1]}", "fair.rate is"),
        ("{rate: [1], weight: [1], gamma: [1]}", "fair has gamma: expected rate and weight"),
    ],
)
def test_refuses(tmp_path, fair, sentence):
    text = STUDY.replace("{rate: [1, 0.5, 2], weight: [1, 4]}", fair)
    with pytest.raises(UserError, match=sentence):
        study(tmp_path, text)


def test_refuses_a_loss_that_looks_up_scores(tmp_path):
    text = STUDY + '  third: {loss: {type: B, bias: {file: "{plain}"}}}\n'
    with pytest.raises(UserError, match="the loss of third looks up the scores of another row"):
        study(tmp_path, text)


def test_the_interval_is_that_of_the_detections_that_the_runs_keep(tmp_path, monkeypatch):
    mine = study(tmp_path, STUDY.replace("top1: top-1", "bbox_mAP: AP"))
    outcomes = [
        Outcome(run, {"bbox_mAP": 0.3 + 0.1 * (run.name == "other")}, 1.0)
        for run in mine.runs([2], demo=True)
        if not run.tunes
    ]
    asked = []

    def intervals(truth, ours, theirs, kind, max_dets):
        asked.append((truth.source, ours, theirs, kind, max_dets))
        return type("Found", (), {"mean": (0.1, 0.05, 0.2)})

    truth = tmp_path / "val.json"
    of_seed = [tmp_path / "seed_0.json", tmp_path / "seed_1.json"]
    for number, file in enumerate(of_seed):
        file.write_text(str(number))

    def trained(place, file=truth):
        val = {"dataset": {"ann_file": str(file)}}
        evaluator = [{"type": "Other"}, {"type": "CocoMetric", "max_dets": 300}]
        return TrainedRun(place, {"val_dataloader": val, "val_evaluator": evaluator}, [], [])

    def trained_on_scenes(place):
        return trained(place, of_seed[int(place.parent.name[-1])])

    monkeypatch.setattr("polyfocal.experiments.fair.ap_intervals", intervals)
    assert compare_rows(mine, outcomes, tmp_path, trained)[0].interval is None
    for run in (one.run for one in outcomes):
        file = run.folder(tmp_path) / "run" / "val.bbox.json"
        file.parent.mkdir(parents=True)
        file.touch()
    assert compare_rows(mine, outcomes, tmp_path, trained)[0].interval is None
    # Where each seed has its own pictures, no draw of pictures is one for all seeds.
    assert compare_rows(mine, outcomes, tmp_path, trained_on_scenes)[0].interval is None
    assert not asked
    truth.write_text('{"images": [], "annotations": [], "categories": [{"id": 3, "name": "cat"}]}')
    assert compare_rows(mine, outcomes, tmp_path, trained)[0].interval[0] == 0.1
    files = [
        [Path(tmp_path, row, f"seed_{seed}", "run", "val.bbox.json") for seed in (0, 1)]
        for row in ("other", "plain")
    ]
    assert asked == [(str(truth), *files, "bbox", 300)], "as many as the evaluation counted"


def test_a_row_without_the_number_is_left_out(tmp_path):
    mine = study(tmp_path, STUDY + "  third: {}\n")
    outcomes = [
        Outcome(run, {"ece": 0.1} if run.name == "other" else {"top1": 0.5}, 1.0)
        for run in mine.runs([2], demo=True)
        if not run.tunes
    ]
    found = compare_rows(mine, outcomes, tmp_path, None)
    assert [one.row for one in found] == ["third"]
