"""Tables: their arithmetic, and the same texts as Markdown, CSV, HTML and on a terminal."""

import csv
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from polyfocal.experiments.report import (
    Table,
    csv_text,
    draw_series,
    lines,
    page,
    published_table,
    remarks,
    study_tables,
    summary_table,
    write_study,
)
from polyfocal.experiments.study import Outcome, Row, Run, Study, read_study

STUDIES = Path(__file__).parents[2] / "configs" / "studies"


def study(name):
    return read_study(STUDIES / f"{name}.yml")


def test_one_table_everywhere():
    table = Table(("", "a|b"), [["[red]x", "1.0 ± 0.2"], ["<y>", ""]], best={(0, 1)})
    assert table.markdown().splitlines() == [
        "|  | a\\|b |",
        "|---|---:|",
        "| [red]x | 1.0 ± 0.2 |",
        "| <y> |  |",
    ]
    console = Console(width=40)
    with console.capture() as text:
        console.print(table.console())
    assert "[red]x" in text.get() and "1.0 ± 0.2" in text.get() and "a|b" in text.get()
    html = page("<t>", {"Some part": [table, "<p>"], "": ["no link"]}, ["a & b"])
    cells = []
    parser = HTMLParser()
    parser.handle_data = cells.append
    parser.feed(html)
    assert {"<t>", "[red]x", "<y>", "<p>", "a & b", "no link"} <= set(cells)
    assert '<td class="best">1.0 ± 0.2</td>' in html and html.count("href=") == 1
    assert '<a href="#some-part">' in html and '<h2 id="some-part">' in html
    rows = csv.reader(csv_text(["a", "b"], [[1.25, math.nan], ['"', ","]]).splitlines())
    assert list(rows) == [["a", "b"], ["1.25", ""], ['"', ","]]


def test_mean_and_spread_over_seeds():
    outcomes = [
        Outcome(Run("gamma_2", seed), {"bbox_mAP": ap, "trace": trace}, 1.0)
        for seed, ap, trace in ((0, 0.40, 820.0), (1, 0.42, 860.0))
    ]
    columns = {"bbox_mAP": "AP", "trace": "trace", "away": "away"}
    assert summary_table(outcomes, columns).rows == [["gamma_2", "41.0 ± 1.4", "840 ± 28", ""]]
    one = summary_table(outcomes[:1], {"bbox_mAP": "AP"}, labels={"gamma_2": "gamma 2"})
    assert one.rows == [["gamma 2", "40.0"]], "one seed has no spread"


def outcomes(**rows):
    return [
        Outcome(Run(name, seed), {"bbox_AR@100": value}, 1.0)
        for name, values in rows.items()
        for seed, value in enumerate(values)
    ]


def test_arithmetic():
    table = study("polyloss_coco")
    found = lines(table, outcomes(cross_entropy=[0.40, 0.42, 0.44], poly1=[0.43, 0.44, 0.48]))
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
    rows = published_table(found).rows
    assert rows[5] == [
        *("Poly-1, epsilon -1", "box AR", "49.7", "45.0 ± 2.6"),
        *("-4.7", "+2.5", "+3.0 ± 1.0", "0.035"),
    ]
    assert rows[4] == ["Poly-1, epsilon -1", "box AP", *[""] * 6], "nothing measured"
    grouped = published_table(found, grouped=True)
    assert [row[0] for row in grouped.rows[4:7]] == ["  mask AR", "Poly-1, epsilon -1", "  box AP"]
    assert tuple(grouped.header[1:]) == published_table(found).header[2:]
    unpublished = [replace(line, published=math.nan, difference=math.nan) for line in found]
    assert list(published_table(unpublished, grouped=True).header) == [
        *("", "ours", "gain published", "gain ours", "p"),
    ]


def test_pairs_are_those_of_the_same_seed():
    table = study("polyloss_coco")
    found = lines(table, outcomes(cross_entropy=[0.40, 0.42, 0.44], poly1=[0.43]))[5]
    assert (found.seeds, found.gain) == (1, pytest.approx(3.0))
    assert math.isnan(found.gain_spread) and math.isnan(found.p), "one seed is no test"


def test_no_difference_between_two_data_sets():
    table = study("polyloss_lidar")
    key = "Car_3D_AP40_moderate_strict"
    found = lines(table, [Outcome(Run("focal", 0), {key: 55.0}, 1.0)])
    car = next(line for line in found if line.row == "focal" and line.number == "car 3D")
    assert (car.published, car.mean) == (63.3, 55.0), "KITTI's AP is in per cent already"
    assert math.isnan(car.difference)


NO_DATA = {"data": None, "profile": None}


def test_a_table_says_what_it_is_of():
    """The config, which --config may have chosen, and whether the backbone was frozen."""
    mine = study("losses_fair")
    runs = mine.runs([5], data="cells", profile="small", freeze=True)
    said = "Ours: cells, retinanet_focal.py, the small profile with a frozen backbone, 5 seeds."
    assert said in remarks(mine, runs, len(runs))
    other = read_study(STUDIES / "losses_fair.yml", "configs/fcos_focal.py")
    said = "Ours: cells, fcos_focal.py, the configs' models and schedules, one seed."
    assert said in remarks(other, other.runs([1], data="cells"), 0)
    two = study("polyloss_coco")
    assert "Ours: the built-in data, the tiny profile, 5 epochs, one seed." in remarks(
        two, two.runs([1], demo=True), 0
    )


def in_series(series):
    """A study of rows in series, with calibration and curvature."""
    columns = {"top1": "accuracy", "ece": "ECE", "trace": "trace", "trace_ce": "trace (ce)"}
    rows = {name: Row("config", name, series=places) for name, places in series.items()}
    return Study("mine", "Mine", columns, rows)


def test_rank_correlations(tmp_path):
    # By hand: seed 0 falls as the trace falls (rho 1); in seed 1 one of three pairs is out of order
    # (ranks 1 2 3 against 1 3 2, rho 1 - 6 x 2 / (3 x 8) = 0.5). trace_ce rises where trace falls.
    ece = {0: (0.3, 0.2, 0.1), 1: (0.3, 0.1, 0.2)}
    outcomes = [
        Outcome(
            Run(f"g{i}", seed, {"config": "a.py", "options": {}, "demo": True, **NO_DATA}),
            {"top1": 0.5, "ece": ece[seed][i], "trace": 9.0 - i, "trace_ce": 1.0 + i},
            1,
        )
        for seed in ece
        for i in range(3)
    ]
    # The order of the rows is not that of the values, and a series of two has no correlation.
    mine = in_series({f"g{i}": {"focal": i, **({"two": i} if i else {})} for i in (2, 0, 1)})
    _, table = study_tables(mine, outcomes)
    assert table.header == ("rank correlation with", "trace", "trace (ce)")
    assert table.rows == [["focal: ECE", "+0.75 ± 0.35", "-0.75 ± 0.35"]]
    # A row that one seed lacks is in no series: two values are left.
    assert len(study_tables(mine, outcomes[:-1])) == 1
    names = [file.name for file in write_study(mine, [o.run for o in outcomes], outcomes, tmp_path)]
    assert names == ["table.md", "table.html", "table.csv", "runs.csv", "ece.svg"]
    assert (tmp_path / "table.md").read_text().startswith("# Mine\n\n|  | accuracy | ECE |")
    drawn = (tmp_path / "ece.svg").read_text()
    assert drawn.count('id="PathCollection') == 0 and drawn.startswith("<?xml")
    assert draw_series(in_series({"g0": {}}), outcomes[:1], tmp_path) == []
