"""Data sets read from every layout, and their variants, the same for the same seed."""

import os
import pickle
import zipfile

import numpy as np
import pytest
from sklearn.datasets import load_digits

from polyfocal.data.cifar import LabelledImages, Variant, load_images
from polyfocal.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(20) % 10
NAMES = [f"class {c}" for c in range(10)]


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python_10(root):
    for index in range(5):
        part = slice(4 * index, 4 * index + 4)
        batch = {"data": planes(IMAGES[part]), "labels": LABELS[part].tolist()}
        (root / f"data_batch_{index + 1}").write_bytes(pickle.dumps(batch, 4))
    batch = {"data": planes(IMAGES[:3]), "labels": [0, 1, 2]}
    (root / "test_batch").write_bytes(pickle.dumps(batch, 4))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}, 4))


def python_100(root):
    for name, count in (("train", 20), ("test", 3)):
        batch = {
            "data": planes(IMAGES[:count]),
            "fine_labels": LABELS[:count].tolist(),
            "coarse_labels": [0] * count,
        }
        (root / name).write_bytes(pickle.dumps(batch, 4))
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}, 4))


def binary_10(root):
    rows = np.concatenate([LABELS[:, None].astype(np.uint8), planes(IMAGES)], axis=1)
    for index in range(5):
        rows[4 * index : 4 * index + 4].tofile(root / f"data_batch_{index + 1}.bin")
    rows[:3].tofile(root / "test_batch.bin")
    (root / "batches.meta.txt").write_text("\n".join(name.replace(" ", "_") for name in NAMES))


def binary_100(root):
    labels = np.stack([np.zeros_like(LABELS), LABELS], axis=1).astype(np.uint8)
    rows = np.concatenate([labels, planes(IMAGES)], axis=1)
    rows.tofile(root / "train.bin")
    rows[:3].tofile(root / "test.bin")


def npz(root):
    np.savez(
        root / "set.npz",
        x_train=IMAGES,
        y_train=LABELS.astype(np.uint8),
        x_test=IMAGES[:3],
        y_test=LABELS[:3],
        classes=np.array(NAMES),
    )


def test_a_byte_order_mark_before_the_names(tmp_path):
    binary_10(tmp_path)
    names = tmp_path / "batches.meta.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes())
    assert load_images(tmp_path, "train").classes[0] == "class_0"


@pytest.mark.parametrize("write", [python_10, python_100, binary_10, binary_100, npz])
@pytest.mark.parametrize("below", [".", "cifar"])
def test_layouts(tmp_path, write, below):
    (tmp_path / below).mkdir(exist_ok=True)
    write(tmp_path / below)
    train, val = load_images(tmp_path, "train"), load_images(tmp_path, "val")
    np.testing.assert_array_equal(train.images, IMAGES)
    np.testing.assert_array_equal(train.labels, LABELS)
    np.testing.assert_array_equal(val.images, IMAGES[:3])
    assert val.labels.tolist() == [0, 1, 2] and len(train.classes) == 10
    assert train.counts == [2] * 10


class Evil:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda r: (r / "data_batch_2").write_bytes(b"no"), "data_batch_2 is not a file of arrays"),
        (lambda r: (r / "test_batch").unlink(), "there is no file .*test_batch"),
        (
            lambda r: (r / "data_batch_1").write_bytes(pickle.dumps([1])),
            "data_batch_1 is not a batch of CIFAR: it holds a list",
        ),
        (
            lambda r: (r / "data_batch_1").write_bytes(pickle.dumps({"data": np.zeros((4, 9))})),
            "data_batch_1 is not a batch of CIFAR",
        ),
        (
            lambda r: (r / "data_batch_1").write_bytes(pickle.dumps(Evil(r / "ran"))),
            "data_batch_1 was refused: it asks for posix.mkdir, which arrays",
        ),
    ],
)
def test_damaged_python(tmp_path, spoil, sentence):
    python_10(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=sentence):
        for split in ("train", "val"):
            load_images(tmp_path, split)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("write", "end"), [(python_10, ""), (binary_10, ".bin")])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_missing_batch_is_named(tmp_path, write, end, number):
    write(tmp_path)
    (tmp_path / f"data_batch_{number}{end}").unlink()
    with pytest.raises(UserError, match=rf"there is no file .*data_batch_{number}{end}\.$"):
        load_images(tmp_path, "train")
    assert len(load_images(tmp_path, "val").labels) == 3


def test_damaged_others(tmp_path):
    with pytest.raises(UserError, match="holds no pictures with labels"):
        load_images(tmp_path, "train")
    with pytest.raises(UserError, match="there is no folder"):
        load_images(tmp_path / "away", "train")
    with pytest.raises(UserError, match="split='test'"):
        load_images(None, "test")
    binary_10(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"data_batch_3.bin is damaged: .* 3073 bytes, got 4"):
        load_images(tmp_path, "train")
    np.savez(
        tmp_path / "a.npz", x_train=IMAGES.astype(float), y_train=LABELS, classes=np.array(NAMES)
    )
    with pytest.raises(UserError, match=r"a.npz holds pictures of float64"):
        load_images(tmp_path, "train")
    with pytest.raises(UserError, match=r"a.npz has no array x_test"):
        load_images(tmp_path, "val")
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS[:3], classes=np.array(NAMES))
    with pytest.raises(UserError, match=r"a.npz has labels of int64 and shape \(3,\) for 20"):
        load_images(tmp_path, "train")
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=np.array([None] * 20))
    with pytest.raises(UserError, match=r"a.npz cannot be read: Object arrays cannot be loaded"):
        load_images(tmp_path, "train")


