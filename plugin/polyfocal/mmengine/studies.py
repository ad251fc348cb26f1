"""A run of a study: trains a config with a seed, and measures what the study asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dist import barrier, is_main_process

from polyfocal.data.coco import load_split
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.errors import UserError
from polyfocal.experiments.fair import tune_fairly
from polyfocal.experiments.request import Adapter, Request
from polyfocal.experiments.study import SCORES_FILE, Run, run_study
from polyfocal.mmengine import runs
from polyfocal.mmengine.checkpoint import latest_checkpoint
from polyfocal.mmengine.configs import read_config, type_name, walk
from polyfocal.mmengine.search import innermost_losses
from polyfocal.mmengine.work_dir import short_names
from polyfocal.shipped import config_file

_RATES = ("eta_min", "eta_max")  # of a schedule: learning rates, not factors of one


def measure_run(
    run: Run, place: Path, *, adapter: Adapter, launcher: str = "none"
) -> dict[str, float]:
    """Train a run of a study, and measure what the study asks for.

    An interrupted run continues where it was. Numbers of an evaluation below 0 are left out: for
    the metrics they mean "no ground truth".

    Args:
        run: A run of :meth:`polyfocal.experiments.study.Study.runs`.
        place: Folder of the run.
        adapter: Prepares it, such as :func:`polyfocal.adapters.prepare`.
        launcher: See :func:`polyfocal.mmengine.runs.train_into`.

    Returns:
        The numbers by the names of :class:`polyfocal.experiments.study.Study`.

    Raises:
        UserError: The config, the data or an option is not usable.
    """
    barrier()  # what this run needs of an earlier one has been written by the first process
    settings = run.filled(place)
    config = Path(config_file(settings["config"]))
    data, demo = settings["data"], settings["demo"]
    profile = settings["profile"] or ("tiny" if demo else None)
    if scenes := settings.get("scenes"):
        folder = place.parents[1] / "data" / place.name
        data, demo = write_digit_scenes(folder, DigitScenes(seed=run.seed, **scenes)), False
    loss = loss_options(config, settings.get("loss", {}))
    options = _on_top(loss, settings["options"])

    def prepared(
        more: Mapping[str, Any] | None = None,
        train: bool = True,
        factors: Mapping[str, float] = run.factors(place),
    ) -> Any:
        more = more or {}
        given = {key: value for key, value in options.items() if key not in more} | dict(more)
        frozen = settings.get("freeze", False)
        request = Request(adapter, config, data, profile, demo, given, train, frozen)
        experiment = request.prepare()
        cfg = experiment.config
        save_seldom(cfg)
        hooks = [ConfigDict(hook) for hook in settings.get("hooks", ())]
        if settings.get("scores"):
            loader = ConfigDict(cfg.val_dataloader)
            loader.dataset = ConfigDict(cfg.train_dataloader.dataset, num_samples=None)
            out = str(place / SCORES_FILE)
            hooks.append(ConfigDict(type="polyfocal.StoreScoresHook", out=out, dataloader=loader))
        if hooks:
            cfg.custom_hooks = [*cfg.get("custom_hooks", []), *hooks]
        experiment.use_seed(run.seed)
        if factors:
            use_factors(cfg, **factors)
        return experiment

    def held_out(part: Run, folder: Path) -> dict[str, float]:
        experiment = prepared(factors=part.settings["factors"])
        experiment.hold_out(folder / "split")
        return runs.train_into(folder, experiment, resume=True, launcher=launcher)

    def score(factors: dict[str, float]) -> float:
        name = "_".join(f"{key}_{value:g}" for key, value in factors.items())
        part = Run(name, run.seed, {**run.settings, "factors": factors})
        writes = is_main_process()
        (found,) = run_study([part], held_out, place, lambda _: None, writes=writes)
        if by not in found.measured:
            raise UserError(
                f"the study compares its rows by its first column, {by}, and a run on the held-out "
                f"part measures {', '.join(found.measured) or 'nothing'}: name one of these first."
            )
        if writes:
            print(f"  {name}: {by} {found.measured[by]:.4g}  ({found.seconds:.0f} s)", flush=True)
        return found.measured[by]

    if run.tunes:
        by = settings["fair"]["by"]
        return tune_fairly(settings["fair"], score)

    measured = runs.train_into(place, prepared(), resume=True, launcher=launcher)
    checkpoint = str(latest_checkpoint(place / "run"))
    with runs.console_of(place, resume=True):
        for split in settings.get("splits", ()):
            experiment = prepared(_split_options(config, data, split), train=False)
            runs.start_in(place, experiment, split, resume=True, launcher=launcher)
            numbers = short_names(runs.test(experiment, checkpoint))
            measured |= {f"{split}_{name}": value for name, value in numbers.items()}
        measured = {name: value for name, value in measured.items() if value >= 0}
        if how := settings.get("curvature"):
            # Under cross-entropy itself, not under that of the weight that a row was tuned to.
            experiments = {"": prepared(), "_ce": prepared(_cross_entropy(config), factors={})}
            for suffix, experiment in experiments.items():
                name = f"curvature{suffix}"
                runs.start_in(place, experiment, name, resume=True, launcher=launcher)
                found = runs.curvature(experiment, checkpoint, **how)
                measured[f"trace{suffix}"] = found.trace.value
                measured[f"trace_error{suffix}"] = found.trace.standard_error
                measured[f"eigenvalue{suffix}"] = found.eigenvalues.values[0].item()
                measured[f"loss{suffix}"] = found.loss
    return measured


def save_seldom(cfg: Config) -> None:
    """Where a training counts iterations, save at evaluations: a study's interval is an epoch."""
    saving: Any = cfg.default_hooks.get("checkpoint") or {}
    if not saving.get("by_epoch", True) and saving.get("interval") == 1:
        saving.interval = cfg.train_cfg.get("val_interval", 1000)


