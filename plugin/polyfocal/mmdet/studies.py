"""One run of a study: a config trained with a seed, evaluated on its val split and on others."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook

from polyfocal.data.files import replace_text
from polyfocal.errors import UserError
from polyfocal.mmdet.command_line import prepare_experiment
from polyfocal.mmdet.experiment import Experiment
from polyfocal.mmdet.runs import join_processes, test, train
from polyfocal.mmengine.checkpoint import latest_checkpoint
from polyfocal.mmengine.work_dir import short_names


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
    launcher: str = "none",
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
        resume: Go on with what an interrupted run has left in ``place/run``, unless it was started
            with another config, which ``started.json`` in there keeps with all settings.
        launcher: How the processes that train together were started, ``"none"`` where there is
            one.

    Returns:
        Numbers by the shortest ends of the metrics' names, such as ``top1`` or ``bbox_mAP``; those
        of other splits as ``<name>_top1``.

    Raises:
        UserError: The config, the data or an option is not usable.
    """
    work_dir = place / "run"
    join_processes(launcher)

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
        cfg.randomness = {"seed": seed}
        if training and is_main_process():
            _start(cfg, work_dir, resume)
        barrier()
        cfg.work_dir = str(work_dir)
        cfg.launcher = launcher
        return experiment

    place.mkdir(parents=True, exist_ok=True)
    log = place / "console.log" if is_main_process() else os.devnull
    with (
        open(log, "a" if resume else "w", encoding="utf-8") as console,
        contextlib.redirect_stdout(console),
    ):
        experiment = prepare({}, training=True)
        # Names of their own: MMEngine hands out what an earlier run of that name has logged.
        experiment.config.experiment_name = f"{place}-train"
        if scores_to is not None:
            _store_scores(experiment.config, scores_to)
        start_from = "auto" if resume else None
        measured = short_names(train(experiment, resume=start_from, hooks=hooks))
        checkpoint = str(latest_checkpoint(work_dir))
        for name, more in (elsewhere or {}).items():
            experiment = prepare(more, training=False)
            experiment.config.experiment_name = f"{place}-{name}"
            numbers = short_names(test(experiment, checkpoint))
            measured.update({f"{name}_{key}": value for key, value in numbers.items()})
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


def _start(cfg: Config, work_dir: Path, resume: bool) -> None:
    """Remove a work directory that is not to go on, and keep the config for the next one to ask."""
    settings = json.dumps(cfg.to_dict(), default=str, indent=1)
    started = work_dir / "started.json"
    same = started.is_file() and started.read_text(encoding="utf-8") == settings
    if not (resume and same):
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        replace_text(started, settings)


def _store_scores(cfg: Any, file: Path) -> None:
    loader = ConfigDict(cfg.val_dataloader)
    loader.dataset = ConfigDict(cfg.train_dataloader.dataset, num_samples=None)
    hook = ConfigDict(type="polyfocal.StoreScoresHook", out=str(file), dataloader=loader)
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), hook]
