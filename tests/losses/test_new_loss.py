"""A loss is one class: what it is found by, and what tries it, follow from its definition."""

import importlib
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
from polyfocal.losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]
MODULE = '''
import torch
import torch.nn.functional as F
from polyfocal.losses import ClassificationLoss, Range
from polyfocal.losses.settings import Number

class RootLoss(ClassificationLoss):
    """Binary cross-entropy to the power 1 / root, a loss for this test."""

    settings = {"root": Number(Range(1.0, 4.0), low=1.0, high=4.0), "use_sigmoid": FORM}

    def __init__(self, root=2.0, use_sigmoid=None, **shared):
        super().__init__(use_sigmoid, root=root, **shared)

    def unreduced(self, logits, target):
        if target.shape != logits.shape:
            target = (target.unsqueeze(1) == torch.arange(logits.shape[1])).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (each + 1.0) ** (1.0 / self.root) - 1.0
'''.replace("FORM", "__import__('polyfocal').losses.settings.Form(only=True)")


@pytest.fixture
def defined(tmp_path, monkeypatch):
    (tmp_path / "root_loss.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("root_loss")
    yield module.RootLoss
    del sys.modules["root_loss"]
    LOSSES._classes.pop("RootLoss")


def test_it_is_exported_tunable_checked_and_computes(defined):
    assert LOSSES["RootLoss"] is defined is polyfocal.RootLoss is losses.RootLoss
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
    without = {"base", "bias", "debiasing", "functional", "quality", "rows", "schedule", "settings"}
    modules = {cls.__module__.rpartition(".")[2] for cls in LOSSES.values()}
    assert set(names) - without <= modules
    for name, cls in LOSSES.items():
        if cls.__module__.startswith("polyfocal."):
            assert name in losses.__all__ and name in polyfocal.__all__
            assert getattr(polyfocal, name) is cls
