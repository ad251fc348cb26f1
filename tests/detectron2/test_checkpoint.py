"""No way into Detectron2 runs the code of a file; what its model zoo holds is read."""

import os
import pickle

import pytest

pytest.importorskip("detectron2", reason="needs Detectron2, see docs/detectron2.md")

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode

from polyfocal.detectron2.checkpoint import check_checkpoint, only_data
from polyfocal.errors import UserError


class Run:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 2))


def weights(**more):
    return {"0.weight": np.full((2, 3), 0.5, np.float32), "0.bias": np.ones(2, np.float32), **more}


def as_tensors(content):
    return {k: torch.as_tensor(v) if hasattr(v, "shape") else v for k, v in content.items()}


def write(file, content):
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, file)
    return str(file)


@pytest.mark.parametrize("name", ["evil.pth", "evil.pkl", "evil.pyth", "evil.pth?matching=True"])
def test_no_checkpoint_runs_code(tmp_path, monkeypatch, name):
    """Of the guard alone: the tools look at the file before Detectron2 does."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name.partition("?")[0], {"model": {}, "model_state": {}, "x": Run()})
    with only_data(), pytest.raises(UserError, match=r"evil.p\w+ was refused: it asks for \w+.mkd"):
        DetectionCheckpointer(model(), str(tmp_path)).load(str(tmp_path / name))
    with pytest.raises(UserError, match="was refused: it asks for"):
        check_checkpoint(str(tmp_path / name), model(), strict=False)
    assert not (tmp_path / "ran").exists()


def test_no_proposals_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    proposals = {
        "ids": [7],
        "boxes": [np.array([[0, 0, 4, 4]], np.float32)],
        "objectness_logits": [np.array([2.0], np.float32)],
        "bbox_mode": int(BoxMode.XYXY_ABS),
    }
    with only_data():
        write(tmp_path / "good.pkl", proposals)
        (read,) = load_proposals_into_dataset([{"image_id": 7}], str(tmp_path / "good.pkl"))
        write(tmp_path / "evil.pkl", {**proposals, "x": Run()})
        with pytest.raises(UserError, match=r"was refused: it asks for \w+\.mkdir, which arrays"):
            load_proposals_into_dataset([{"image_id": 7}], str(tmp_path / "evil.pkl"))
    assert read["proposal_boxes"].tolist() == [[0, 0, 4, 4]]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["Detectron2's pkl", "Caffe2's pkl", "pth", "pycls's pyth"])
def test_the_model_zoos_files_are_read(tmp_path, form):
    content, name = {
        "Detectron2's pkl": ({"model": weights(), "__author__": "someone"}, "a.pkl"),
        "Caffe2's pkl": (weights(**{"0.weight_momentum": np.zeros((2, 3), np.float32)}), "b.pkl"),
        "pth": ({"model": as_tensors(weights()), "iteration": 9}, "c.pth"),
        "pycls's pyth": ({"model_state": as_tensors(weights())}, "d.pyth"),
    }[form]
    file = write(tmp_path / name, content)
    net = model()
    check_checkpoint(file, net, strict=False)
    with only_data():
        DetectionCheckpointer(net, str(tmp_path)).load(file)
    assert torch.equal(net[0].weight, torch.full((2, 3), 0.5))
    assert net[0].bias.tolist() == [1, 1]


def test_the_query_says_how_names_are_matched(tmp_path):
    file = write(tmp_path / "other.pth", {f"backbone.{k}": v for k, v in weights().items()})
    with pytest.raises(UserError, match="is the checkpoint of another model"):
        check_checkpoint(file, model(), strict=False)
    check_checkpoint(f"{file}?matching_heuristics=True", model(), strict=False)


def test_detectron2_is_itself_again(tmp_path):
    from detectron2.checkpoint import detection_checkpoint
    from detectron2.data import build

    with only_data():
        assert detection_checkpoint.pickle is not pickle and build.pickle is not pickle
    assert detection_checkpoint.pickle is pickle and build.pickle is pickle
