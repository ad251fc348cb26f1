"""A fair comparison of losses: the same small tuning for each, and paired differences.

A loss is not worse because the learning rate and the weight of the loss are another loss's. A
study with the key ``fair`` first finds both for each row, with the same number of trainings, on a
part of the training split that is held out. Then every row is trained on the whole split with what
was found. What is compared are differences of the same seed: their size in units of their own
spread first, then an interval, then p, corrected for the number of comparisons.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyfocal.data.detections import Kind
from polyfocal.experiments.intervals import Interval, ap_intervals
from polyfocal.experiments.report import Table, mean_and_spread, p_text
from polyfocal.experiments.study import (
    FACTORS,
    Difference,
    Outcome,
    Study,
    paired_difference,
    tuned_row,
)
from polyfocal.experiments.trained import KEPT_RESULTS, TrainedRun


def tune_fairly(
    spec: Mapping[str, Any], score: Callable[[dict[str, float]], float]
) -> dict[str, float]:
    """The factors of the learning rate and of the loss weight with the highest score.

    The rate is searched first, at the config's own weight, then the weight at the rate that was
    found. The first of equal scores wins.

    Args:
        spec: The study's ``fair``.
        score: Trains with factors, and returns what the training reaches on the held-out part.

    Returns:
        The factors by the names of :data:`~polyfocal.experiments.study.FACTORS`, and ``score``.
    """
    best = dict.fromkeys(FACTORS, 1.0)
    known: dict[tuple[float, ...], float] = {}
    for name in FACTORS:
        found = {}
        for factor in spec[name]:
            tried = {**best, name: float(factor)}
            key = tuple(tried.values())
            if key not in known:
                known[key] = score(tried)
            found[float(factor)] = known[key]
        best[name] = max(found, key=lambda factor: found[factor])
    return {**best, "score": known[tuple(best.values())]}


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of the p of several comparisons (Holm, 1979); NaN stays NaN."""
    order = sorted((p, place) for place, p in enumerate(ps) if not math.isnan(p))
    corrected = list(ps)
    least = 0.0
    for number, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - number) * p))
        corrected[place] = least
    return corrected


@dataclass(frozen=True)
class Comparison:
    """A row of a study against its first row, by the study's first column.

    Attributes:
        row: Name of the row.
        difference: Seed by seed.
        interval: 95% interval of the difference over pictures and seeds; None where the runs keep
            no detections, or the seeds have no pictures in common.
        p: Corrected for the number of rows.
    """

    row: str
    difference: Difference
    interval: Interval | None
    p: float

    @property
    def effect(self) -> float:
        """The mean difference in units of its spread over the seeds (Cohen's d of pairs)."""
        spread = self.difference.spread
        return self.difference.mean / spread if spread > 0 else math.nan


def compare_rows(
    study: Study,
    outcomes: Sequence[Outcome],
    folder: Path,
    read: Callable[[Path], TrainedRun],
) -> list[Comparison]:
    """Every row against the first one, over the seeds that both have.

    Args:
        study: The study.
        outcomes: The outcomes so far.
        folder: The folder of the study.
        read: Reads the work directory of a run; see
            :func:`polyfocal.experiments.comparing.compare`.
    """
    baseline, *rows = study.rows
    column = next(iter(study.columns))
    seeds = {
        name: {one.run.seed for one in outcomes if one.run.name == name and column in one.measured}
        for name in study.rows
    }
    found = []
    for name in rows:
        shared = sorted(seeds[name] & seeds[baseline])
        if not shared:  # not done, or without such a number: the study's own table shows that
            continue
        difference = paired_difference(outcomes, name, baseline, column)
        places = {
            row: [folder / row / f"seed_{seed}" / "run" for seed in shared]
            for row in (name, baseline)
        }
        found.append((name, difference, _interval(column, places[name], places[baseline], read)))
    ps = holm([difference.p for _, difference, _ in found])
    return [Comparison(*one, p) for one, p in zip(found, ps, strict=True)]


def _interval(
    column: str, ours: list[Path], theirs: list[Path], read: Callable[[Path], TrainedRun]
) -> Interval | None:
    kinds: dict[str, Kind] = {"bbox_mAP": "bbox", "segm_mAP": "segm"}
    kind = kinds.get(column)
    files = [[run / f"{KEPT_RESULTS}.{kind}.json" for run in runs] for runs in (ours, theirs)]
    if kind is None or not all(file.is_file() for one in files for file in one):
        return None
    first, *others = (read(run) for run in (*ours, *theirs))
    file = first.annotation_file
    if file is None or not file.is_file():
        return None
    if not all(first.evaluated_as(other) for other in others):  # each seed has its own pictures
        return None
    return ap_intervals(first.truth(file), *files, kind=kind, max_dets=first.max_dets).mean


def tuned_table(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """What the tuning of each row found."""
    found = {one.run.name: one.measured for one in outcomes if one.run.tunes}
    scale = study.scale_of(next(iter(study.columns)))
    rows = [
        [
            row.label,
            *(f"{one[name]:g}" for name in FACTORS),
            mean_and_spread(scale * one["score"]),
        ]
        for name, row in study.rows.items()
        if (one := found.get(tuned_row(name))) is not None
    ]
    header = ("tuned", "learning rate x", "loss weight x", "on the held-out part")
    return Table(header, rows)


def fair_tables(
    study: Study,
    outcomes: Sequence[Outcome],
    folder: Path,
    read: Callable[[Path], TrainedRun],
) -> list[Table]:
    """The tables of a fair study beside its own: the comparisons, and what the tunings found."""
    if not study.fair:
        return []
    found = compare_rows(study, outcomes, folder, read)
    tables = [comparison_table(study, found)] if found else []
    return [*tables, tuned_table(study, outcomes)]


def comparison_table(study: Study, found: Sequence[Comparison]) -> Table:
    """The comparisons for people, in the study's unit."""
    (column, title), *_ = study.columns.items()
    scale = study.scale_of(column)
    rows = []
    for one in found:
        ends = (one.interval.low, one.interval.high) if one.interval else (math.nan, math.nan)
        difference = one.difference
        rows.append(
            [
                study.rows[one.row].label,
                mean_and_spread(scale * difference.mean, scale * difference.spread, sign="+"),
                mean_and_spread(one.effect, sign="+"),
                "" if math.isnan(ends[0]) else f"{scale * ends[0]:+.1f} to {scale * ends[1]:+.1f}",
                *(p_text(p) for p in (difference.p, one.p)),
            ]
        )
    against = study.rows[next(iter(study.rows))].label
    header = (f"{title} against {against}", "difference", "effect", "95%", "p", "p of Holm")
    return Table(header, rows)
