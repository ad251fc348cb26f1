"""The Python of the pages is run as it stands there."""

import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2_models")

from detectron2.config import instantiate
from detectron2.modeling import build_model

from polyfocal import losses
from polyfocal.detectron2 import RetinaNet

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "detectron2.md").read_text(encoding="utf-8")


def blocks(text, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_readme():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In Detectron2")[2]
    names = {}
    exec(blocks(section)[0], names)
    assert isinstance(instantiate(names["model"]), RetinaNet)


def test_the_page(tmp_path, monkeypatch):
    retinanet, mask_rcnn, yaml, overrides, _ = blocks(PAGE)
    names = {}
    exec(retinanet, names)
    assert isinstance(instantiate(names["model"]), RetinaNet)
    exec(mask_rcnn, names)
    assert instantiate(names["model"]).roi_heads.box_predictor.cls_loss.epsilon == -1
    monkeypatch.chdir(tmp_path)
    Path("retinanet.yaml").write_text(blocks(PAGE, "yaml")[0])
    names = {}
    exec(yaml, names)
    exec(overrides.splitlines()[0], names)
    names["cfg"].MODEL.RETINANET.IN_FEATURES = names["cfg"].MODEL.RESNETS.OUT_FEATURES
    names["cfg"].MODEL.DEVICE = "cpu"
    names["cfg"].MODEL.BACKBONE.NAME = "build_resnet_backbone"
    assert build_model(names["cfg"]).cls_loss.gamma == 1.5
    exec(overrides.splitlines()[1], names)
    names["cfg"].freeze()
    assert isinstance(build_model(names["cfg"]).cls_loss, losses.FocalLoss)


def test_every_loss_is_in_the_table():
    table = PAGE.partition("## Which losses")[2].partition("##")[0]
    named = set(re.findall(r"`(\w+Loss)`", table))
    assert named == set(losses.LOSSES)
