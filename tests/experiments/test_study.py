"""A study does each run once, and its table has the mean and the spread over the seeds."""

import json
import math

import pytest

from polyfocal.errors import UserError
from polyfocal.experiments.study import (
    Outcome,
    Run,
    finished,
    paired_difference,
    read_study,
    run_study,
    summarize,
)

RUNS = [
    Run(name, seed, {"gamma": gamma})
    for seed in (0, 1, 2)
    for name, gamma in (("ce", 0.0), ("focal", 2.0))
]


def measure(run, place):
    assert place.is_dir()
    return {"top1": 0.5 + run.settings["gamma"] / 10 + run.seed / 100}


def quiet(line):
    pass


def test_mean_and_spread(tmp_path):
    outcomes = run_study(RUNS, measure, tmp_path, quiet)
    assert [outcome.run for outcome in outcomes] == RUNS
    summary = summarize(outcomes)
    assert summary["ce"]["top1"] == pytest.approx((0.51, 0.01))
    assert summary["focal"]["top1"] == pytest.approx((0.71, 0.01))


def test_goes_on_where_it_stopped(tmp_path):
    done = []

    def counted(run, place):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(run)
        return measure(run, place)

    with pytest.raises(KeyboardInterrupt):
        run_study(RUNS, counted, tmp_path, quiet)
    assert not (RUNS[4].folder(tmp_path) / "result.json").exists()
    lines = []
    outcomes = run_study(RUNS, measure, tmp_path, lines.append)
    assert [line for line in lines if ":" not in line] == [
        "[5/6] ce, seed 2",
        "[6/6] focal, seed 2",
    ]
    assert summarize(outcomes) == summarize(run_study(RUNS, None, tmp_path, quiet))


