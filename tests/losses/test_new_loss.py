"""A loss is one class: what it is found by, and what tries it, follow from its definition."""

import importlib
import math
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import polyfocal
from polyfocal import losses
from polyfocal.errors import UserError
from polyfocal.experiments.loss_curves import build_loss, loss_and_gradient
from polyfocal.losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
MODULE = PAGE.partition("```python\n")[2].partition("```")[0]  # the worked example


@pytest.fixture
def defined(tmp_path, monkeypatch):
    (tmp_path / "root_loss.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("root_loss")
    yield module.RootLoss
    del sys.modules["root_loss"]
    LOSSES._classes.pop("RootLoss")


def test_it_is_exported_tunable_checked_and_computes(capsys, defined):
    assert LOSSES["RootLoss"] is defined is polyfocal.RootLoss is losses.RootLoss
    printed = capsys.readouterr().out  # two rows, a column that weighs 1 and one that weighs 2
    assert printed == f"tensor({6 * ((1 + math.log(2)) ** 0.5 - 1):.4f})\n"
    assert f"python root_loss.py  # {printed}" in PAGE
    loss = defined(use_sigmoid=True, class_weight=[1.0, 2.0], ignore_index=7)
    assert list(loss.tunable()) == ["root", "loss_weight"]
    logits, labels = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([1, 7])
    each = 1 + torch.log(torch.tensor(2.0))
    expected = (each**0.5 - 1) * (1.0 + 2.0) / 2
    torch.testing.assert_close(loss(logits, labels), expected)
    with pytest.raises(UserError, match=r"root=0.5: expected a number in \[1, 4\]"):
        loss.root = 0.5
    with pytest.raises(TypeError, match="RootLoss has no keyword 'rot': it takes root, use_sig"):
        defined(use_sigmoid=True, rot=2)


def test_it_is_drawn(defined):
    loss = build_loss("RootLoss", {"root": 3.0, "loss_weight": 2.0})
    value, _ = loss_and_gradient(loss, torch.tensor([0.5], dtype=torch.float64))
    assert value.item() == pytest.approx(2 * ((1 + math.log(2)) ** (1 / 3) - 1), abs=1e-12)


def test_it_is_registered_in_mmengine(defined):
    pytest.importorskip("mmengine", reason="needs MMEngine")
    import polyfocal.mmengine  # noqa: F401
    from polyfocal.registry import MODELS

    loss = MODELS.build(dict(type="polyfocal.RootLoss", root=3.0, use_sigmoid=True))
    assert type(loss).__name__ == "RootLoss" and loss.root == 3.0


def test_the_property_tests_try_it(tmp_path):
    pytest.importorskip("hypothesis", reason="needs hypothesis")
    (tmp_path / "root_loss.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "root_loss", "-k", "RootLoss"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "tests/losses/test_properties.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr


def test_a_loss_of_another_name_is_kept_and_one_defined_anew_replaces_itself(defined):
    class FocalLoss(losses.FocalLoss):
        pass

    assert LOSSES["FocalLoss"] is losses.FocalLoss is not FocalLoss
    namespace = {"__name__": defined.__module__}
    exec(MODULE, namespace)
    assert LOSSES["RootLoss"] is namespace["RootLoss"] is not defined


def test_every_file_of_losses_is_in_the_table():
    names = [module.name for module in pkgutil.iter_modules(losses.__path__)]
    without = {"base", "bias", "class_weights", "debiasing", "functional", "quality", "rows"}
    without |= {"schedule", "settings"}
    modules = {cls.__module__.rpartition(".")[2] for cls in LOSSES.values()}
    assert set(names) - without <= modules
    for name, cls in LOSSES.items():
        if cls.__module__.startswith("polyfocal."):
            assert name in losses.__all__ and name in polyfocal.__all__
            assert getattr(polyfocal, name) is cls
