"""Which checkpoints are read, which are refused, and with what sentence."""

import functools
import http.server
import os
import pickle
import threading

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import mmengine
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_checkpoint

import polyfocal.mmengine  # noqa: F401  (with it MMEngine reads its own checkpoints)
from polyfocal.errors import UserError
from polyfocal.mmengine.checkpoint import CheckpointGuardHook, check_checkpoint, only_data

WEIGHTS = {"state_dict": {"weight": torch.ones(2, 3)}}


class Calls:
    """Pickled as a call of ``function``, which whoever unpickles it makes."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


RUN = Calls(os.mkdir, "ran")


@pytest.fixture
def saved(tmp_path):
    def save(content):
        torch.save(content, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return save


def history():
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    history.update(0.125)
    return history


@pytest.mark.parametrize("guarded", [True, False], ids=["in our tools", "by MMEngine alone"])
def test_history_and_numpy_are_read_back(saved, guarded):
    numbers = {
        "float64": np.float64(0.1),
        "float32": np.float32(0.1),
        "int64": np.int64(-7),
        "uint8": np.uint8(200),
        "bool": np.bool_(True),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    }
    file = saved({**WEIGHTS, "message_hub": {"train/loss": history()}, "numbers": numbers})
    check_checkpoint(file)
    read = only_data()(CheckpointLoader.load_checkpoint) if guarded else mmengine_alone
    read = read(str(file), map_location="cpu")
    again = read["message_hub"]["train/loss"]
    assert again.data[0].tolist() == [0.5, 0.25, 0.125]
    assert (again.current(), again.min(), again.statistics("mean")) == (0.125, 0.125, 0.875 / 3)
    again.update(1.0)
    assert again.max() == 1.0 and type(again.data[0]) is np.ndarray
    for name, value in numbers.items():
        assert read["numbers"][name].dtype == value.dtype
        np.testing.assert_array_equal(read["numbers"][name], value)


def mmengine_alone(file, map_location):
    """In a process that only imports the package, as a train script of one's own does."""
    return CheckpointLoader.load_checkpoint(file, map_location=map_location)


@pytest.mark.parametrize(
    ("extra", "asked_for"),
    [
        (RUN, rf"{os.name}\.mkdir"),
        (Calls(getattr, HistoryBuffer, "register_statistics"), r"builtins\.getattr"),
        (Calls(getattr, HistoryBuffer, "__init__"), r"builtins\.getattr"),
        (Calls(getattr, torch.Tensor, "numpy"), r"torch\.\w+"),
        (HistoryBuffer([RUN], [1]), rf"({os.name}\.mkdir|an array of object)"),
    ],
    ids=["os.mkdir", "a class method", "a constructor", "another class", "objects in a history"],
)
def test_code_is_refused(saved, tmp_path, monkeypatch, extra, asked_for):
    monkeypatch.chdir(tmp_path)
    file = saved({**WEIGHTS, "extra": extra})
    with pytest.raises(UserError, match=rf"{file} was refused: it asks for ({asked_for})"):
        check_checkpoint(file)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_methods_of_a_history_stay(saved):
    """A file can give state to a history, but not to the class of all of them."""
    mean = HistoryBuffer.mean
    raw = pickle.dumps((None, {"mean": 1}), 2)[2:-1]
    state = b"cmmengine.logging.history_buffer\nHistoryBuffer\n" + raw + b"b"
    file = saved(WEIGHTS)
    head = [0x1950A86A20F9469CFC6C, 1001, {}]
    content = b"".join(pickle.dumps(part, 2) for part in head) + b"\x80\x02" + state + b"."
    file.write_bytes(content + pickle.dumps([], 2))
    with pytest.raises(UserError, match="it asks for a state of <class .*HistoryBuffer"):
        check_checkpoint(file)
    assert HistoryBuffer.mean is mean


class Net(BaseModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return {"loss": (self.weight - inputs).square().sum()}


@pytest.fixture
def address(tmp_path):
    """The folder as an address, where MMEngine's loader for it ends in another ``torch.load``."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_from(file, work_dir, **how):
    data = dict(dataset=[torch.ones(2, 3)], sampler=dict(type="DefaultSampler"), batch_size=1)
    return Runner(
        Net(),
        str(work_dir),
        train_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        load_from=None if file is None else str(file),
        experiment_name=work_dir.name,
        **how,
    )


WAYS = {
    "load_checkpoint": lambda file, _: load_checkpoint(Net(), str(file)),
    "init_cfg": lambda file, _: init_weights(dict(type="Pretrained", checkpoint=str(file))),
    "init_cfg of a part": lambda file, _: init_weights(
        dict(type="Pretrained", checkpoint=str(file), prefix="backbone.")
    ),
    "load_from": lambda file, work: run_from(file, work).train(),
    "resume": lambda file, work: run_from(file, work, resume=True).train(),
}


def init_weights(init_cfg):
    class Part(BaseModule):
        def __init__(self):
            super().__init__(init_cfg)
            self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    Part().init_weights()


@pytest.mark.filterwarnings("ignore:Failed to load image Python extension")
@pytest.mark.parametrize("place", ["a file", "an address"])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_into_mmengine_runs_code(saved, tmp_path, monkeypatch, address, way, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", torch.hub._hub_dir)  # to be put back
    torch.hub.set_dir(str(tmp_path / "cache"))
    file = saved({**WEIGHTS, "meta": {}, "extra": RUN})
    source = file if place == "a file" else f"{address}/{file.name}"
    sentence = r"checkpoint.pth was refused: it asks for \w+\.mkdir, "
    with pytest.raises(UserError, match=sentence), only_data():
        WAYS[way](source, tmp_path / "work")
    assert not (tmp_path / "ran").exists()


def test_pickled_data_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    infos = {"metainfo": {"classes": ("Car",)}, "data_list": [{"points": np.ones(3), "x": 1.5}]}
    for name, content in {"good.pkl": infos, "evil.pkl": {**infos, "x": RUN}}.items():
        mmengine.dump(content, tmp_path / name)
    with only_data():
        read = mmengine.load(tmp_path / "good.pkl")
        with pytest.raises(UserError, match=r"was refused: it asks for \w+\.mkdir, which arrays"):
            mmengine.load(tmp_path / "evil.pkl")
    assert read["data_list"][0]["points"].tolist() == [1, 1, 1]
    assert read["metainfo"] == infos["metainfo"]
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint(saved):
    for nothing in ([1, 2], {"state_dict": {}}, {"epoch": 3}):
        with pytest.raises(UserError, match="is not a checkpoint: it holds no weights"):
            check_checkpoint(saved(nothing))
    with pytest.raises(UserError, match="there is no checkpoint away.pth"):
        check_checkpoint("away.pth")


def test_training_goes_on_from_its_own_checkpoint(tmp_path):
    """Without our tools: a Runner's whole checkpoint, optimizer and histories, with its default."""
    run_from(None, tmp_path / "one").train()
    runner = run_from(tmp_path / "one" / "epoch_1.pth", tmp_path / "two", resume=True)
    runner.train()
    assert runner.epoch == 2 and runner.iter == 2
    # Both steps are 0.1 of the gradient 2 (w - 1): w = 0.2, then 0.36.
    for work in ("one", "two"):
        check_checkpoint(tmp_path / work / "epoch_2.pth")
        with only_data():
            weight = load_checkpoint(Net(), str(tmp_path / work / "epoch_2.pth"))["state_dict"]
        assert torch.allclose(weight["weight"], torch.full((2, 3), 0.36))


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
