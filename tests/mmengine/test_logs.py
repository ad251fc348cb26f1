"""--log: what MLflow, Weights & Biases and ClearML get of a training."""

import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

from mmengine.config import Config, ConfigDict
from mmengine.visualization import vis_backend

from polyfocal.commands import train
from polyfocal.errors import PackageError
from polyfocal.mmengine import logs

EMPTY = logging.getLogger("a logger without handlers")
THERE = SimpleNamespace(origin="site-packages")
MISSING = SimpleNamespace(origin=None)  # a folder that is no package


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def trained(folder, name, capsys):
    """Train a classifier for three epochs; the numbers of its last evaluation."""
    work_dir = folder / "run"
    options = ["--work-dir", str(work_dir), "--log", name, "--cfg-options"]
    assert (
        train.main(["classification/poly1", "--demo", *options, "train_cfg.max_epochs=3"]) == 0
    ), capsys.readouterr().err
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = [line for line in lines if any("top1" in key for key in line)][-1]
    return {name: value for name, value in last.items() if "/" in name}


def test_mlflow_gets_every_number(tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow")
    for package in ("sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="MLflow's database needs it")
    expected = trained(tmp_path, "mlflow", capsys)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("polyfocal")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    metrics = run.data.metrics
    assert len(expected) > 4
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value)
    assert [name for name in metrics if "positives_0" in name], "the statistics of the loss"
    assert (tmp_path / "mlartifacts").is_dir() and not Path("mlruns").exists()


def test_a_name_that_mlflow_does_not_take(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="MLflow's database needs it")
    # The streams of the logger of another test may be closed.
    monkeypatch.setattr(vis_backend.MMLogger, "get_current_instance", lambda: EMPTY)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    backend = logs.MLflowVisBackend(str(tmp_path), exp_name="names", run_name="r", tracking_uri=uri)
    backend.add_scalars({"coco/bbox_AR@100": 0.5, "/mAP": 0.25}, step=3)
    backend.add_scalar("a (b)", 1.0, step=4)
    mlflow.end_run()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("names").experiment_id])
    assert run.data.metrics == {"coco/bbox_AR_100": 0.5, "mAP": 0.25, "a _b_": 1.0}


def test_wandb_keeps_an_offline_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    expected = trained(tmp_path, "wandb", capsys)
    (file,) = tmp_path.glob("run/*/vis_data/wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for name in expected:
        assert name.encode() in content
    assert b"positives_0" in content and b"polyfocal" in content


def test_clearml_keeps_an_offline_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")  # read when the package is imported
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "cache"))
    pytest.importorskip("clearml", reason="needs ClearML: pip install clearml")
    expected = trained(tmp_path, "clearml", capsys)
    (file,) = (tmp_path / "cache").glob("offline/offline-*/metrics.jsonl")
    events = [event for line in file.read_text().splitlines() for event in json.loads(line)]
    last = {event["metric"]: event["value"] for event in events if "value" in event}
    assert len(expected) > 4
    for name, value in expected.items():
        assert last[name] == pytest.approx(value)
    assert "/positives_0" in last


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb", "clearml"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *a: None if asked == name else real(asked, *a)
    )
    options = ["--demo", "--work-dir", str(tmp_path / "run"), "--log", name]
    assert train.main(["classification/poly1", *options]) == 2
    said = (
        f"error: --log {name} needs the package {name}, which is not installed: pip install {name}"
    )
    assert capsys.readouterr().err == f"{said}\n"
    assert not (tmp_path / "run").exists()


def test_the_backends_of_the_config_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: THERE)
    own = ConfigDict(type="WandbVisBackend", init_kwargs=dict(project="mine"))
    visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), own])
    cfg = Config(dict(work_dir=str(tmp_path / "run"), visualizer=visualizer))
    logs.log_to(cfg, ["wandb", "tensorboard", "tensorboard", "clearml"])
    local, wandb, board, clearml = cfg.visualizer.vis_backends
    assert wandb == own and local.type == "LocalVisBackend"
    assert board.type == "TensorboardVisBackend"
    assert clearml.init_kwargs == dict(project_name="polyfocal", task_name="run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    logs.log_to(cfg, ["mlflow"])
    assert cfg.visualizer.vis_backends[-1].tracking_uri == "http://host:5000"


def test_packages_are_asked_for_before_the_config_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: THERE if name == "tensorboard" else MISSING
    )
    cfg = Config(dict(work_dir=str(tmp_path / "run")))
    with pytest.raises(PackageError, match="--log wandb needs"):
        logs.log_to(cfg, ["tensorboard", "wandb"])
    assert "visualizer" not in cfg
