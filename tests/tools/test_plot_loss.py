"""The tool that draws losses: its numbers, its files and what it refuses."""

import contextlib
import io
import os
import shlex
import subprocess
import sys
from math import log
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from polyfocal.commands import plot_loss
from polyfocal.experiments.command_line import settings_of
from polyfocal.experiments.loss_curves import build_loss, loss_and_gradient
from polyfocal.losses import ClassificationLoss

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "plot_loss.py"


def run(*args: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = plot_loss.main([str(arg) for arg in args])
    return status, out.getvalue(), err.getvalue()


def built(words: list[str]) -> ClassificationLoss:
    return build_loss(words[0], settings_of(words[1:], "--loss"))


FOCAL_HALF = (0.25 * log(2), -(log(2) + 0.5))  # (1 - p)^2 CE and its derivative at p = 1/2
HIGH_HALF = (3.375 * log(2), 6.75 * log(2) - 6.75)  # (1 + p)^3 CE and its derivative there


@pytest.mark.parametrize(
    ("words", "p", "value", "gradient"),
    [
        ("FocalLoss alpha=None", 0.5, *FOCAL_HALF),
        ("FocalLoss", 0.5, 0.25 * FOCAL_HALF[0], 0.25 * FOCAL_HALF[1]),
        ("FocalLoss use_sigmoid=False alpha=None", 0.5, *FOCAL_HALF),
        (
            "Poly1FocalLoss epsilon=-1",
            0.5,
            0.25 * (FOCAL_HALF[0] - 0.125),
            0.25 * (FOCAL_HALF[1] + 0.75),
        ),
        ("Poly1CrossEntropyLoss epsilon=2", 0.25, log(4) + 1.5, -6.0),
        ("Poly1CrossEntropyLoss epsilon=2 loss_weight=0.5", 0.25, log(2) + 0.75, -3.0),
        ("PolyNLoss epsilons=(1,0.5)", 0.5, log(2) + 0.625, -3.5),
        ("Poly1FocalLoss epsilon=0 alpha=None activated=True", 0.5, *FOCAL_HALF),
    ],
)
def test_values_by_hand(words: str, p: float, value: float, gradient: float) -> None:
    loss = built(words.split())
    found = loss_and_gradient(loss, torch.tensor([0.9, p], dtype=torch.float64))
    assert found[0][1].item() == pytest.approx(value, abs=1e-12)
    assert found[1][1].item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(("progress", "xi"), [(0.0, 1.0), (0.25, 0.0), (0.625, 0.5), (1.0, 1.0)])
def test_cyclical_values_by_hand(progress: float, xi: float) -> None:
    loss = build_loss("CyclicalFocalLoss", {"alpha": 0.25})
    loss.set_progress(progress)
    half = torch.tensor([0.5], dtype=torch.float64)
    for found, high, low in zip(loss_and_gradient(loss, half), HIGH_HALF, FOCAL_HALF, strict=True):
        assert found.item() == pytest.approx(0.25 * (xi * high + (1 - xi) * low), abs=1e-12)
    # Entries with target 0 keep the focal loss at every moment, here with weight 1 - alpha.
    for found, low in zip(loss_and_gradient(loss, half, positive=False), FOCAL_HALF, strict=True):
        assert found.item() == pytest.approx(0.75 * low, abs=1e-12)


@pytest.mark.parametrize("positive", [True, False])
def test_debiasing_values_by_hand(positive: bool) -> None:
    p_t = torch.tensor([0.5], dtype=torch.float64)
    # (1 - 0.9)^2 of cross-entropy
    loss = build_loss("DebiasedFocalLoss", {})
    value, gradient = loss_and_gradient(loss, p_t, positive, bias=0.9)
    assert value.item() == pytest.approx(0.01 * log(2), abs=1e-9)
    assert gradient.item() == pytest.approx(-0.02, abs=1e-9)
    # the product of even odds and 9 to 1 is 9 to 1; -log(9 p / (9 p + 1 - p)) has slope -0.4 there
    loss = build_loss("ProductOfExpertsLoss", {})
    value, gradient = loss_and_gradient(loss, p_t, positive, bias=0.9)
    assert value.item() == pytest.approx(-log(0.9), abs=1e-9)
    assert gradient.item() == pytest.approx(-0.4, abs=1e-9)


def test_writes_png(tmp_path: Path) -> None:
    out = tmp_path / "new" / "loss.png"
    status, stdout, stderr = run("--loss", "FocalLoss", "--log", "--negatives", "--out", out)
    assert (status, stderr) == (0, "")
    assert stdout == f"{out}: 1 curve\n"
    assert os.listdir(out.parent) == ["loss.png"]
    picture = np.asarray(Image.open(out).convert("RGB"))
    blue = (picture == [0x00, 0x72, 0xB2]).all(axis=2)
    assert blue.sum() > 300  # the curve, in its colour


def test_writes_svg_with_the_schedule(tmp_path: Path) -> None:
    def texts(*args: str) -> str:
        out = tmp_path / "loss.svg"
        status, _, stderr = run(*args, "--out", out)
        assert status == 0, stderr
        assert ElementTree.parse(out).getroot().tag.endswith("svg")
        return out.read_text(encoding="utf-8")  # matplotlib writes each text as a comment, too

    poly = ("--loss", "Poly1FocalLoss", "epsilon=-1", "gamma=1.5")
    plain = texts(*poly)
    assert "Poly1FocalLoss epsilon=-1 gamma=1.5" in plain and "schedule" not in plain
    assert plain == texts(*poly)
    cyclical = texts(*poly, "--loss", "CyclicalFocalLoss", "factor=2", "--progress", "0.25", "1")
    assert "schedule" in cyclical and "factor 2" in cyclical
    assert "CyclicalFocalLoss factor=2, progress 0.25 (ξ = 0.5)" in cyclical
    assert "CyclicalFocalLoss factor=2, progress 1 (ξ = 1)" in cyclical
    debiased = texts("--loss", "DebiasedFocalLoss", "gamma=1", "--bias", "0.25")
    assert "DebiasedFocalLoss gamma=1, bias model at 0.25" in debiased


def test_losses_of_a_config(tmp_path: Path) -> None:
    pytest.importorskip("mmengine", reason="configs need MMEngine")
    from polyfocal.mmengine.configs import losses_in

    config = tmp_path / "two_stage.py"
    config.write_text(
        "stage = dict(loss_cls=dict(type='polyfocal.Poly1CrossEntropyLoss', epsilon=-1.0))\n"
        "inner = dict(type='polyfocal.FocalLoss', use_sigmoid=True, gamma=1.0)\n"
        "model = dict(\n"
        "    rpn_head=dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True)),\n"
        "    roi_head=dict(bbox_head=[stage, stage]),\n"
        "    mask_head=dict(loss_mask=dict(type='polyfocal.MaskLoss', loss=inner)))\n"
    )
    assert losses_in(config) == [
        ("Poly1CrossEntropyLoss", {"epsilon": -1.0}),
        ("FocalLoss", {"use_sigmoid": True, "gamma": 1.0}),
    ]
    out = tmp_path / "loss.svg"
    status, _, stderr = run(config, "--loss", "FocalLoss", "--out", out)
    assert status == 0, stderr
    svg = out.read_text(encoding="utf-8")
    assert "two_stage: Poly1CrossEntropyLoss epsilon=-1.0" in svg
    assert "two_stage: FocalLoss gamma=1.0" in svg


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "nothing to draw: give a config or --loss"),
        (["--loss", "FokalLoss"], "there is no loss 'FokalLoss': expected one of"),
        (["--loss", "ClassificationLoss"], "there is no loss 'ClassificationLoss'"),
        (["--loss", "FocalLoss", "gama=2"], "FocalLoss has no keyword 'gama': it takes gamma,"),
        (["--loss", "FocalLoss", "gamma"], "before the first --loss) takes KEY=VALUE, got gamma"),
        (
            ["--loss", "FocalLoss", "gamma=two"],
            "gamma=two: expected a finite number",
        ),
        (["--loss", "FocalLoss", "gamma=-1"], "gamma=-1: expected a finite number >= 0"),
        (["--loss", "Poly1FocalLoss"], "Poly1FocalLoss has no epsilon: write one, >= -1"),
        (["--loss", "Poly1FocalLoss", "epsilon=-2"], "epsilon=-2: expected a finite number >= -1"),
        (["--loss", "PolyNLoss"], "missing 1 required positional argument: 'epsilons'"),
        (["--loss", "FocalLoss", "alpha=[0.5,0.2]"], "alpha has 2 values: expected 1"),
        (["--loss", "CyclicalFocalLoss", "--progress", "1.5"], "--progress 1.5: expected numbers"),
        (["--loss", "FocalLoss", "--out", "loss.jpg"], "--out loss.jpg: expected a name that ends"),
        (
            ["--loss", "FocalLoss", "--out", "/dev/null/x.png"],
            "/dev/null/x.png cannot be written: /dev/null is not a folder",
        ),
        (["missing.py"], "there is no config missing.py"),
        (["broken.py"], "broken.py cannot be read as a config: "),
        (["other.py"], "other.py has no loss of this package"),
    ],
)
def test_refuses(
    args: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if args and args[0].endswith(".py"):
        pytest.importorskip("mmengine", reason="configs need MMEngine")
        (tmp_path / "broken.py").write_text("model = dict(\n")
        (tmp_path / "other.py").write_text("model = dict(loss_cls=dict(type='L1Loss'))\n")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = run(*args)
    assert (status, stdout) == (2, "")
    assert sentence in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("option", ["--negatives", "--log"])
def test_options_of_the_other_drawing_are_refused(option: str) -> None:
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err:
        plot_loss.parse_args(["--loss", "FocalLoss", "--scores", option])
    assert "not for --scores" in err.getvalue()


def test_the_docs_curves_have_commands_that_work() -> None:
    pictures = set()
    for page in sorted((ROOT / "docs" / "losses").glob("*.md")):
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("python tools/plot_loss.py"):
                args = plot_loss.parse_args(shlex.split(line)[2:])
                for words in args.loss:
                    built(words)
                pictures.add(args.out.name)
    there = {file.name for file in (ROOT / "docs" / "images").glob("loss_*")}
    assert there and there <= pictures


def test_command_without_frameworks(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['mmengine'] = sys.modules['mmdet'] = None\n"
        f"import runpy; sys.argv[0] = {str(TOOL)!r}; runpy.run_path(sys.argv[0], "
        "run_name='__main__')"
    )

    def command(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            env={**os.environ, "PYTHONPATH": str(ROOT / "plugin")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert command("--loss", "FocalLoss").returncode == 0
    assert os.listdir(tmp_path) == ["loss.png"]
    done = command("any.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: polyfocal.mmengine needs MMEngine")
