"""Curvature of a model's training loss: measured during a training, and held down in it."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyfocal import curvature
from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.losses import NoisedTopKLoss, StoredScores
from polyfocal.mmengine.hooks import sample_ids
from polyfocal.mmengine.objects import leaves, unwrapped
from polyfocal.mmengine.registry import HOOKS
from polyfocal.tables import table

_PENALTY = "loss_trace"


def training_loss(model: Any, outputs: dict[str, Any], kind: str | None = None) -> Tensor:
    """One number of what a model returned in the mode ``'loss'``.

    Args:
        model: An MMEngine model.
        outputs: Losses by name.
        kind: ``'cls'``: losses whose names hold "cls"; ``'all'``: the training loss; None means
            'cls' if there are such losses, and otherwise 'all'.

    Raises:
        UserError: The model has no loss of that kind, or there is no such kind.
    """
    _check_kind(kind)
    losses = {k: v for k, v in outputs.items() if "loss" in k and k != _PENALTY}
    classification = {k: v for k, v in losses.items() if "cls" in k}
    if kind == "cls" and not classification:
        raise UserError(f"no loss of the model is called cls: it has {', '.join(losses)}.")
    return model.parse_losses(losses if kind == "all" else classification or losses)[0]


def _check_kind(kind: str | None) -> None:
    if kind not in (None, "cls", "all"):
        raise UserError(f"kind={kind!r} of loss: expected 'cls' or 'all'.")


def fixed_batches(loader: DataLoader, count: int, seed: int = 0) -> list[Any]:
    """Batches of samples that are chosen, and augmented, by the seed alone.

    They are loaded in this process, with their pictures also where a training on kept features
    leaves them unread. The global random generators are left as they were.

    Args:
        loader: Loader of the training data; its data set, collate function and batch size are used.
        count: Number of batches, >= 1; there are fewer if the data set is smaller.
        seed: Seed of the choice and of the augmentation.

    Raises:
        UserError: The count is below 1.
    """
    if count < 1:
        raise UserError(f"batches={count}: expected 1 or more.")
    # With MMDetection's batch samplers the loader itself does not know the batch size.
    dataset: Any = loader.dataset
    sampler: Any = loader.batch_sampler
    size = loader.batch_size or sampler.batch_size
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    chosen = order[: count * size].split(size)
    if len(chosen) > 1 and len(chosen[-1]) < size:
        chosen = chosen[:-1]
    with curvature.seeded(seed), _pictures_read(dataset):
        return [loader.collate_fn([dataset[i] for i in one.tolist()]) for one in chosen]


@contextmanager
def _pictures_read(dataset: Any) -> Iterator[None]:
    """Have the steps of ``--freeze`` that leave pictures unread read them."""
    pipelines = [getattr(leaf, "pipeline", None) for leaf in leaves(dataset)]
    steps = [step for pipeline in pipelines for step in getattr(pipeline, "transforms", ())]
    blanks = [step for step in steps if hasattr(step, "reads_pictures")]
    for step in blanks:
        step.reads_pictures = True
    try:
        yield
    finally:
        for step in blanks:
            step.reads_pictures = False


def batch_losses(
    model: Any, batches: list[Any], kind: str | None = None, *, seed: int = 0
) -> list[Callable[[], Tensor]]:
    """For :class:`polyfocal.curvature.Hessian`: the loss of each batch, a function of the weights.

    The model's data preprocessor, with its augmentation on the device, sees each batch once, here,
    and what it makes of the batch is kept on the model's device. It works with copies, as it and
    the batches are now. What else a loss reads is the same in each call, and left as it was: the
    batch's rows of :class:`~polyfocal.losses.StoredScores`, the noise of a seeded
    :class:`~polyfocal.losses.NoisedTopKLoss`, the model's counts in buffers.

    Args:
        model: An MMEngine model, not wrapped.
        batches: As the data loader gives them.
        kind: See :func:`training_loss`.
        seed: Of what the data preprocessor draws.
    """
    preprocessor = copy.deepcopy(model.data_preprocessor)
    device = next(model.parameters()).device
    with curvature.seeded(seed, device), torch.no_grad(), _first_iteration():
        prepared = [preprocessor(copy.deepcopy(batch), True) for batch in batches]

    def loss_of(number: int, batch: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with _state_fixed(model, number, batch):
                data = copy.deepcopy(batch)  # some heads write into their samples
                named = isinstance(data, dict)
                outputs = model(**data, mode="loss") if named else model(*data, mode="loss")
                return training_loss(model, outputs, kind)

        return loss

    return [loss_of(number, batch) for number, batch in enumerate(prepared)]


@contextmanager
def _first_iteration() -> Iterator[None]:
    """The iteration 0, since MMDetection draws another size of pictures in every tenth."""
    hub = MessageHub.get_current_instance()
    before = hub.get_info("iter")
    hub.update_info("iter", 0)
    try:
        yield
    finally:
        hub.update_info("iter", before)
        if before is None:
            hub.runtime_info.pop("iter")


@contextmanager
def _state_fixed(model: nn.Module, number: int, batch: Any) -> Iterator[None]:
    """Fix what a loss of this package reads beside a batch, and put back what any loss changes."""
    modules = list(model.modules())
    scores = [(one, one._selected) for one in modules if isinstance(one, StoredScores)]
    noise = [(one, one._calls) for one in modules if isinstance(one, NoisedTopKLoss)]
    buffers = [  # MMDetection's Seesaw and GHM losses, for example, count in theirs
        (one, name, buffer)
        for one in modules
        for name, buffer in one._buffers.items()
        if buffer is not None and name not in one._non_persistent_buffers_set
    ]
    try:
        for source, _ in scores:
            source.select(sample_ids(batch, source.key))
        for loss, _ in noise:
            loss._calls = number
        # Another tensor, not another content: a graph may hold the one that the loss has read.
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for source, selected in scores:
            source._selected = selected
        for loss, calls in noise:
            loss._calls = calls
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


@dataclass(frozen=True)
class Curvature:
    """What was measured about a loss surface at a model's weights.

    Attributes:
        parameters: Names of the chosen parameters.
        size: How many numbers these parameters have in all.
        loss: Mean of the losses of the batches.
        eigenvalues: The largest eigenvalues.
        trace: The trace of the Hessian.
        density: The density of the spectrum, if it was asked for.
        seconds: How long it took.
    """

    parameters: tuple[str, ...]
    size: int
    loss: float
    eigenvalues: curvature.Eigenvalues
    trace: curvature.Estimate
    density: curvature.SpectralDensity | None
    seconds: float

    def write(self, file: str | Path, settings: dict[str, Any]) -> None:
        """Write what was measured as JSON, and how.

        Args:
            file: To write.
            settings: Settings of the measurement.

        Raises:
            UserError: It cannot be written.
        """
        numbers: dict[str, Any] = {
            "parameters": list(self.parameters),
            "size": self.size,
            "loss": self.loss,
            "eigenvalues": self.eigenvalues.values.tolist(),
            "eigenvalue_errors": self.eigenvalues.errors.tolist(),
            "steps": self.eigenvalues.steps,
            "trace": self.trace.value,
            "trace_error": self.trace.standard_error,
            "seconds": self.seconds,
        }
        if self.density is not None:
            values, weights = self.density.values.tolist(), self.density.weights.tolist()
            numbers["density"] = {"values": values, "weights": weights}
        numbers["settings"] = settings
        write_text(file, json.dumps(numbers, indent=1) + "\n")

    def table(self) -> Table:
        """What was measured, for a terminal."""
        values, errors = self.eigenvalues.values.tolist(), self.eigenvalues.errors.tolist()
        rows = [
            [f"eigenvalue {number}", f"{value:.5g}", f"{error:.1g}"]
            for number, (value, error) in enumerate(zip(values, errors, strict=True), start=1)
        ]
        rows.append(["trace", f"{self.trace.value:.5g}", f"{self.trace.standard_error:.2g}"])
        rows.append(["loss", f"{self.loss:.5g}", ""])
        title = f"Hessian over {self.size:,} parameters"
        return table(title, ("", "value", "±"), rows, title_justify="left")


def measure_curvature(
    model: nn.Module,
    batches: list[Any],
    *,
    parameters: str | None = None,
    kind: str | None = None,
    top_k: int = 1,
    steps: int = 100,
    probes: int = 16,
    method: str = "hutchinson",
    density: bool = False,
    seed: int = 0,
) -> Curvature:
    """The curvature of a model's training loss at its present weights.

    The model is :func:`polyfocal.curvature.frozen` during the measurement: batch normalisation uses
    its running statistics, and there is no dropout. The model is not changed.

    Args:
        model: An MMEngine model, such as a detector. If several processes train it together, each
            measures the same.
        batches: The batches over whose losses the mean is taken, see :func:`fixed_batches`.
        parameters: A regular expression over names, see
            :func:`polyfocal.curvature.select_parameters`.
        kind: Which of the model's losses, see :func:`training_loss`.
        top_k, steps: See :func:`polyfocal.curvature.eigenvalues`.
        probes, method: See :func:`polyfocal.curvature.trace`.
        density: Estimate the spectral density too.
        seed: Of everything random.

    Raises:
        UserError: See these functions and :class:`polyfocal.curvature.Hessian`.
    """
    model = unwrapped(model)
    return _measure(
        model,
        batch_losses(model, batches, kind, seed=seed),
        parameters=parameters,
        top_k=top_k,
        steps=steps,
        probes=probes,
        method=method,
        density=density,
        seed=seed,
    )


def _measure(
    model: nn.Module,
    losses: list[Callable[[], Tensor]],
    *,
    parameters: str | None,
    top_k: int,
    steps: int,
    probes: int,
    method: str = "hutchinson",
    density: bool = False,
    seed: int,
) -> Curvature:
    start = time.perf_counter()
    with curvature.frozen(model, parameters) as chosen:
        hessian = curvature.Hessian(losses, chosen.values(), seed=seed)
        curvature.check_eigenvalues(top_k, steps, hessian.size)
        curvature.check_trace(probes, method)
        return Curvature(
            parameters=tuple(chosen),
            size=hessian.size,
            loss=hessian.loss(),
            eigenvalues=curvature.eigenvalues(hessian, top_k, steps=steps, seed=seed),
            trace=curvature.trace(hessian, probes, method=method, seed=seed),
            density=curvature.spectral_density(hessian, seed=seed) if density else None,
            seconds=time.perf_counter() - start,
        )


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class CurvatureHook(Hook):
    """Logs the Hessian's largest eigenvalues and trace while a model trains.

    After every ``interval``-th epoch, and the last, the log and the visualizer (TensorBoard too)
    get ``curvature/eigenvalue_1`` to ``_k``, ``curvature/trace``, its ``curvature/trace_error``
    and ``curvature/loss``, always for the same ``batches`` of training pictures in the same sizes,
    which stay on the model's device. Random generators and the model are left as they were, so that
    the training continues as without the hook.

    Args:
        interval: Epochs, >= 1.
        parameters: Regular expression over the names of parameters; None for the classification
            branch of a detector, else the whole model.
        kind: 'cls' or 'all' losses; None for 'cls' where there are such.
        top_k: Number of eigenvalues, >= 1.
        steps: Most products for the eigenvalues.
        probes: Products for the trace, >= 2.
        batches: Batches of the training data, of its batch size.
        seed: Seed of the choice of pictures and of the probes.

    Example:
        >>> custom_hooks = [dict(type='polyfocal.CurvatureHook', interval=2)]
    """

    priority = "LOW"

    def __init__(
        self,
        interval: int = 1,
        parameters: str | None = None,
        kind: str | None = None,
        top_k: int = 1,
        steps: int = 30,
        probes: int = 10,
        batches: int = 2,
        seed: int = 0,
    ) -> None:
        if interval < 1:
            raise UserError(f"CurvatureHook has interval={interval}: expected >= 1.")
        _check_kind(kind)
        curvature.check_eigenvalues(top_k, steps)
        curvature.check_trace(probes)
        if batches < 1:
            raise UserError(f"CurvatureHook has batches={batches}: expected >= 1.")
        self.interval = interval
        self.kind = kind
        self.batches = batches
        self.settings: dict[str, Any] = {
            "parameters": parameters,
            "top_k": top_k,
            "steps": steps,
            "probes": probes,
            "seed": seed,
        }

    def before_train(self, runner: Any) -> None:
        """Load the batches.

        Raises:
            UserError: A setting does not fit the model.
        """
        model, settings = unwrapped(runner.model), self.settings
        seed = settings["seed"]
        batches = fixed_batches(runner.train_dataloader, self.batches, seed)
        self._losses = batch_losses(model, batches, self.kind, seed=seed)
        model.train()  # as the training is about to do
        with curvature.frozen(model, settings["parameters"]) as chosen:
            hessian = curvature.Hessian(self._losses[:1], chosen.values(), seed=seed)
            curvature.check_eigenvalues(settings["top_k"], settings["steps"], hessian.size)
            if self.kind == "cls":
                hessian.loss()  # tells whether the model has such a loss

    def after_train_epoch(self, runner: Any) -> None:
        if not (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            return
        # In every process, since some losses wait for the others.
        measured = _measure(unwrapped(runner.model), self._losses, **self.settings)
        scalars = {
            f"curvature/eigenvalue_{i}": value
            for i, value in enumerate(measured.eigenvalues.values.tolist(), start=1)
        }
        scalars["curvature/trace"] = measured.trace.value
        scalars["curvature/trace_error"] = measured.trace.standard_error
        scalars["curvature/loss"] = measured.loss
        for name, value in scalars.items():
            runner.message_hub.update_scalar(name, value)
        runner.visualizer.add_scalars(scalars, step=runner.epoch + 1)
        shown = "  ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in scalars.items())
        runner.logger.info(
            f"curvature after epoch {runner.epoch + 1} ({measured.size} parameters, "
            f"{measured.seconds:.1f} s): {shown}"
        )


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class TracePenaltyHook(Hook):
    """Adds ``coefficient`` times the Hessian's trace to the training loss of any MMEngine model.

    Every iteration estimates the trace of the chosen loss over the chosen parameters, with
    Hutchinson's random signs. It adds ``loss_trace = coefficient x max(trace, 0)`` to the model's
    dictionary of losses, and logs ``trace`` itself. A negative estimate is not penalised, because a
    surface that is not convex has no least trace: a detector from scratch would follow it down
    without end. The gradient of the penalty goes to all parameters. The Hessian is that of the loss
    as the iteration computes it, with the statistics of the batch. The model needs no subclass, and
    its checkpoint is the same as without the hook.

    Args:
        coefficient: >= 0.
        parameters: Regular expression over the names of parameters; None for the classification
            branch of a detector, else the whole model.
        kind: 'cls' or 'all' losses; None for 'cls' where there are such.
        probes: Random vectors per iteration, >= 1.
        seed: Seed of the random signs.

    Raises:
        UserError: A value is out of its range; the training uses mixed precision; or an operation
            on the way has no second derivative.

    Example:
        >>> custom_hooks = [dict(type='polyfocal.TracePenaltyHook', coefficient=0.01)]
    """

    def __init__(
        self,
        coefficient: float,
        parameters: str | None = None,
        kind: str | None = None,
        probes: int = 1,
        seed: int = 0,
    ) -> None:
        if not coefficient >= 0:
            raise UserError(f"TracePenaltyHook has coefficient={coefficient}: expected >= 0.")
        if probes < 1:
            raise UserError(f"TracePenaltyHook has probes={probes}: expected >= 1.")
        _check_kind(kind)
        self.coefficient = coefficient
        self.parameters = parameters
        self.kind = kind
        self.probes = probes
        self.seed = seed
        self._iteration: int | None = None
        self._handle: Any = None

    def before_train(self, runner: Any) -> None:
        """Attach to the model.

        Raises:
            UserError: See the class.
        """
        if isinstance(runner.optim_wrapper, AmpOptimWrapper):
            raise UserError(
                "TracePenaltyHook differentiates three times, for which half precision is too"
                " coarse: train without AMP (OptimWrapper instead of AmpOptimWrapper)."
            )
        model = unwrapped(runner.model)
        self._chosen = list(curvature.select_parameters(model, self.parameters).values())
        self._handle = model.register_forward_hook(self._add)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._iteration = runner.iter

    def after_train_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        self._iteration = None

    def _add(self, model: nn.Module, _: tuple, outputs: Any) -> Any:
        # Only in a training step: CurvatureHook, for example, asks for the loss too.
        if self._iteration is None or not isinstance(outputs, dict):
            return outputs
        generator = torch.Generator(self._chosen[0].device)
        trace = curvature.hutchinson_trace(
            training_loss(model, outputs, self.kind),
            self._chosen,
            probes=self.probes,
            generator=generator.manual_seed((self.seed << 32) + self._iteration),
        )
        return {**outputs, _PENALTY: self.coefficient * trace.relu(), "trace": trace.detach()}

    def after_train(self, runner: Any) -> None:
        self._handle.remove()
