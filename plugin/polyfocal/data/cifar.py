"""Pictures with one label each: scikit-learn's digits, CIFAR folders, npz files, and variants."""

import colorsys
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfocal.data.files import read_text
from polyfocal.data.unpickling import read_pickle
from polyfocal.errors import UserError

SPLITS = ("train", "val", "ood")

_CIFAR_SIDE = 32
_BLOCK = 5  # labels of a block of the block noise
# One random stream per purpose: a noisy label does not move a colour, and the other way round.
_SAMPLES, _NOISE, _CUE = range(3)


@dataclass(frozen=True)
class LabelledImages:
    """A split of a data set.

    Attributes:
        images: uint8, (N, H, W, 3), RGB.
        labels: int64, (N,), in [0, C).
        classes: C names.
        ids: int64, (N,), the places of the pictures in the whole split.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    ids: NDArray[np.int64]

    @property
    def counts(self) -> list[int]:
        """Number of pictures of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def take(self, index: NDArray[np.int64]) -> "LabelledImages":
        """The pictures at some places."""
        return replace(
            self, images=self.images[index], labels=self.labels[index], ids=self.ids[index]
        )


@dataclass(frozen=True)
class Variant:
    """What is changed in a data set; checked when made, the same for the same settings.

    Attributes:
        seed: Seed of everything random, >= 0.
        num_samples: Size of the train split, with the same number of every class as far as the
            data allows; None for all.
        long_tail: How many times more frequent the first class is than the last in train, >= 1.
            Class c of C keeps n_0 long_tail^(-c / (C - 1)) pictures, n_0 being the largest class;
            a class with fewer pictures keeps them all.
        label_noise: Probability in [0, 1] that a train label is drawn anew.
        noise: ``"uniform"`` draws one of the other classes; ``"block"`` one of the block of five
            consecutive classes that the label is in, itself among them (Garcin et al. 2022).
        spurious: Probability in [0, 1] that a picture's colour is that of its class, in train and
            val; otherwise it is that of another class. In ood the colour is drawn without regard
            to the class. 0 leaves the pictures' own colours; chance is 1 / C.
    """

    seed: int = 0
    num_samples: int | None = None
    long_tail: float = 1.0
    label_noise: float = 0.0
    noise: str = "uniform"
    spurious: float = 0.0

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, right: str) -> None:
            if not ok:
                raise UserError(f"{name}={getattr(self, name)!r} of the data: expected {right}.")

        def number(name: str, low: float, high: float) -> bool:
            value = getattr(self, name)
            return isinstance(value, int | float) and low <= value <= high

        check("seed", isinstance(self.seed, int) and self.seed >= 0, "a whole number >= 0")
        samples = self.num_samples
        check(
            "num_samples",
            samples is None or (isinstance(samples, int) and samples >= 1),
            "a whole number >= 1, or None for all",
        )
        check("long_tail", number("long_tail", 1, 1e6), "a ratio between 1 and 1e6")
        check("label_noise", number("label_noise", 0, 1), "a probability")
        check("noise", self.noise in ("uniform", "block"), "'uniform' or 'block'")
        check("spurious", number("spurious", 0, 1), "a probability")

    def apply(self, data: LabelledImages, split: str) -> LabelledImages:
        """The variant of a split; subset and noise change only ``"train"``.

        The colour and label of a picture do not depend on which other pictures are taken.

        Raises:
            UserError: The data have one class, and another is asked for.
        """
        for name in ("label_noise", "spurious"):
            if getattr(self, name) and len(data.classes) == 1:
                raise UserError(
                    f"{name}={getattr(self, name)!r} of the data: they have one class, "
                    f"{data.classes[0]}, and no other to draw: expected 0."
                )
        cue = self._cues(data, split)
        noisy = replace(data, labels=self._noisy_labels(data)) if split == "train" else data
        keep = self._kept(data) if split == "train" else np.arange(len(data.labels))
        taken = noisy if len(keep) == len(data.labels) else noisy.take(keep)
        return taken if cue is None else replace(taken, images=_tinted(data, cue, keep))

    def _kept(self, data: LabelledImages) -> NDArray[np.int64]:
        order = self._generator(_SAMPLES, 0).permutation(len(data.labels))
        rank = np.empty(len(order), dtype=np.int64)  # of a picture among its class
        for c in range(len(data.classes)):
            of_class = order[data.labels[order] == c]
            rank[of_class] = np.arange(len(of_class))
        keep = np.ones(len(order), dtype=bool)
        if self.num_samples is not None:
            keep[np.lexsort((data.labels, rank))[self.num_samples :]] = False
        if self.long_tail > 1:
            largest = np.bincount(data.labels[keep]).max()
            share = np.linspace(0, 1, len(data.classes))
            limit = np.floor(largest * self.long_tail**-share + 1e-6).clip(1)
            keep &= rank < limit[data.labels]
        return np.flatnonzero(keep)

    def _noisy_labels(self, data: LabelledImages) -> NDArray[np.int64]:
        if self.label_noise == 0:
            return data.labels
        rng = self._generator(_NOISE, 0)
        labels, count = data.labels, len(data.classes)
        if self.noise == "block":
            start = labels - labels % _BLOCK
            wrong = start + rng.integers(0, np.minimum(_BLOCK, count - start))
        else:
            wrong = (labels + rng.integers(1, count, len(labels))) % count
        return np.where(rng.random(len(labels)) < self.label_noise, wrong, labels)

    def _cues(self, data: LabelledImages, split: str) -> NDArray[np.int64] | None:
        """The class that each picture's colour points to."""
        if self.spurious == 0:
            return None
        rng = self._generator(_CUE, SPLITS.index(split))
        count = len(data.classes)
        if split == "ood":
            return rng.integers(0, count, len(data.labels))
        other = (data.labels + rng.integers(1, count, len(data.labels))) % count
        return np.where(rng.random(len(data.labels)) < self.spurious, data.labels, other)

    def _generator(self, stream: int, split: int) -> np.random.Generator:
        key = np.random.SeedSequence(self.seed, spawn_key=(stream, split))
        return np.random.Generator(np.random.PCG64(key))


