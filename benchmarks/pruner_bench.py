"""Which pruner finds the better setting in the same number of epochs.

``record`` is ``tune.py`` with trials that are never given up. ``replay`` shows the curves of such
searches, in many random orders, to each pruner: a trial costs the epochs that the pruner lets it
have, and the search ends when its epochs are used up. What counts is the last value of the best
trial that was not given up, without the first: that is the config's own setting, whatever is found.

    python benchmarks/pruner_bench.py record CONFIG --data DIR --trials 20 --work-dir SEARCH
    python benchmarks/pruner_bench.py replay SEARCH ... --budget 6 8 10
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)

from polyfocal.commands.tune import main as tune
from polyfocal.experiments import tuning

PRUNERS: dict[str, Callable[[int], BasePruner]] = {
    "none": lambda epochs: NopPruner(),
    "median, from a third": lambda epochs: MedianPruner(n_warmup_steps=-(-epochs // 3)),
    "median, from a third, 2 trials first": lambda epochs: MedianPruner(
        n_startup_trials=2, n_warmup_steps=-(-epochs // 3)
    ),
    "median, from a half": lambda epochs: MedianPruner(n_warmup_steps=-(-epochs // 2)),
    "best quarter, from a third": lambda epochs: PercentilePruner(
        25, n_warmup_steps=-(-epochs // 3)
    ),
    "halving, from a quarter": lambda epochs: SuccessiveHalvingPruner(
        min_resource=-(-epochs // 4), reduction_factor=2
    ),
    "thirds, from a third": lambda epochs: SuccessiveHalvingPruner(
        min_resource=-(-epochs // 3), reduction_factor=3
    ),
    "Hyperband": lambda epochs: HyperbandPruner(
        min_resource=-(-epochs // 4), max_resource=epochs, reduction_factor=2
    ),
}


def curves_of(folder: Path) -> list[list[float]]:
    """The values of each finished trial, epoch by epoch."""
    study = optuna.load_study(
        study_name="tune", storage=f"sqlite:///{folder / tuning.STORAGE_FILE}"
    )
    trials = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    return [[value for _, value in sorted(one.intermediate_values.items())] for one in trials]


def replay(curves: Sequence[Sequence[float]], pruner: BasePruner, budget: int) -> float:
    """The best last value among the later trials that a pruner lets end within so many epochs."""
    study = optuna.create_study(
        direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler()
    )
    best = float("-inf")
    for number, curve in enumerate(curves):
        trial = study.ask()
        for epoch, value in enumerate(curve, start=1):
            if budget == 0:
                return best
            budget -= 1
            trial.report(value, epoch)
            if epoch < len(curve) and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, curve[-1])
            best = max(best, curve[-1]) if number else best
    return best


def main() -> None:
    """Record a search, or replay some."""
    if sys.argv[1:2] == ["record"]:
        setattr(tuning, "pruner", PRUNERS["none"])  # noqa: B010
        sys.exit(tune([*sys.argv[2:], "--seeds", "0"]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("replay", choices=["replay"])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--budget", nargs="+", type=int, default=[6, 8, 10], help="full trainings")
    parser.add_argument("--orders", type=int, default=100)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for folder in args.folders:
        first, *others = curves_of(folder)
        epochs = len(first)
        last = sorted((curve[-1] for curve in (first, *others)), reverse=True)
        print(f"{folder}: {len(last)} trials of {epochs} epochs; the config's own {first[-1]:.4f}")
        print("last values: " + " ".join(f"{value:.4f}" for value in last))
        for name, pruner in PRUNERS.items():
            found = []
            for budget in args.budget:
                best = []
                for order in range(args.orders):
                    shuffled = random.Random(order).sample(others, len(others))
                    best.append(replay([first, *shuffled], pruner(epochs), budget * epochs))
                found.append(fmean(best))
            print(f"{name:40}" + "".join(f"{value:8.4f}" for value in found), flush=True)


if __name__ == "__main__":
    main()
