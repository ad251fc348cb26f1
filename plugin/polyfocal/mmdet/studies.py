"""One run of a study: a config trained with a seed, evaluated on its val split and on others."""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import find_latest_checkpoint

from polyfocal.errors import UserError
from polyfocal.mmdet.command_line import prepare_experiment
from polyfocal.mmdet.experiment import Experiment
from polyfocal.mmdet.runs import test, train


def train_and_measure(
    config: str | Path,
    place: Path,
    *,
    seed: int,
    data: str | Path | None = None,
    tiny: bool = True,
    demo: bool = False,
    options: Mapping[str, Any] | None = None,
    scores_to: Path | None = None,
    elsewhere: Mapping[str, Mapping[str, Any]] | None = None,
    adapt: Callable[[Experiment], None] | None = None,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
) -> dict[str, float]:
    """Train and measure; what the tools print goes to ``place/console.log``.

    Args:
        config, data, tiny, demo, options: As in
            :func:`polyfocal.mmdet.command_line.prepare_experiment`.
        place: Folder of the run; ``place/run`` is replaced, unless ``resume``.
        seed: Of weights and order.
        scores_to: Where to store what a classifier says of the whole training split, for
            :class:`polyfocal.losses.StoredScores`.
        elsewhere: By a name, the options that point ``test_dataloader`` and ``test_evaluator`` to
            another split.
        adapt: Changes the experiment, after everything else, before each use.
        hooks: Of the training, see :func:`polyfocal.mmdet.runs.train`.
        resume: Go on with what an interrupted run of the same settings has left in ``place/run``.

    Returns:
        Numbers by the last part of the metrics' names, such as ``top1`` or ``bbox_mAP``; those of
        other splits as ``<name>_top1``.

    Raises:
        UserError: The config, the data or an option is not usable.
    """
    work_dir = place / "run"
    if not resume:
        shutil.rmtree(work_dir, ignore_errors=True)

    def prepare(more: Mapping[str, Any], *, training: bool) -> Any:
        experiment = prepare_experiment(
            config,
            data=data,
            tiny=tiny,
            demo=demo,
            # MMEngine writes one option into the value of another: they stay the caller's.
            options=deepcopy({**(options or {}), **more}),
            train=training,
        )
        if adapt is not None:
            adapt(experiment)
        cfg = experiment.config
        cfg.work_dir = str(work_dir)
        cfg.randomness = {"seed": seed}
        cfg.launcher = "none"
        return experiment

    place.mkdir(parents=True, exist_ok=True)
    with (
        open(place / "console.log", "w", encoding="utf-8") as console,
        contextlib.redirect_stdout(console),
    ):
        experiment = prepare({}, training=True)
        # Names of their own: MMEngine hands out what an earlier run of that name has logged.
        experiment.config.experiment_name = f"{place}-train"
        if scores_to is not None:
            _store_scores(experiment.config, scores_to)
        start_from = "auto" if resume else None
        measured = _short_names("", train(experiment, resume=start_from, hooks=hooks))
        checkpoint = find_latest_checkpoint(str(work_dir))
        for name, more in (elsewhere or {}).items():
            experiment = prepare(more, training=False)
            experiment.config.experiment_name = f"{place}-{name}"
            measured.update(_short_names(f"{name}_", test(experiment, checkpoint)))
    return measured


def losses_of(model: Any) -> list[tuple[ConfigDict, str]]:
    """Where in a model's config its classification losses are: a classifier's, or its heads'."""
    if isinstance(model.get("loss"), dict):
        return [(model, "loss")]
    head = model.get("roi_head", model)
    heads = head.get("bbox_head") or head.get("head")
    heads = heads if isinstance(heads, list) else [heads]
    places = [(one, key) for one in heads if one for key in ("loss_cls", "loss") if key in one]
    if not places:
        raise UserError(
            f"a {model.get('type')} has no classification loss that is known here: expected"
            " model.loss, or loss_cls in bbox_head."
        )
    return places


def _store_scores(cfg: Any, file: Path) -> None:
    loader = ConfigDict(cfg.val_dataloader)
    loader.dataset = ConfigDict(cfg.train_dataloader.dataset, num_samples=None)
    hook = ConfigDict(type="polyfocal.StoreScoresHook", out=str(file), dataloader=loader)
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), hook]


def _short_names(prefix: str, measured: Mapping[str, float]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    names: Sequence[str] = [name for name in measured if isinstance(measured[name], int | float)]
    for name in names:
        numbers[prefix + name.split("/")[-1]] = float(measured[name])
    return numbers