def test_a_damaged_archive(tmp_path):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("x_train.npy").header_offset + 60
    for content in (whole[:-100], b"", whole[:start] + bytes(200) + whole[start + 200 :]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"a.npz cannot be read: ."):
            load_images(tmp_path, "train")


def test_names_in_bytes_and_a_single_class(tmp_path):
    arrays = dict(x_train=IMAGES, y_train=0 * LABELS, x_test=IMAGES, y_test=0 * LABELS)
    np.savez(tmp_path / "a.npz", classes=np.array([b"chat noir"]), **arrays)
    data = load_images(tmp_path, "train")
    assert data.classes == ("chat noir",)
    assert np.array_equal(Variant(num_samples=5).apply(data, "train").labels, np.zeros(5))
    for settings in ({"label_noise": 0.5}, {"spurious": 0.5}):
        with pytest.raises(UserError, match=r"=0.5 of the data: they have one class, chat noir,"):
            Variant(**settings).apply(data, "train")


def test_classes_without_names(tmp_path):
    few = LABELS[:3]
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:3], y_test=few)
    for split in ("train", "val"):
        assert load_images(tmp_path, split).classes == tuple(map(str, range(10)))


def test_digits():
    train, val = load_images(None, "train"), load_images(None, "val")
    assert len(train.labels) + len(val.labels) == 1797
    assert len(train.labels) == pytest.approx(0.6 * 1797, abs=10)
    digits = load_digits()
    found = {image.tobytes() for image in np.round(digits.images * (255 / 16)).astype(np.uint8)}
    for data in (train, val):
        assert {image[..., 0].tobytes() for image in data.images} <= found
    first = digits.target[0]
    np.testing.assert_array_equal(train.images[0, :, :, 1], np.round(digits.images[0] * (255 / 16)))
    assert train.labels[0] == first


def many(count=1000, classes=10):
    labels = np.repeat(np.arange(classes), count)
    images = np.full((len(labels), 2, 2, 3), 200, np.uint8)
    names = tuple(map(str, range(classes)))
    return LabelledImages(images, labels, names, np.arange(len(labels)))


def test_long_tail():
    """The counts of CIFAR-10 at imbalance 100 that everybody uses."""
    long_tail = Variant(long_tail=100.0).apply(many(5000), "train")
    assert long_tail.counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    again = Variant(long_tail=100.0).apply(long_tail, "train")
    assert again.counts == long_tail.counts, "a set that has this tail already keeps it"
    assert Variant(long_tail=100.0).apply(many(), "val").counts == [1000] * 10
    other = Variant(long_tail=100.0, seed=1).apply(many(5000), "train")
    assert other.counts == long_tail.counts and (other.ids != long_tail.ids).any()


def test_few_samples():
    data = Variant(num_samples=4000).apply(many(), "train")
    assert data.counts == [400] * 10
    np.testing.assert_array_equal(data.labels, many().labels[data.ids])
    both = Variant(num_samples=4000, long_tail=100.0).apply(many(), "train")
    assert both.counts[0] == 400 and both.counts[9] == 4


def test_block_noise():
    """The label stays in its block and survives at a rate of 1 - p + p / 5."""
    data, noisy = many(), Variant(label_noise=0.5, noise="block").apply(many(), "train")
    assert (noisy.labels // 5 == data.labels // 5).all()
    assert (noisy.labels == data.labels).mean() == pytest.approx(0.6, abs=0.02)
    assert Variant(label_noise=0.5, noise="block").apply(data, "val") == data
    odd = Variant(label_noise=1.0, noise="block").apply(many(100, 7), "train")
    assert set(odd.labels[500:]) == {5, 6}, "the last block may be short"


def test_uniform_noise():
    data, noisy = many(), Variant(label_noise=0.2).apply(many(), "train")
    wrong = noisy.labels != data.labels
    assert wrong.mean() == pytest.approx(0.2, abs=0.015)
    counts = np.bincount((noisy.labels - data.labels)[wrong] % 10, minlength=10)
    assert counts[0] == 0 and counts[1:].min() > 0.7 * counts[1:].max()


def test_spurious_colour():
    variant = Variant(spurious=0.8)
    colours = {}
    for split in ("train", "val", "ood"):
        data = variant.apply(many(), split)
        colours[split] = data.images[:, 0, 0]
        own = np.stack(
            [np.median(colours["train"][c * 1000 : (c + 1) * 1000], 0) for c in range(10)]
        )
        agrees = (colours[split] == own[data.labels]).all(axis=1).mean()
        assert agrees == pytest.approx(0.1 if split == "ood" else 0.8, abs=0.02)
    assert len(np.unique(colours["ood"], axis=0)) == 10
    # A picture has its colour and its noisy label whatever else is taken.
    few = Variant(spurious=0.8, label_noise=0.5, num_samples=100).apply(many(), "train")
    all_ = Variant(spurious=0.8, label_noise=0.5).apply(many(), "train")
    np.testing.assert_array_equal(few.images, all_.images[few.ids])
    np.testing.assert_array_equal(few.labels, all_.labels[few.ids])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"long_tail": 0.5}, "long_tail=0.5 of the data: expected a ratio between 1 and 1e6"),
        ({"label_noise": 2}, "label_noise=2 of the data: expected a probability"),
        ({"spurious": "much"}, "spurious='much'"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"noise": "loud"}, "noise='loud' of the data: expected 'uniform' or 'block'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_variants(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Variant(**settings)
