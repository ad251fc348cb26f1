"""Hooks: losses that learn from more than a batch, and a resume that is exact."""

from collections.abc import Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import IterBasedTrainLoop, set_random_seed
from torch import Tensor, nn

from polyfocal.errors import UserError
from polyfocal.losses import AdaFocalLoss, NoisedTopKLoss, StoredScores
from polyfocal.losses.bias import write_scores
from polyfocal.mmengine.objects import unwrapped
from polyfocal.mmengine.registry import HOOKS


def sample_ids(batch: Any, key: str) -> list[Hashable]:
    """The ids of a batch's samples, in their order.

    Args:
        batch: As the data loader or the data preprocessor gives it.
        key: The attribute of a data sample that is its id.

    Raises:
        UserError: The batch has none.
    """
    samples = batch.get("data_samples") if isinstance(batch, dict) else None
    if samples is None:
        raise UserError(
            f"a batch without data_samples: sample ids are read from their {key!r}, so that the"
            " data set must give it"
        )
    for sample in samples:
        if getattr(sample, key, None) is None:
            raise UserError(
                f"a {type(sample).__name__} of the batch has no {key!r}: name another with key=..."
                " or let the last transform of the pipeline pack it (meta_keys)"
            )
    return [getattr(sample, key) for sample in samples]


def _of_type(model: nn.Module, kind: type[Any]) -> list[tuple[str, Any]]:
    return [
        (name.removeprefix("module."), module)
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]


class LossHook(Hook):
    """A hook that gives losses of a model what they need, from ``before_train`` to ``after_train``.

    A measurement of a checkpoint's loss calls these two as a training does.
    """


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class StoredScoresHook(LossHook):
    """Tells every :class:`~polyfocal.losses.StoredScores` of the model which samples come next.

    Args:
        key: the attribute of a data sample that is its id.

    Example:
        >>> custom_hooks = [dict(type='polyfocal.StoredScoresHook')]
    """

    def __init__(self, key: str = "sample_idx") -> None:
        self.key = key

    def before_train(self, runner: Any) -> None:
        for _, source in _of_type(runner.model, StoredScores):
            source.key = self.key
            source.select([])  # a missing file ends a training before its first step

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        sources = _of_type(runner.model, StoredScores)
        if sources:
            ids = sample_ids(data_batch, self.key)
            for _, source in sources:
                source.select(ids)


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class StoreScoresHook(Hook):
    """Writes the trained model's scores of every training sample: step 1 of self-debiasing.

    Train a model on few samples (``indices`` of MMEngine's data sets) for few epochs with this
    hook. Then train the real model with ``bias=dict(type='polyfocal.StoredScores', file=out)``. The
    model's ``mode='tensor'`` must give logits (N, C).

    Args:
        out: npz to write.
        dataloader: config of a loader over the whole training set, without augmentation.
        key: as in :class:`StoredScoresHook`.
        use_sigmoid: store logsigmoid of the logits instead of log_softmax.
    """

    def __init__(
        self,
        out: str | Path,
        dataloader: dict[str, Any],
        key: str = "sample_idx",
        use_sigmoid: bool = False,
    ) -> None:
        if Path(out).suffix != ".npz":
            raise UserError(f"StoreScoresHook has out={str(out)!r}: expected a name in .npz")
        self.out = Path(out)
        self.dataloader = dataloader
        self.key = key
        self.use_sigmoid = use_sigmoid

    def after_train(self, runner: Any) -> None:
        rows: dict[Hashable, Tensor] = {}
        model = unwrapped(runner.model)
        for batch in _in_eval_mode(model, runner.build_dataloader(self.dataloader)):
            ids = sample_ids(batch, self.key)
            logits = model(**model.data_preprocessor(batch, False), mode="tensor")
            if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(ids):
                raise UserError(
                    f"{type(model).__name__} gives no logits (N, C) with mode='tensor': stored"
                    " scores are for classifiers with one label per sample"
                )
            logits = logits.double()
            scores = torch.log_softmax(logits, dim=1)
            if self.use_sigmoid:
                scores = torch.nn.functional.logsigmoid(logits)
            rows.update(zip(ids, scores.float().cpu(), strict=True))
        parts = all_gather_object(rows)
        if is_main_process():
            rows = {key: row for part in parts for key, row in part.items()}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_scores(self.out, list(rows), torch.stack(list(rows.values())))  # type: ignore[arg-type]
            runner.logger.info(f"wrote the scores of {len(rows)} samples to {self.out}")


