"""Where the scores of a bias model come from: a table, a file, a head that sees only the bias."""

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from polyfocal.errors import UserError
from polyfocal.losses.settings import ExactBuffers


class BiasSource(ExactBuffers, ABC):
    """Gives a debiasing loss the bias model's logits of a batch."""

    @abstractmethod
    def forward(self, pred: Tensor, use_sigmoid: bool) -> Tensor:
        """The bias model's logits for the rows of ``pred``, in its shape.

        Args:
            pred: (N, C), or (N, C, ...) with a map of labels: the main model's logits.
            use_sigmoid: the form of the loss.

        Raises:
            UserError: there are none for these rows.
        """


class ClassPriors(BiasSource):
    """A bias model that knows how frequent the classes are and sees nothing.

    Args:
        class_counts: numbers > 0, one per column of the logits: samples of each class. They are
            divided by their sum. From a config it may also be the path of a COCO file.
    """

    probabilities: Tensor

    def __init__(self, class_counts: Sequence[float] | Tensor) -> None:
        super().__init__()
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
        good = counts.dim() == 1 and len(counts) > 1 and bool((counts > 0).all())
        if not (good and counts.isfinite().all()):
            raise UserError(
                f"class_counts={class_counts}: expected at least two finite numbers > 0, one a"
                " column of the logits"
            )
        self.register_buffer("probabilities", (counts / counts.sum()).float(), persistent=False)

    def forward(self, pred: Tensor, use_sigmoid: bool) -> Tensor:
        if pred.dim() < 2 or pred.shape[1] != len(self.probabilities):
            columns = pred.shape[1] if pred.dim() > 1 else 1
            raise UserError(
                f"ClassPriors has {len(self.probabilities)} classes for logits of {columns}"
                " columns: expected a number per column"
            )
        p = self.probabilities.to(pred.device)
        scores = torch.logit(p) if use_sigmoid else torch.log(p)
        return scores.expand(pred.movedim(1, -1).shape).movedim(-1, 1)


class QueuedLogits(BiasSource):
    """Logits that are offered before the loss is called, and then taken row by row in that order.

    A detector's head calls its loss once, or once per level of its pyramid, always in the order of
    the rows that its classifier made.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ready: list[Tensor] = []

    def offer(self, logits: Sequence[Tensor]) -> None:
        """Makes logits ready for the next calls of the loss.

        Args:
            logits: tensors (N_i, C) in the order of the calls.

        Raises:
            UserError: the loss has not taken all rows that were offered before.
        """
        left = sum(map(len, self._ready))
        self._ready = [] if left else list(logits)
        if left:
            raise UserError(
                f"{type(self).__name__} has {left} rows left from the step before: expected a loss"
                " that is called with every row that its head made, once and in that order"
            )

    def forward(self, pred: Tensor, use_sigmoid: bool) -> Tensor:
        taken: list[Tensor] = []
        missing = len(pred)
        while missing and self._ready:
            first = self._ready.pop(0)
            taken.append(first[:missing])
            if len(first) > missing:
                self._ready.insert(0, first[missing:])
            missing -= len(taken[-1])
        if missing:
            raise UserError(
                f"{type(self).__name__} has logits for {len(pred) - missing} of {len(pred)} rows:"
                " in a detector write custom_hooks=[dict(type='polyfocal.BiasHeadHook')], in a loop"
                " of your own give bias_logits to the loss"
            )
        found = torch.cat(taken) if taken else pred.detach()
        if found.shape != pred.shape:
            raise UserError(
                f"{type(self).__name__} has {found.shape[1]} columns for logits of"
                f" {pred.shape[1]}: check its num_classes, num_anchors and background"
            )
        return found


class BiasHead(QueuedLogits):
    """A small classifier that sees only the bias, trained with the main model or frozen.

    Its features are detached, as in the paper: no gradient goes back to the main model.

    Args:
        num_classes: C.
        sees: 'colour': mean and standard deviation of the three colours under a box or cell;
            'geometry': centre, size and aspect of the box or cell, relative to the picture;
            'features': the main model's features, which makes it a shallow model of the same task.
        num_anchors: anchors of a dense head per place.
        background: add an output for background, the last one, as softmax heads have.
        in_channels: channels of 'features'; for the other values of ``sees`` it is known.
        hidden: units of the one hidden layer.
        frozen: do not train the bias head; load its weights with the model's.

    Example:
        >>> loss_cls = dict(
        ...     type='polyfocal.DebiasedFocalLoss', use_sigmoid=True,
        ...     bias=dict(type='polyfocal.BiasHead', num_classes=80, num_anchors=9, sees='colour'))
        >>> custom_hooks = [dict(type='polyfocal.BiasHeadHook')]
    """

    FEATURES: ClassVar[dict[str, int | None]] = {"colour": 6, "geometry": 5, "features": None}

    def __init__(
        self,
        num_classes: int,
        sees: str,
        num_anchors: int = 1,
        background: bool = False,
        in_channels: int | None = None,
        hidden: int = 32,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if sees not in self.FEATURES:
            raise UserError(f"sees={sees!r}: expected one of {', '.join(self.FEATURES)}")
        width = self.FEATURES[sees] or in_channels
        if not width or (in_channels is not None and in_channels != width):
            raise UserError(
                f"in_channels={in_channels} with sees={sees!r}: write it for 'features' only"
            )
        self.sees = sees
        self.num_anchors = num_anchors
        self.columns = num_classes + background
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_anchors * self.columns)
        )
        if not background:
            # Sigmoids over many background rows start at p = 0.01, as those of the heads do.
            nn.init.constant_(self.layers[-1].bias, -4.59512)  # type: ignore[arg-type]
        self.requires_grad_(not frozen)

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N * num_anchors, columns) of features (N, F), which get no gradient."""
        return self.layers(features.detach().float()).reshape(-1, self.columns)


