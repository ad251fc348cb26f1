"""What is read of a checkpoint and of other pickles, and that no code of a file ever runs."""

import contextlib
import importlib
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from polyfocal.data import unpickling
from polyfocal.data.unpickling import read_pickle, read_weights
from polyfocal.errors import UserError

WEIGHTS = {"state_dict": OrderedDict(weight=torch.arange(6.0).reshape(2, 3))}
REFUSED = r"{} was refused: it asks for {}, which weights do not need and which could run code"


class Calls:
    """Pickled as a call of ``function``, which whoever unpickles it makes."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


RUN = Calls(os.mkdir, "ran")


class Raw:
    """Content that is pickled already, to be put into a file of weights as it is."""

    def __init__(self, *parts):
        self.parts = parts

    def dump(self):
        return b"\x80\x02" + b"".join(map(opcodes, self.parts)) + b"."


def opcodes(part):
    return part if isinstance(part, bytes) else pickle.dumps(part, 2)[2:-1]


def archive(place, content, records=()):
    """A zip archive as torch.save makes it, of content that torch.save would not write."""
    data = content.dump() if isinstance(content, Raw) else pickle.dumps(content, 2)
    with zipfile.ZipFile(place, "w") as file:
        for name, record in {"data.pkl": data, "version": b"3\n", **dict(records)}.items():
            file.writestr(f"archive/{name}", record)
    return place


def legacy(place, content, keys=()):
    """The format before torch 1.6: pickles one behind the other."""
    data = content.dump() if isinstance(content, Raw) else pickle.dumps(content, 2)
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    tail = pickle.dumps(list(keys), 2)
    place.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + data + tail)
    return place


def tar(place, **members):
    """The format before torch 0.1.10."""
    none = pickle.dumps(0, 2)
    members = {"storages": none + pickle.dumps([], 2), "tensors": none, **members}
    with tarfile.open(place, "w:", format=tarfile.PAX_FORMAT) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return place


def torch_script(place):
    class Module(torch.nn.Module):
        def forward(self, x):
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Module()).save(str(place))
    return place


def array_with(dtype_state, data, code="f8"):
    """An array of two numbers whose dtype is given a state."""
    reconstruct = np.empty(0).__reduce__()[0]
    state = (1, (2,), Calls(np.dtype, code, False, True, state=dtype_state), False, data)
    return Calls(reconstruct, np.ndarray, (0,), b"b", state=state)


TAR = "tar, the format before torch 0.1.10"
DOTTED = b"serialization.os.mkdir"
GETATTR = r"(builtins\.getattr|importlib\.import_module)"
PLAIN = (3, "<", None, None, None, -1, -1, 0)
OUTSIDE = (3, "<", None, ("a",), {"a": (np.dtype("f8"), 10**6)}, -1, -1, 0)

# How the file is made; what its sentence names.
FILES = {
    "zip": (lambda p: archive(p, {**WEIGHTS_ONLY, "x": RUN}), r"\w+\.mkdir"),
    "zip of torch.save": (lambda p: saved(p, {**WEIGHTS, "x": RUN}), r"\w+\.mkdir"),
    "legacy": (lambda p: legacy(p, {"x": RUN}), r"\w+\.mkdir"),
    "legacy, in the keys": (lambda p: legacy(p, {}, [RUN]), r"\w+\.mkdir"),
    "bare pickle": (lambda p: p.write_bytes(pickle.dumps(RUN)), r"\w+\.mkdir"),
    "tar, storages": (
        lambda p: tar(p, storages=pickle.dumps(RUN)),
        "tar, the format before torch 0.1.10",
    ),
    "tar, tensors": (
        lambda p: tar(p, tensors=pickle.dumps(RUN)),
        "tar, the format before torch 0.1.10",
    ),
    "tar, pickle": (
        lambda p: tar(p, pickle=pickle.dumps(RUN)),
        "tar, the format before torch 0.1.10",
    ),
    "TorchScript": (torch_script, "TorchScript"),
    "TorchScript, made up": (
        lambda p: archive(p, RUN, {"constants.pkl": pickle.dumps(RUN)}),
        "TorchScript",
    ),
    "eval": (lambda p: saved(p, Calls(eval, "__import__('os').mkdir('ran')")), r"builtins\.eval"),
    "getattr": (
        lambda p: saved(p, Calls(getattr, Calls(importlib.import_module, "os"), "mkdir")),
        GETATTR,
    ),
    "getattr of torch": (
        lambda p: saved(p, Calls(getattr, torch.Tensor, "numpy")),
        r"(builtins\.getattr|torch\.\w+)",
    ),
    "a dotted name": (
        lambda p: archive(
            p, Raw(b"\x8c\x05torch\x8c\x16serialization.os.mkdir\x93", ("ran",), b"R")
        ),
        r"torch\.serialization\.os\.mkdir",
    ),
    "a nested torch.load": (
        lambda p: archive(p, Raw(b"ctorch.storage\n_load_from_bytes\n", (inner(),), b"R")),
        r"torch\.storage\._load_from_bytes",
    ),
    "in a persistent id": (
        lambda p: archive(p, Raw(("storage", RUN, "0", "cpu", 1), b"Q")),
        r"\w+\.mkdir",
    ),
    "a module for persistent id": (
        lambda p: legacy(p, Raw(("module", "Net", "net.py", "source"), b"Q")),
        r"the object \('module', 'Net', 'net.py', 'source'\)",
    ),
    "a text for persistent id": (lambda p: archive(p, Raw(b"Pevil\n")), "the object evil"),
    "a part of a storage": (
        lambda p: legacy(
            p,
            Raw(
                b"(",
                "storage",
                b"ctorch\nFloatStorage\n",
                *("0", "cpu", 4, ("1", 0, 2)),
                b"tQ",
            ),
        ),
        "a part of another tensor's memory",
    ),
    "an array of objects": (
        lambda p: saved(p, np.array([RUN, None], dtype=object)),
        r"(an array of object|\w+\.mkdir)",
    ),
    "NumPy's own unpickling": (lambda p: saved(p, Calls(np.load, "ran.npy")), r"numpy\.load"),
    "bytes by a codec": (
        lambda p: archive(p, Raw(b"c_codecs\nencode\n", ("ran", "zlib"), b"R")),
        "text in 'zlib'",
    ),
    "a dtype's fields": (lambda p: saved(p, array_with(OUTSIDE, b"\0" * 16)), "the state .*"),
    "a dtype's flags": (
        lambda p: saved(p, array_with((*PLAIN[:-1], 63), [1, 2])),
        "the state .*",
    ),
    "a dtype's parts": (
        lambda p: saved(
            p, array_with((3, "<", (np.dtype("f8"), (10**6,)), *PLAIN[3:]), b"\0" * 16)
        ),
        "the state .*",
    ),
    "an array without its numbers": (
        lambda p: saved(p, array_with(PLAIN, b"\0" * 8)),
        r"an array of shape \(2,\) and other data",
    ),
    "a class is changed": (
        lambda p: archive(p, Raw(b"ccollections\nCounter\n", (None, {"update": 1}), b"b")),
        "a state of <class 'collections.Counter'>",
    ),
    "a function is changed": (
        lambda p: archive(p, Raw(b"ctorch._utils\n_rebuild_tensor_v2\n", {"x": 1}, b"b")),
        "a state of <function _rebuild_tensor_v2 .*",
    ),
}
WEIGHTS_ONLY = {"state_dict": {}}


def saved(place, content, **options):
    torch.save(content, place, **options)
    return place


def inner():
    stream = io.BytesIO()
    torch.save(RUN, stream)
    return stream.getvalue()


@pytest.mark.parametrize("by", ["path", "mmap", "stream", "torch.load"])
@pytest.mark.parametrize("kind", FILES)
def test_no_code_runs(tmp_path, monkeypatch, kind, by):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pth"
    make, asked_for = FILES[kind]
    make(file)
    with pytest.raises(UserError, match=REFUSED.format(file, asked_for)):
        if by == "stream":
            with open(file, "rb") as stream:
                read_weights(stream)
        elif by == "torch.load":
            with unpickling.only_weights():
                torch.load(file, weights_only=False)
        else:
            read_weights(file, mmap=by == "mmap")
    assert os.listdir(tmp_path) == ["evil.pth"]
    assert Counter(a=1)["a"] == 1 and "update" in Counter.__dict__ and Counter.update != 1


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "tar, storages", "tar, pickle"])
def test_the_files_are_dangerous(tmp_path, monkeypatch, kind):
    """The payload itself works: unguarded, it runs."""
    monkeypatch.chdir(tmp_path)
    FILES[kind][0](tmp_path / "evil.pth")
    with contextlib.suppress(Exception):  # what becomes of the rest of the file is no matter
        torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_runs_in_data(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pkl"
    contents = (
        {"model": {"weight": np.ones(2)}, "x": RUN},
        np.array([RUN], dtype=object),
        Calls(getattr, Calls(importlib.import_module, "os"), "mkdir"),
        array_with(OUTSIDE, b"\0" * 16),
    )
    for content in contents:
        file.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=f"{file} was refused: it asks for .*arrays do not ne"):
            read_pickle(file)
    for raw in (Raw(("storage", 1), b"Q"), Raw(b"Pevil\n")):
        file.write_bytes(raw.dump())
        with pytest.raises(UserError, match="is not a file of arrays, or it is damaged"):
            read_pickle(file)
    assert os.listdir(tmp_path) == ["evil.pkl"]


NUMBERS = {
    "float64": np.float64(0.1),
    "float32": np.float32(0.1),
    "int64": np.int64(-7),
    "uint8": np.uint8(200),
    "bool": np.bool_(True),
    "complex": np.complex64(1 + 2j),
    "swapped": np.arange(4, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": np.empty((0, 4)),
    "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "names": np.array(["Car", "Pedestrian"]),
    "bytes": np.array([b"ab", b"c"]),
    "large": np.arange(2000.0),
}


def same_numbers(read):
    for name, value in NUMBERS.items():
        expected = pickle.loads(pickle.dumps(value, 2))  # NumPy puts bytes in the machine's order
        assert type(read[name]) is type(value) and read[name].dtype in (value.dtype, expected.dtype)
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("mmap", [True, False])
def test_weights_are_read(tmp_path, zipped, mmap):
    shared = torch.arange(12.0)
    content = {
        "state_dict": OrderedDict(
            matrix=shared[:6].reshape(2, 3).t(),
            view=shared[4:],
            bfloat16=torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            count=torch.tensor(7),
            mask=torch.tensor([True, False]),
            empty=torch.empty(0, 3),
            parameter=torch.nn.Parameter(torch.ones(2)),
        ),
        "milestones": Counter([8, 11]),
        "kinds": (torch.float16, torch.device("cpu"), torch.Size([2, 3]), {1, 2}, b"raw", 2**70),
        **NUMBERS,
    }
    content["state_dict"]._metadata = {"": {"version": 2}}
    file = saved(tmp_path / "good.pth", content, _use_new_zipfile_serialization=zipped)
    read = read_weights(file, mmap=mmap)
    for name, tensor in content["state_dict"].items():
        again = read["state_dict"][name]
        assert type(again) is type(tensor) and again.dtype == tensor.dtype, name
        assert torch.equal(again, tensor) and again.stride() == tensor.stride(), name
    assert read["state_dict"]._metadata == {"": {"version": 2}}
    assert read["milestones"] == Counter({8: 1, 11: 1}) and type(read["milestones"]) is Counter
    assert read["kinds"] == content["kinds"]
    same_numbers(read)
    read["state_dict"]["view"][0] = -1.0
    assert read["state_dict"]["matrix"][1, 1] == -1.0, "two tensors of one memory"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_read(tmp_path, protocol):
    content = {**NUMBERS, "infos": [{"sample": 1, "point": (1.5, None), "classes": {"Car"}}]}
    (tmp_path / "infos.pkl").write_bytes(pickle.dumps(content, protocol))
    read = read_pickle(tmp_path / "infos.pkl")
    same_numbers(read)
    assert read["infos"] == content["infos"]


def test_arrays_of_python_2_are_read(tmp_path):
    """As the files of Detectron2's model zoo and of CIFAR are written, NumPy's names included."""
    old = (
        b"\x80\x02}U\x06weightcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\xa0\xc0tbs."
    )
    (tmp_path / "old.pkl").write_bytes(old)
    read = read_pickle(tmp_path / "old.pkl")
    assert list(read) == ["weight"] and read["weight"].dtype == np.float32
    assert read["weight"].tolist() == [1.0, -5.0]


def test_names_of_the_other_numpy_are_read(tmp_path):
    """Checkpoints written with NumPy 1 say numpy.core where NumPy 2 says numpy._core."""
    new = saved(tmp_path / "new.pth", {**WEIGHTS, "lr": np.float64(0.5), "steps": np.array([1, 2])})
    for package in (b"numpy.core", b"numpy._core"):
        other = tmp_path / "other.pth"
        with zipfile.ZipFile(new) as source, zipfile.ZipFile(other, "w") as target:
            for name in source.namelist():
                content = source.read(name)
                for found in (b"cnumpy._core.", b"cnumpy.core."):
                    content = content.replace(found, b"c" + package + b".")
                target.writestr(name, content)
        assert b"c" + package + b".multiarray" in other.read_bytes()
        read = read_weights(other)
        assert read["lr"] == 0.5 and read["steps"].tolist() == [1, 2]


def storage_of(length, key="0", kind=b"ctorch\nFloatStorage\n"):
    tensor = (0, (length,), (1,), False)
    head = (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"((",
        "storage",
        kind,
        key,
        "cpu",
        length,
        b"tQ",
    )
    return Raw(*head, *tensor, Calls(OrderedDict), b"tR")


@pytest.mark.parametrize("mmap", [True, False])
def test_memory_outside_of_the_file_is_not_read(tmp_path, mmap):
    """torch before 2.10 believes the file how many numbers a record has."""
    file = tmp_path / "file.pth"
    four = {"data/0": struct.pack("<4f", 1, 2, 3, 4)}
    assert read_weights(archive(file, storage_of(4), four), mmap=mmap).tolist() == [1, 2, 3, 4]
    longer = {"DATA/0": struct.pack("<6f", *range(6)), **four}
    for wrong, records in ((5, four), (10**6, four), (-1, four), (1, {}), (6, longer)):
        archive(file, storage_of(wrong), records)
        with pytest.raises(UserError, match="is not a checkpoint, or it is damaged"):
            read_weights(file, mmap=mmap)


def test_what_is_no_checkpoint(tmp_path):
    whole = saved(tmp_path / "whole.pth", WEIGHTS).read_bytes()
    old = saved(tmp_path / "old.pth", WEIGHTS, _use_new_zipfile_serialization=False).read_bytes()
    contents = {
        "text.pth": b"epoch 12, very good\n" * 20,
        "empty.pth": b"",
        "half.pth": whole[: len(whole) // 2],
        "half_old.pth": old[: len(old) - 5],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        for mmap in (True, False):
            with pytest.raises(UserError, match=f"{name} is not a checkpoint, or it is damaged"):
                read_weights(tmp_path / name, mmap=mmap)
    with pytest.raises(UserError, match="there is no checkpoint .*away.pth"):
        read_weights(tmp_path / "away.pth")
    with pytest.raises(UserError, match=f"there is no checkpoint {tmp_path}"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match="there is no file .*away.pkl"):
        read_pickle(tmp_path / "away.pkl")
    with pytest.raises(UserError, match="text.pth is not a file of arrays, or it is damaged"):
        read_pickle(tmp_path / "text.pth")


def test_two_formats_in_one_file(tmp_path, monkeypatch):
    """A zip archive may have anything before it, and torch goes by the first bytes."""
    monkeypatch.chdir(tmp_path)
    evil = legacy(tmp_path / "evil.pth", {"x": RUN}).read_bytes()
    good = saved(tmp_path / "good.pth", WEIGHTS).read_bytes()
    (tmp_path / "both.pth").write_bytes(evil + good)
    with pytest.raises(UserError, match=r"both.pth was refused: it asks for \w+\.mkdir"):
        read_weights(tmp_path / "both.pth", mmap=True)
    assert not (tmp_path / "ran").exists()


def test_torch_load_is_itself_again(tmp_path):
    before = torch.load
    with pytest.raises(ZeroDivisionError), unpickling.only_weights():
        assert torch.load is not before
        1 / 0  # noqa: B018
    assert torch.load is before
    file = saved(tmp_path / "good.pth", WEIGHTS)
    with unpickling.only_weights():
        read = torch.load(file, map_location=torch.device("meta"))
        assert read["state_dict"]["weight"].device.type == "meta"


def test_torchs_own_switch_is_named(tmp_path, monkeypatch):
    file = saved(tmp_path / "good.pth", WEIGHTS)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD is set.*: unset it"):
        read_weights(file)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert read_weights(file)["state_dict"]["weight"].shape == (2, 3)
    saved(file, RUN)
    with pytest.raises(UserError, match="was refused"):
        read_weights(file)