def use_factors(cfg: Config, rate: float = 1.0, weight: float = 1.0) -> None:
    """Multiply the learning rate, and the weight of each classification loss, of a config."""
    cfg.optim_wrapper.optimizer.lr *= rate
    for scheduler in walk(cfg.get("param_scheduler")):
        # Those of the momentum have such ends too.
        if "Momentum" not in type_name(scheduler) and scheduler.get("param_name", "lr") == "lr":
            scheduler.update({key: rate * scheduler[key] for key in _RATES if scheduler.get(key)})
    for loss in innermost_losses(cfg).values():
        loss.loss_weight = loss.get("loss_weight", 1.0) * weight


def loss_options(config: Path, loss: Mapping[str, Any]) -> dict[str, Any]:
    """The options that give a config's classification loss other settings, or replace it.

    Args:
        config: The config.
        loss: With a ``type``, the loss that replaces that of each head and takes over its weight.
            An adapter around it stays.

    Raises:
        UserError: The config has no known classification loss, or one with the other activation.
    """
    options: dict[str, Any] = {}
    for place, old in innermost_losses(read_config(config)).items() if loss else ():
        if "type" not in loss:
            options[place] = dict(loss)
            continue
        if "use_sigmoid" in old and loss.get("use_sigmoid", old.use_sigmoid) != old.use_sigmoid:
            raise UserError(
                f"{place} of {config} has use_sigmoid={old.use_sigmoid}, and the study's "
                f"{loss['type']} use_sigmoid={loss['use_sigmoid']}: take a config or a study of "
                "the same kind."
            )
        weight = {key: old[key] for key in ("loss_weight",) if key in old}
        options[place] = {"_delete_": True, **weight, **loss}
    return options


def _on_top(loss: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a loss and others, of which those inside the loss win over it."""
    # MMEngine writes a later option into an earlier one, and replaces what came before it.
    inside = {
        key: value
        for key, value in options.items()
        if any(key.startswith(f"{place}.") for place in loss)
    }
    outside = {key: value for key, value in options.items() if key not in inside}
    return {**outside, **loss, **inside}


def _cross_entropy(config: Path) -> dict[str, Any]:
    """The options that make a config's classification loss cross-entropy."""
    old = next(iter(innermost_losses(read_config(config)).values()))
    sigmoid = bool(old.get("use_sigmoid", False))
    plain = {"type": "polyfocal.FocalLoss", "gamma": 0.0, "alpha": None, "use_sigmoid": sigmoid}
    return loss_options(config, plain)


def _split_options(config: Path, data: str | Path | None, split: str) -> dict[str, Any]:
    """The options that point a test to another split of the data."""
    if "split" in read_config(config).test_dataloader.dataset:  # a classifier's
        return {"test_dataloader.dataset.split": split}
    if data is None:
        raise UserError(f"the study measures on the split {split}: give --data DIR.")
    found = load_split(data, split)
    found.check_same_classes(load_split(data, "val"))
    annotations = str(found.annotation_file.resolve())
    return {
        "test_dataloader.dataset.ann_file": annotations,
        "test_dataloader.dataset.data_prefix.img": f"{found.image_dir.resolve()}/",
        "test_evaluator.ann_file": annotations,
    }
