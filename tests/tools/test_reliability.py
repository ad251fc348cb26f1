"""What a training does when the machine does not: full disks, lost files, two runs, odd clocks."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch

from polyfocal.commands import train as train_tool
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.mmengine.checkpoint import latest_checkpoint
from polyfocal.mmengine.console import ConsoleRunner

ROOT = Path(__file__).parents[2]
CLASSIFIER = (ROOT / "configs" / "classification" / "cyclical.py", "--demo")
DETECTOR = (ROOT / "configs" / "retinanet_poly1.py", "--profile", "tiny")
SHORT = (
    "--cfg-options",
    "variant.num_samples=128",
    "train_cfg.max_epochs=3",
    "default_hooks.checkpoint.interval=1",
)


def run(*arguments):
    return train_tool.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments):
    """The one line that a failing training prints."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


def weights(work_dir):
    return torch.load(work_dir / "epoch_3.pth")["state_dict"]


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a training that nothing happens to."""
    place = tmp_path_factory.mktemp("uninterrupted")
    assert run(*CLASSIFIER, "--work-dir", place, *SHORT) == 0
    return weights(place)


@pytest.fixture
def at_epoch(monkeypatch):
    """Has a function called when an epoch of the next training begins."""

    def register(epoch, function):
        call_hook = ConsoleRunner.call_hook

        def calling(self, name, **inputs):
            if name == "before_train_epoch" and self.epoch == epoch:
                function()
            call_hook(self, name, **inputs)

        monkeypatch.setattr(ConsoleRunner, "call_hook", calling)

    return register


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["epoch_2.pth.part", "last_checkpoint", "*/vis_data/scalars.json"])
def test_full_disk(tmp_path, capsys, monkeypatch, uninterrupted, at_epoch, name):
    def files():
        return list(tmp_path.glob(name)) or [tmp_path / name]

    def fill():
        (file,) = files()
        file.unlink(missing_ok=True)
        file.symlink_to("/dev/full")

    at_epoch(1, fill)
    error = error_of(capsys, *CLASSIFIER, "--work-dir", tmp_path, *SHORT)
    assert "No space left on device" in error
    if name == "epoch_2.pth.part":
        assert f"{tmp_path / 'epoch_2.pth'} cannot be written" in error
        assert latest_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"
    assert not list(tmp_path.glob("*.part"))
    for file in files():
        file.unlink(missing_ok=True)
    monkeypatch.undo()
    assert run(*CLASSIFIER, "--work-dir", tmp_path, *SHORT, "--resume") == 0
    assert same(weights(tmp_path), uninterrupted)


def test_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    error = error_of(capsys, *CLASSIFIER, "--work-dir", place, *SHORT)
    assert error == f"error: {place} cannot be written: Not a directory.\n"


HOLDER = """
import fcntl, sys, time
stream = open(sys.argv[1], "a+")
fcntl.lockf(stream, fcntl.LOCK_EX)
stream.write("process 7 on moon")
stream.flush()
print("held", flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_two_runs_in_one_directory(tmp_path, capsys, uninterrupted):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        error = error_of(capsys, *CLASSIFIER, "--work-dir", tmp_path, *SHORT)
        assert f"{tmp_path} is in use by another training (process 7 on moon): wait" in error
        assert [file.name for file in tmp_path.iterdir()] == [".lock"], "nothing else is written"
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert run(*CLASSIFIER, "--work-dir", tmp_path, *SHORT) == 0
    assert same(weights(tmp_path), uninterrupted)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_resume_takes_nothing_of_the_training_before(tmp_path, capsys, uninterrupted, at_epoch):
    """A new start in the directory of a finished training, killed in its first epoch."""
    assert run(*CLASSIFIER, "--work-dir", tmp_path, *SHORT, "randomness.seed=5") == 0

    def kill():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        call_hook = ConsoleRunner.call_hook

        def calling(self, name, **inputs):
            if name == "after_train_iter":
                kill()
            call_hook(self, name, **inputs)

        patch.setattr(ConsoleRunner, "call_hook", calling)
        assert run(*CLASSIFIER, "--work-dir", tmp_path, *SHORT) == 130
    assert latest_checkpoint(tmp_path) is None and (tmp_path / "epoch_3.pth").is_file()
    capsys.readouterr()
    assert run(*CLASSIFIER, "--work-dir", tmp_path, *SHORT, "--resume") == 0
    assert "holds no checkpoint yet: this is a new start" in capsys.readouterr().out
    assert same(weights(tmp_path), uninterrupted)


def test_a_resume_says_where_it_goes_on_and_what_is_new(tmp_path, capsys, uninterrupted):
    two = [*SHORT[:2], "train_cfg.max_epochs=2", *SHORT[3:]]
    assert run(*CLASSIFIER, "--work-dir", tmp_path, *two) == 0
    assert "goes on" not in capsys.readouterr().out
    assert run(*CLASSIFIER, "--work-dir", tmp_path, *SHORT, "--resume") == 0
    out = capsys.readouterr().out
    assert f"note: this goes on from {tmp_path / 'epoch_2.pth'}." in out
    assert "started with other settings of train_cfg.max_epochs; those given now hold" in out
    assert (tmp_path / "epoch_3.pth").is_file()


def test_without_a_checkpoint_a_resume_does_what_the_config_says(tmp_path, uninterrupted):
    """As the runs of a study and the full trainings of a search do, which continue if they can."""
    torch.save({"state_dict": uninterrupted, "meta": {}}, tmp_path / "given.pth")
    options = ["optim_wrapper.optimizer.lr=0.0", f"load_from={tmp_path / 'given.pth'}"]
    assert run(*CLASSIFIER, "--work-dir", tmp_path / "run", *SHORT, *options, "--resume") == 0
    found = weights(tmp_path / "run")
    learned = [name for name in found if name.endswith(("weight", "bias"))]
    assert learned and all(torch.equal(found[name], uninterrupted[name]) for name in learned)


@pytest.fixture
def scenes(tmp_path):
    settings = DigitScenes(num_train=6, num_val=2, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path / "scenes", settings)


@pytest.mark.parametrize(("change", "workers"), [("gone", 1), ("garbage", 0)])
def test_data_that_changes(scenes, tmp_path, capsys, at_epoch, change, workers):
    picture = sorted((scenes / "images" / "train").iterdir())[3]

    def spoil_annotations():  # they are read once, at the start
        for split in ("train", "val"):
            (scenes / "annotations" / f"{split}.json").write_text("{}")

    def spoil():
        picture.unlink()
        if change == "garbage":
            picture.write_bytes(b"no picture" * 100)

    at_epoch(0, spoil_annotations)
    at_epoch(1, spoil)
    place = ("--data", scenes, "--work-dir", tmp_path / "run")
    loaders = [f"{split}_dataloader.num_workers={workers}" for split in ("train", "val", "test")]
    error = error_of(capsys, *DETECTOR, *place, "--cfg-options", "train_cfg.max_epochs=2", *loaders)
    reason = "No such file" if change == "gone" else "cannot be read as a picture"
    assert str(picture) in error and reason in error
    assert latest_checkpoint(tmp_path / "run").name == "epoch_1.pth"


def test_a_killed_training_ends_as_an_uninterrupted_one():
    # In processes of their own. The script has more of these, at each step of writing a checkpoint.
    command = [sys.executable, ROOT / "benchmarks" / "kill_resume.py", "--losses", "debiased"]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*command, *("--kills", "1", "--writing", "0")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "1 trainings killed and resumed" in done.stdout


def test_clock_that_jumps(tmp_path, capsys, monkeypatch, uninterrupted, at_epoch):
    real, offset = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + offset)

    def back():
        nonlocal offset
        offset -= 86_400.0

    def forth():
        nonlocal offset
        offset += 1e9

    at_epoch(1, back)
    at_epoch(2, forth)
    assert run(*CLASSIFIER, "--work-dir", tmp_path, *SHORT) == 0
    assert same(weights(tmp_path), uninterrupted)
    out = capsys.readouterr().out
    assert int(re.search(r"training +(\d+) min", out)[1]) < 5, "by the clock that does not jump"
    assert latest_checkpoint(tmp_path).name == "epoch_3.pth"
