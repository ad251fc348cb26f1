"""A study does each run once, and its table has the mean and the spread over the seeds."""

import json

import pytest
from rich.console import Console

from polyfocal.errors import UserError
from polyfocal.experiments.study import (
    Run,
    finished,
    run_study,
    study_table,
    summarize,
    write_markdown,
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
    write_markdown(outcomes, ["top1", "away"], tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "|  | top1 | away |",
        "|---|---|---|",
        "| ce | 51.0 ± 1.0 |  |",
        "| focal | 71.0 ± 1.0 |  |",
    ]
    console = Console(width=80)
    with console.capture() as text:
        console.print(study_table(outcomes, ["top1"]))
    assert "71.0 ± 1.0" in text.get()
    write_markdown(outcomes[:1], ["top1"], tmp_path / "one.md")
    assert "| ce | 50.0 |" in (tmp_path / "one.md").read_text(), "one seed has no spread"


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
    (RUNS[0].folder(tmp_path) / "result.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="is not the result of a run"):
        run_study(RUNS, measure, tmp_path, quiet)
    with pytest.raises(UserError, match="two runs of the same name and seed"):
        run_study([RUNS[0], RUNS[0]], measure, tmp_path / "new", quiet)


def test_finished(tmp_path):
    run_study(RUNS[1:3], measure, tmp_path, quiet)
    run_study(RUNS[3:], measure, tmp_path, quiet, writes=False)
    assert [outcome.run for outcome in finished(RUNS, tmp_path)] == RUNS[1:3]