def _in_eval_mode(model: nn.Module, loader: Any) -> Iterator[Any]:
    """The batches, with the model in evaluation mode and without gradients while they are used."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield from loader
    finally:
        model.train(training)


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class AdaFocalHook(Hook):
    """Moves the gammas of every :class:`~polyfocal.losses.AdaFocalLoss` after each epoch.

    It runs the model on validation data in evaluation mode with ``mode='loss'``. Each loss then
    sees the rows that it would be trained on, so one hook serves classifiers and the box
    heads of detectors. The gammas are in the checkpoints beside the optimizer's state, not
    among the weights, and come back on resuming.

    Args:
        dataloader: config of a loader whose samples have labels as in training (in a detector: the
            training pipeline without augmentation, on validation pictures). None for the Runner's
            validation loader, which is enough for a classifier.

    Example:
        >>> custom_hooks = [dict(type='polyfocal.AdaFocalHook')]
    """

    _STATE = "polyfocal_adafocal"

    def __init__(self, dataloader: dict[str, Any] | None = None) -> None:
        self.dataloader = dataloader
        self._loader: Any = None

    def before_train(self, runner: Any) -> None:
        if not _of_type(runner.model, AdaFocalLoss):
            raise UserError("AdaFocalHook finds no AdaFocalLoss in the model")
        if self.dataloader is None and runner.val_loop is None:
            raise UserError(
                "AdaFocalHook has no dataloader and the Runner has no validation: give it one"
            )
        self._loader = (
            runner.val_loop.dataloader
            if self.dataloader is None
            else runner.build_dataloader(self.dataloader)
        )

    def after_train_epoch(self, runner: Any) -> None:
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        handles = [
            loss.register_forward_hook(_recorder(seen.setdefault(name, []), loss))
            for name, loss in _of_type(runner.model, AdaFocalLoss)
        ]
        model = unwrapped(runner.model)
        try:
            for batch in _in_eval_mode(model, self._loader):
                model(**model.data_preprocessor(batch, False), mode="loss")
        finally:
            for handle in handles:
                handle.remove()
        for name, loss in _of_type(runner.model, AdaFocalLoss):
            rows = [row for part in all_gather_object(seen[name]) for row in part]
            if not rows:
                raise UserError(f"{name} was not called on the validation data of AdaFocalHook")
            confidence, correct = (torch.cat([row[i] for row in rows]) for i in (0, 1))
            loss.update(confidence, correct)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[self._STATE] = {
            name: {"edges": loss.edges.cpu(), "gammas": loss.gammas.cpu()}
            for name, loss in _of_type(runner.model, AdaFocalLoss)
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        for name, loss in _of_type(runner.model, AdaFocalLoss):
            for key, value in checkpoint.get(self._STATE, {}).get(name, {}).items():
                getattr(loss, key).copy_(value)


def _recorder(rows: list[tuple[Tensor, Tensor]], loss: AdaFocalLoss) -> Any:
    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        pred, target = args[:2]
        confidence, guess = pred.detach().float().softmax(dim=1).max(dim=1)
        counted = torch.ones_like(target, dtype=torch.bool)
        if loss.ignore_index is not None:
            counted = target != loss.ignore_index
        if len(args) > 2 and args[2] is not None:
            counted = counted & (args[2] > 0)
        rows.append((confidence[counted].cpu(), (guess == target)[counted].cpu()))

    return record


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a training that was interrupted and resumed the same, bit for bit, as one that was not.

    The random numbers of Python, NumPy and torch in an epoch depend only on the seed of the run and
    the epoch. So do those of the data loader's workers, which must be new in each epoch:
    ``persistent_workers=False``. In a training without epochs, iterations take their place, but
    workers keep the numbers that they began with; MMEngine lets them catch up. A checkpoint also
    holds the counts of the seeded :class:`~polyfocal.losses.NoisedTopKLoss`.

    Example:
        >>> custom_hooks = [dict(type='polyfocal.ExactResumeHook')]
    """

    priority = "VERY_HIGH"  # before everything that draws at the start of an epoch

    _STATE = "polyfocal_noise_calls"

    def before_train_epoch(self, runner: Any) -> None:
        seed = self._draw_from(runner, runner.epoch)
        loader = runner.train_dataloader
        loader.worker_init_fn = partial(
            worker_init_fn, num_workers=loader.num_workers, rank=get_rank(), seed=seed
        )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self._draw_from(runner, runner.iter)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[self._STATE] = {
            name: loss._calls for name, loss in _of_type(runner.model, NoisedTopKLoss)
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        for name, loss in _of_type(runner.model, NoisedTopKLoss):
            loss._calls = checkpoint.get(self._STATE, {}).get(name, 0)

    @staticmethod
    def _draw_from(runner: Any, step: int) -> int:
        # Sums of seed and epoch would collide: the second epoch of seed 0, the first of seed 1.
        seed = int(np.random.SeedSequence([runner.seed, step]).generate_state(1)[0]) // 2
        different = runner.cfg.get("randomness", {}).get("diff_rank_seed", False)
        set_random_seed(seed, diff_rank_seed=different)
        return seed