def test_refuses_results_of_other_settings(tmp_path):
    run_study(RUNS, measure, tmp_path, quiet)
    other = [Run("ce", 0, {"gamma": 1.0})]
    with pytest.raises(UserError, match=r"ce.seed_0.result.json was measured with .*\(gamma\)"):
        run_study(other, measure, tmp_path, quiet)
    for damaged in ([1], {"settings": 1, "measured": {}, "seconds": 1}, {"settings": {}}):
        (RUNS[0].folder(tmp_path) / "result.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="is not the result of a run"):
            run_study(RUNS, measure, tmp_path, quiet)
    with pytest.raises(UserError, match="two runs of the same name and seed"):
        run_study([RUNS[0], RUNS[0]], measure, tmp_path / "new", quiet)


def test_refuses_results_of_a_config_that_was_changed(tmp_path):
    """A result of an older version, which does not know what its config said, is taken."""
    before, after, unknown = (
        [Run("a", 0, {"gamma": 0.0, **({"content": text} if text else {})})]
        for text in ("before", "after", None)
    )
    run_study(before, measure, tmp_path, quiet)
    assert run_study(before, None, tmp_path, quiet) and run_study(unknown, None, tmp_path, quiet)
    with pytest.raises(UserError, match=r"with other settings \(what the config says\)"):
        run_study(after, None, tmp_path, quiet)
    run_study(unknown, measure, tmp_path / "old", quiet)
    assert run_study(after, None, tmp_path / "old", quiet)


def test_refuses_results_of_data_that_was_changed(tmp_path):
    def run(annotations):
        settings = {"data": "cells", **({"annotations": annotations} if annotations else {})}
        return run_study([Run("a", 0, settings)], lambda *_: {"top1": 0.5}, tmp_path, print)

    run(None)  # of an older version, which kept no such thing
    run("new")
    (tmp_path / "a" / "seed_0" / "result.json").unlink()
    run("old")
    with pytest.raises(UserError, match=r"other settings \(what the data's annotations say\)"):
        run("new")


def test_finished(tmp_path):
    run_study(RUNS[1:3], measure, tmp_path, quiet)
    run_study(RUNS[3:], measure, tmp_path, quiet, writes=False)
    assert [outcome.run for outcome in finished(RUNS, tmp_path)] == RUNS[1:3]


def test_equal_differences_have_no_spread_but_that_of_rounding():
    """0.9, 0.8, 0.7 less 0.8, 0.7, 0.6 are not quite equal in floating point."""

    def difference(ours, theirs):
        rows = {"a": ours, "b": theirs}
        outcomes = [
            Outcome(Run(name, seed), {"top1": value}, 1.0)
            for name, values in rows.items()
            for seed, value in enumerate(values)
        ]
        return paired_difference(outcomes, "a", "b", "top1")

    found = difference((0.9, 0.8, 0.7), (0.8, 0.7, 0.6))
    assert (found.spread, found.p) == (0.0, 0.0) and found.mean == pytest.approx(0.1)
    same = difference((0.1 + 0.2, 0.5), (0.3, 0.5))
    assert same.spread == 0 and math.isnan(same.p)


STUDY = """\
title: A
config: a.py
columns: {top1: top-1}
options: {seed: "{seed}", x: 1}
splits: [ood]
rows:
  plain:
  shallow: {label: a shallow one, options: {x: 2}}
  biased: {loss: {type: B, bias: {file: "{shallow}", x: "{seed}"}}, hooks: [{type: H}]}
"""


def test_reads_a_study_and_plans_it(tmp_path):
    (tmp_path / "mine.yml").write_text(STUDY)
    study = read_study(tmp_path / "mine.yml")
    runs = study.runs([2], demo=True, epochs=3, options={"x": 5})
    assert [(run.name, run.seed) for run in runs] == [
        (name, seed) for seed in (0, 1) for name in ("plain", "shallow", "biased")
    ]
    assert [run.seed for run in study.runs([4, 7], demo=True)[::3]] == [4, 7]
    plain, shallow, biased = (run.settings for run in runs[3:])
    assert plain["options"]["train_cfg.max_epochs"] == 3 and plain["options"]["x"] == 5
    assert study.runs([1], demo=True)[1].settings["options"]["x"] == 2
    assert (plain["config"], plain["splits"]) == ("a.py", ["ood"])
    assert "scores" not in plain and shallow["scores"] and "loss" not in shallow
    assert biased["loss"] == {"type": "B", "bias": {"file": "{shallow}", "x": "{seed}"}}
    assert biased["hooks"] == [{"type": "H"}] and runs[5].needs == {("shallow", 1)}
    # What stands for something is filled in for the run, and is not there for another seed.
    assert runs[3].filled(tmp_path / "plain" / "seed_1")["options"]["seed"] == 1
    file = tmp_path / "shallow" / "seed_1" / "scores.npz"
    place = tmp_path / "biased" / "seed_1"
    with pytest.raises(UserError, match="biased needs the scores of shallow, and there is no"):
        runs[5].filled(place)
    file.parent.mkdir(parents=True)
    file.touch()
    assert runs[5].filled(place)["loss"]["bias"] == {"file": str(file), "x": 1}
    assert runs[5].settings["loss"]["bias"]["file"] == "{shallow}", "a result says no place"


def test_a_key_without_entries_says_nothing(tmp_path):
    (tmp_path / "mine.yml").write_text(
        "title: a\nconfig: a.py\ncolumns: {top1: top-1}\noptions:\nsplits:\n"
        "rows: {b: {options: , loss: , label: }}\n"
    )
    study = read_study(tmp_path / "mine.yml")
    (one,) = study.runs([1], demo=True)
    assert study.rows["b"].label == "b" and "splits" not in one.settings


def test_a_study_can_change_another(tmp_path):
    (tmp_path / "base.yml").write_text(STUDY)
    (tmp_path / "mine.yml").write_text(
        "_base_: base.yml\ntitle: B\nrows: {plain: null, shallow: {options: {y: 3}}, c: {}}\n"
    )
    study = read_study(tmp_path / "mine.yml", config="b.py")
    assert (study.name, study.title) == ("mine", "B") and study.columns == {"top1": "top-1"}
    assert list(study.rows) == ["shallow", "biased", "c"]
    assert study.rows["shallow"].options == {"x": 2, "y": 3}
    assert {row.config for row in study.rows.values()} == {"b.py"}


ROW = "title: a\ncolumns: {}\nrows: {a: "


def test_recalls_at_the_limit_of_the_data(tmp_path):
    """With up to 170 objects in a picture a data set is evaluated at 200 detections."""
    file = tmp_path / "study.yml"
    file.write_text(
        "title: t\nconfig: c.py\n"
        "columns: {bbox_mAP: AP, bbox_AR@100: box AR, segm_AR@100: mask AR, trace: trace}\n"
        "rows: {ce: {label: ce, published: {bbox_AR@100: 47.2}}}\n"
    )
    study = read_study(file)
    usual = {"bbox_mAP": 0.2, "bbox_AR@10": 0.2, "bbox_AR@100": 0.3, "bbox_AR@1000": 0.4}
    dense = {"bbox_mAP": 0.2, "bbox_AR@10": 0.2, "bbox_AR@200": 0.4, "segm_AR@10": 0.2}
    run = Run("ce", 0, {})
    assert study.at_the_limit_of([]) == study
    assert study.at_the_limit_of([Outcome(run, usual, 1.0)]) == study
    found = study.at_the_limit_of([Outcome(run, dense, 1.0)])
    assert found.columns == {
        "bbox_mAP": "AP",
        "bbox_AR@200": "box AR at 200",
        "segm_AR@100": "mask AR",
        "trace": "trace",
    }
    assert found.rows["ce"].published == {"bbox_AR@200": 47.2}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rows: 3", "is not a study"),
        ("title: [", "is not a study"),
        ("", "is not a study"),
        ("title: a\ncolumns: {}\nrows: {}", "it has no rows"),
        (ROW + "{label: a}}", "rows without a config"),
        (ROW + "{config: b, away: c}}", "away"),
        (ROW + "{config: b, published: {x: 1}}}", "publishes x, which is none of its columns"),
        (ROW + "{config: b, loss: {file: '{away}'}}}", "a loss looks up away, which is no row"),
        (ROW + "{config: b, options: [1]}}", r"options is \[1\], not a mapping"),
        (ROW + "{config: b}}\nsplits: ood", "splits is 'ood', not a list"),
        ("_base_: away.yml", "away.yml"),
        ("_base_: mine.yml", "mine.yml is not a study: it is its own _base_"),
    ],
)
def test_refuses_a_file_that_is_no_study(text, sentence, tmp_path):
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_study(tmp_path / "mine.yml")