def _tinted(
    data: LabelledImages, cue: NDArray[np.int64], index: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """The pictures at ``index`` in gray, coloured with the hue of their cue."""
    count = len(data.classes)
    hues = [colorsys.hsv_to_rgb(c / count, 1.0, 1.0) for c in range(count)]
    # A quarter white, so that every hue leaves the picture visible in all three channels.
    color = (0.25 + 0.75 * np.array(hues, dtype=np.float32))[cue[index]]
    gray = data.images[index].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.round(gray[..., None] * color[:, None, None, :]).astype(np.uint8)


def load_images(folder: str | Path | None, split: str) -> LabelledImages:
    """A split of a data set, unchanged.

    Args:
        folder: None for scikit-learn's 1,797 digits of 8 x 8 pixels, six of every ten of a class
            to train on and four to evaluate on. Otherwise a folder with CIFAR-10 or CIFAR-100 as
            published, the Python version (``data_batch_1`` ... or ``train``, ``test``) or the
            binary one (the same with ``.bin``), itself or one folder below; or with an ``.npz``
            file that has ``x_train``, ``y_train``, ``x_test``, ``y_test`` and maybe ``classes``.
        split: ``"train"``, ``"val"`` or ``"ood"``; the last two are the same test pictures and
            differ only by the cue of a :class:`Variant`.

    Raises:
        UserError: There is no such data set, or it is damaged.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} of the data: expected one of {', '.join(SPLITS)}.")
    train = split == "train"
    if folder is None:
        return _digits(train)
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}.")
    for place in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        for reader in (_npz, _cifar_python, _cifar_binary):
            data = reader(place, train)
            if data is not None:
                return data
    raise UserError(
        f"{root} holds no pictures with labels: expected CIFAR-10's or CIFAR-100's files (the "
        "Python or the binary version), or an .npz file with x_train, y_train, x_test and y_test."
    )


def _digits(train: bool) -> LabelledImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    turn = np.empty_like(labels)
    for c in range(10):
        turn[labels == c] = np.arange(np.count_nonzero(labels == c)) % 10
    index = np.flatnonzero((turn < 6) == train)
    gray = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
    names = tuple(str(c) for c in range(10))
    images = np.repeat(gray[..., None], 3, axis=3)
    return LabelledImages(images, labels[index], names, np.arange(len(index)))


def _npz(place: Path, train: bool) -> LabelledImages | None:
    files = sorted(place.glob("*.npz"))
    if not files:
        return None
    name = "train" if train else "test"
    try:
        with np.load(files[0], allow_pickle=False) as content:
            images, labels = content[f"x_{name}"], content[f"y_{name}"]
            if "classes" in content:
                names = content["classes"]
                classes = [c.decode() if isinstance(c, bytes) else str(c) for c in names]
            else:  # of both splits: one may lack the last classes
                largest = max(content["y_train"].max(), content["y_test"].max())
                classes = [str(c) for c in range(int(largest) + 1)]
    except KeyError as error:
        raise UserError(f"{files[0]} has no array {error.args[0].split()[0]}.") from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{files[0]} cannot be read: {error}.") from error
    return _checked(images, labels, classes, files[0])


def _cifar_10(place: Path, end: str, train: bool) -> list[Path]:
    """The files of a split that a folder of CIFAR-10 must have; empty for another folder."""
    files = [place / f"data_batch_{number}{end}" for number in range(1, 6)]
    if not any(file.is_file() for file in files):
        return []
    return files if train else [place / f"test_batch{end}"]


def _cifar_python(place: Path, train: bool) -> LabelledImages | None:
    if files := _cifar_10(place, "", train):
        meta, key, names = place / "batches.meta", "labels", "label_names"
    elif (place / "train").is_file() and (place / "test").is_file():
        files = [place / ("train" if train else "test")]
        meta, key, names = place / "meta", "fine_labels", "fine_label_names"
    else:
        return None
    batches = [_unpickle(file) for file in files]
    classes = _unpickle(meta).get(names) if meta.is_file() else None
    try:
        rows = np.concatenate([batch["data"] for batch in batches])
        labels = np.concatenate([batch[key] for batch in batches])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{files[0]} is not a batch of CIFAR: {error}.") from error
    return _checked(_planes(rows, files[0]), labels, classes, files[0])


def _cifar_binary(place: Path, train: bool) -> LabelledImages | None:
    if files := _cifar_10(place, ".bin", train):
        meta, label_bytes = place / "batches.meta.txt", 1
    elif (place / "train.bin").is_file() and (place / "test.bin").is_file():
        files = [place / ("train.bin" if train else "test.bin")]
        meta, label_bytes = place / "fine_label_names.txt", 2  # the coarse label, then the fine
    else:
        return None
    length = label_bytes + 3 * _CIFAR_SIDE**2
    batches = []
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no file {file}.")
        content = np.fromfile(file, dtype=np.uint8)
        if len(content) == 0 or len(content) % length:
            raise UserError(
                f"{file} is damaged: expected records of {length} bytes, got {len(content)} bytes."
            )
        batches.append(content.reshape(-1, length))
    rows = np.concatenate(batches)
    classes = read_text(meta).split() if meta.is_file() else None
    images = _planes(rows[:, label_bytes:], files[0])
    return _checked(images, rows[:, label_bytes - 1], classes, files[0])


def _planes(rows: NDArray[Any], file: Path) -> NDArray[Any]:
    """(N, 3072), a plane per colour, to (N, 32, 32, 3)."""
    if rows.ndim != 2 or rows.shape[1] != 3 * _CIFAR_SIDE**2:
        raise UserError(f"{file} holds rows of shape {rows.shape}: expected (N, 3072).")
    return rows.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1)


def _checked(
    images: NDArray[Any], labels: NDArray[Any], classes: list[str] | None, file: Path
) -> LabelledImages:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        raise UserError(
            f"{file} holds pictures of {images.dtype} and shape {images.shape}: expected uint8 and "
            "(N, height, width, 3)."
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"{file} has labels of {labels.dtype} and shape {labels.shape} for {len(images)} "
            "pictures: expected one whole number >= 0 per picture."
        )
    if classes is None:
        classes = [str(c) for c in range(int(labels.max()) + 1)]
    if labels.max() >= len(classes):
        raise UserError(f"{file} has the label {labels.max()} and {len(classes)} classes.")
    return LabelledImages(
        np.ascontiguousarray(images),
        labels.astype(np.int64),
        tuple(classes),
        np.arange(len(images)),
    )


def _unpickle(file: Path) -> dict[str, Any]:
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a batch of CIFAR: it holds a {type(content).__name__}.")
    return content
