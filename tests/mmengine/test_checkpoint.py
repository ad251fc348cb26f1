"""Which checkpoints are read, which are refused, and with what sentence."""

import os
import pickle

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from polyfocal.errors import UserError
from polyfocal.mmengine.checkpoint import (
    CheckpointGuardHook,
    allow_mmengine_checkpoints,
    check_checkpoint,
)

WEIGHTS = {"state_dict": {"weight": torch.ones(2, 3)}}


class Calls:
    """Pickled as a call of ``function``, which whoever unpickles it makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(autouse=True, scope="module")
def allowed():
    allow_mmengine_checkpoints()


@pytest.fixture
def saved(tmp_path):
    def save(content):
        torch.save(content, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return save


def test_history_and_numpy_are_read_back(saved):
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    history.update(0.125)
    numbers = {
        "float64": np.float64(0.1),
        "float32": np.float32(0.1),
        "int64": np.int64(-7),
        "uint8": np.uint8(200),
        "bool": np.bool_(True),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    }
    file = saved({**WEIGHTS, "message_hub": {"train/loss": history}, "numbers": numbers})
    check_checkpoint(file)
    read = torch.load(file, weights_only=True)
    again = read["message_hub"]["train/loss"]
    assert again.data[0].tolist() == [0.5, 0.25, 0.125]
    assert (again.current(), again.min(), again.statistics("mean")) == (0.125, 0.125, 0.875 / 3)
    for name, value in numbers.items():
        assert read["numbers"][name].dtype == value.dtype
        np.testing.assert_array_equal(read["numbers"][name], value)


def test_names_of_numpy_1_are_read(tmp_path, saved):
    """Checkpoints written with NumPy 1 say numpy.core where NumPy 2 says numpy._core."""
    import zipfile

    new = saved({**WEIGHTS, "lr": np.float64(0.5), "steps": np.array([1, 2])})
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name).replace(b"cnumpy._core.", b"cnumpy.core.")
            target.writestr(name, content)
    assert b"cnumpy.core.multiarray" in old.read_bytes()
    read = torch.load(old, weights_only=True)
    assert read["lr"] == 0.5 and read["steps"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("call", "asked_for"),
    [
        (Calls(os.system, "touch ran"), rf"{os.name}\.system"),
        (Calls(eval, "open('ran', 'w')"), r"(builtins\.)?eval"),
        (Calls(getattr, HistoryBuffer, "register_statistics"), r"builtins\.getattr"),
        (Calls(getattr, HistoryBuffer, "__init__"), r"builtins\.getattr"),
        (Calls(getattr, torch.Tensor, "numpy"), r"builtins\.getattr"),
        (Calls(np.load, "ran"), r"numpy\.load"),
    ],
    ids=["os.system", "eval", "a class method", "a constructor", "another class", "numpy"],
)
def test_code_is_refused(saved, tmp_path, monkeypatch, call, asked_for):
    monkeypatch.chdir(tmp_path)
    file = saved({**WEIGHTS, "extra": call})
    with pytest.raises(UserError, match=rf"{file} was refused: it asks for {asked_for}, which"):
        check_checkpoint(file)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_what_is_no_checkpoint(tmp_path, saved):
    whole = saved(WEIGHTS).read_bytes()
    contents = {
        "text.pth": b"epoch 12, very good\n" * 20,
        "empty.pth": b"",
        "half.pth": whole[: len(whole) // 2],
        "pickle.pth": pickle.dumps(Calls(os.system, "touch ran")),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a checkpoint, or it is damaged"):
            check_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="there is no checkpoint .*away.pth"):
        check_checkpoint(tmp_path / "away.pth")
    with pytest.raises(UserError, match=f"there is no checkpoint {tmp_path}"):
        check_checkpoint(tmp_path)
    for nothing in ([1, 2], {"state_dict": {}}, {"epoch": 3}):
        with pytest.raises(UserError, match="is not a checkpoint: it holds no weights"):
            check_checkpoint(saved(nothing))


class Run:
    """As much of a Runner as the hook looks at."""

    def __init__(self):
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))


def checkpoint_of(model, **meta):
    return {"state_dict": dict(model.state_dict()), "meta": meta}


def test_guard_takes_the_own_checkpoint():
    run = Run()
    checkpoint = checkpoint_of(Run().model, config="raise SystemExit('ran')", epoch=3)
    CheckpointGuardHook("a.pth", strict=True).after_load_checkpoint(run, checkpoint)
    assert checkpoint["meta"] == {"epoch": 3}, "the config would be run as a program"
    parallel = {f"module.{name}": weight for name, weight in run.model.state_dict().items()}
    CheckpointGuardHook("a.pth", strict=True).after_load_checkpoint(run, {"state_dict": parallel})
    bare = dict(run.model.state_dict())
    CheckpointGuardHook("a.pth", strict=True).after_load_checkpoint(run, bare)


def test_guard_refuses_another_models():
    other = torch.nn.ModuleDict({"stem": torch.nn.Linear(3, 2), "head": torch.nn.Linear(2, 5)})
    checkpoint = checkpoint_of(other, dataset_meta={"classes": ("cat", "dog", "cow")})
    sentence = (
        "a.pth is the checkpoint of another model: of the 4 weights of this Sequential it lacks 4 "
        "and has 0 in another shape; it holds stem, head and was trained for 3 classes."
    )
    for strict in (True, False):
        with pytest.raises(UserError) as error:
            CheckpointGuardHook("a.pth", strict=strict).after_load_checkpoint(Run(), checkpoint)
        assert str(error.value) == sentence


def test_guard_lets_fine_tuning_leave_out_what_does_not_fit():
    wider = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 7))
    CheckpointGuardHook("a.pth", strict=False).after_load_checkpoint(Run(), checkpoint_of(wider))
    with pytest.raises(UserError, match="it lacks 0 and has 2 in another shape; it holds 0, 1"):
        CheckpointGuardHook("a.pth", strict=True).after_load_checkpoint(Run(), checkpoint_of(wider))