class StoredScores(BiasSource):
    """Scores of a shallow model, one row per training sample, looked up by the sample's id.

    ``select(ids)`` says which samples are in the next batch; ``polyfocal.StoredScoresHook`` calls
    it in a Runner. :func:`write_scores` makes the file.

    Args:
        file: npz of ``ids`` (M,), whole numbers or texts, and ``log_probabilities`` (M, C). Only a
            training needs it: a file that is missing is refused by the first ``select``.

    Attributes:
        key: the attribute of a data sample that is its id, where a hook reads it.
    """

    log_probabilities: Tensor | None
    key = "sample_idx"

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self.file = str(file)
        self._rows: dict[Hashable, int] = {}
        self.register_buffer("log_probabilities", None, persistent=False)
        self._selected: Tensor | None = None
        if Path(file).exists():
            self._read()

    def _read(self) -> None:
        ids, self.log_probabilities = _read_scores(Path(self.file))
        self._rows = {key: row for row, key in enumerate(ids)}

    def select(self, ids: Sequence[Hashable]) -> None:
        """Says which samples the rows of the next call are.

        Raises:
            UserError: a sample is not in the file, or there is none.
        """
        if self.log_probabilities is None:
            self._read()
        unknown = [key for key in ids if key not in self._rows]
        if unknown:
            raise UserError(
                f"{self.file} has no scores of sample {unknown[0]!r} ({len(unknown)} of"
                f" {len(ids)} are missing): store them for the whole training set"
            )
        self._selected = torch.tensor([self._rows[key] for key in ids], dtype=torch.int64)

    def forward(self, pred: Tensor, use_sigmoid: bool) -> Tensor:
        table = self.log_probabilities
        if table is None or self._selected is None or len(self._selected) != len(pred):
            count = "no" if self._selected is None else len(self._selected)
            raise UserError(
                f"StoredScores knows {count} sample ids for {len(pred)} rows: write"
                " custom_hooks=[dict(type='polyfocal.StoredScoresHook')], or call select(ids)"
                " before each step"
            )
        rows = table[self._selected.to(table.device)]
        if rows.shape != pred.shape:
            raise UserError(
                f"{self.file} holds {rows.shape[1]} classes for logits of {pred.shape[1]} columns"
            )
        if use_sigmoid:
            rows = rows - torch.log(-torch.expm1(rows.clamp(-80.0, -1e-6)))
        return rows.to(pred.device)


def write_scores(
    file: str | Path, ids: Sequence[int] | Sequence[str], log_probabilities: Tensor
) -> None:
    """Writes the scores of a shallow model for :class:`StoredScores`, complete or not at all.

    Args:
        file: ends in .npz.
        ids: M different whole numbers or texts.
        log_probabilities: (M, C), finite: log_softmax of the shallow model's logits, or their
            logsigmoid.

    Raises:
        UserError: anything else.
    """
    import numpy as np

    path = Path(file)
    if path.suffix != ".npz":
        raise UserError(f"{file}: expected a name that ends in .npz")
    scores = log_probabilities.detach().float().cpu()
    if scores.dim() != 2 or len(scores) != len(ids) or len(set(ids)) != len(ids):
        raise UserError(
            f"{len(set(ids))} different ids among {len(ids)} for scores {tuple(scores.shape)}:"
            " expected one id per row, each once"
        )
    if not (scores.isfinite().all() and (scores <= 0).all()):
        raise UserError("log_probabilities: expected finite numbers <= 0")
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            np.savez_compressed(stream, ids=np.asarray(ids), log_probabilities=scores.numpy())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_scores(file: Path) -> tuple[list[Hashable], Tensor]:
    import zipfile
    import zlib

    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as archive:
            ids, scores = archive["ids"], archive["log_probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).strip("'\"").splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is not a file of stored scores ({reason}): expected an npz with ids and"
            " log_probabilities, as polyfocal.losses.bias.write_scores makes it"
        ) from None
    good = ids.ndim == 1 and ids.dtype.kind in "iuU" and scores.ndim == 2
    if not good or len(ids) != len(scores) or scores.dtype.kind != "f":
        raise UserError(
            f"{file} holds ids {ids.shape} {ids.dtype} and log_probabilities {scores.shape}"
            f" {scores.dtype}: expected (M,) whole numbers or texts and (M, C) floats"
        )
    values = torch.from_numpy(scores.astype(np.float32))
    if not (values.isfinite().all() and (values <= 0).all()):
        raise UserError(f"{file} holds log_probabilities that are not finite numbers <= 0")
    return ids.tolist(), values
