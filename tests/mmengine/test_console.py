"""What reaches the console: progress and warnings, not dumps; and the bar's lines."""

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

from mmengine.logging import HistoryBuffer
from rich.console import Console

from polyfocal.errors import UserError
from polyfocal.mmengine import console
from polyfocal.mmengine.console import ConsoleRunner, ProgressBarHook


def record(module, message, level=logging.INFO):
    return logging.LogRecord("mmengine", level, f"/x/{module}.py", 1, message, (), None)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_reaches_the_console(monkeypatch, terminal):
    monkeypatch.setattr(console, "on_terminal", lambda: terminal)
    shown = console._is_for_people
    assert shown(record("runner", "a checkpoint is strange", logging.WARNING))
    assert shown(record("logger_hook", "Epoch(train) [1][10/75]")) is not terminal
    assert not shown(record("logger_hook", "Exp name: retinanet_20260101"))
    assert not shown(record("runner", "Config:\nmodel = dict("))
    assert not shown(record("x", '"FileClient" will be deprecated in future', logging.WARNING))


def lines(hook, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(hook._live.renderable)
    return out.getvalue().splitlines()


@pytest.fixture
def runner():
    hub = SimpleNamespace(
        log_scalars={
            "train/loss": HistoryBuffer([4.0, 2.0], [1, 1]),
            "train/loss_cls": HistoryBuffer([1.5, 0.5], [1, 1]),
            "train/lr": HistoryBuffer([0.1], [1]),
        }
    )
    return SimpleNamespace(
        iter=29, max_iters=40, epoch=2, max_epochs=4, message_hub=hub, val_dataloader=range(5)
    )


def test_bar_of_a_training(runner):
    hook = ProgressBarHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 9)
    bar, losses = lines(hook)
    assert bar.startswith("epoch 3/4 ") and "30/40" in bar and "left" in bar
    assert losses == "loss 3.000  loss_cls 1.000", "means over the last iterations, no rate"
    assert lines(hook, width=60)[1] == losses[:60]

    hook.before_val(runner)
    hook.after_val_iter(runner, 0)
    assert any("evaluating" in line and "1/5" in line for line in lines(hook))
    hook.after_val(runner)
    assert not any("evaluating" in line for line in lines(hook))
    hook.close()


def test_a_model_that_cannot_be_built(tmp_path):
    config = dict(type="torch.nn.Linear", in_features=3)
    with pytest.raises(UserError, match=r"the model cannot be built: .*'?out_features"):
        ConsoleRunner(model=config, work_dir=str(tmp_path), log_level="ERROR")


def test_runs_started_within_one_second_share_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.25)
    model = dict(type="torch.nn.Identity")
    # The middle one is the first one's next start, as when a stopped run goes on.
    runs = [
        ConsoleRunner(model=model, work_dir=str(tmp_path / name), log_level="ERROR")
        for name in ("first", "first", "second")
    ]
    for number, run in enumerate(runs):
        run.message_hub.update_scalar("train/loss", number)
        run.visualizer.add_scalar("loss", number, step=1)
    for number, run in enumerate(runs):
        assert run.message_hub.get_scalar("train/loss").data[0].tolist() == [number]
        logged = (Path(run.log_dir) / "vis_data" / "scalars.json").read_text()
        assert json.loads(logged) == {"loss": number, "step": 1}
    assert [run.log_dir for run in runs] == sorted({run.log_dir for run in runs})
