"""Kill trainings with SIGKILL, resume them, and compare the weights with an uninterrupted run's.

Each trial trains in its own process, which is killed at a random time, or at a chosen moment of
writing a checkpoint. A second process continues with ``--resume``. It must end with the same
weights and the same optimizer state, bit for bit, must find a whole checkpoint, and must not repeat
more than the iterations between two checkpoints. The exit status is 1 if a trial fails.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from mmap import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine.fileio import LocalBackend
from sklearn.datasets import load_digits

import polyfocal.mmdet  # noqa: F401  imported once, before the processes fork
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.mmengine.checkpoint import check_checkpoint, latest_checkpoint
from polyfocal.mmengine.console import ConsoleRunner

ROOT = Path(__file__).parents[1]

EXAMPLES = """\
examples:
  # 20 random times and every moment of writing, for each loss: about 5 minutes on one core
  python benchmarks/kill_resume.py

  # a RetinaNet on 24 pictures instead of the classifier
  python benchmarks/kill_resume.py --model detector --kills 4
"""

CLASSIFIER_LOSSES = {
    "focal": dict(type="polyfocal.FocalLoss", use_sigmoid=False),
    "cyclical": dict(type="polyfocal.CyclicalFocalLoss", use_sigmoid=False),
    "debiased": dict(
        type="polyfocal.DebiasedFocalLoss",
        use_sigmoid=False,
        anneal_to=0.8,
        bias=dict(type="polyfocal.BiasHead", num_classes=10, sees="colour"),
    ),
}
DETECTOR_LOSSES = {
    "focal": dict(type="polyfocal.FocalLoss", use_sigmoid=True),
    "cyclical": dict(type="polyfocal.CyclicalFocalLoss", use_sigmoid=True),
    "debiased": dict(
        type="polyfocal.DebiasedFocalLoss",
        use_sigmoid=True,
        anneal_to=0.8,
        bias=dict(type="polyfocal.BiasHead", num_classes=10, num_anchors=9, sees="colour"),
    ),
}
EPOCHS = 6


@dataclass
class Moment:
    """When a training is killed: after some seconds, or at a step of its n-th checkpoint."""

    name: str
    seconds: float = 0.0
    checkpoint: int = 0


@dataclass
class Outcome:
    """What is left in a work directory at its end."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def write_config(folder: Path, model: str, loss: str) -> tuple[Path, list[str]]:
    """A config of a small training with flips and, where it has them, data loader workers.

    Returns:
        The config and the options of the train tool.
    """
    config = folder / f"{model}_{loss}.py"
    keep = "default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))\n"
    if model == "classifier":
        settings = dict(loss={"_delete_": True, **CLASSIFIER_LOSSES[loss]})
        base = ROOT / "configs" / "classification" / "focal.py"
        more = "model['data_preprocessor'] = dict(padding=1)\nvariant = dict(num_samples=512)\n"
        data = ["--demo"]
    else:
        settings = dict(bbox_head=dict(loss_cls={"_delete_": True, **DETECTOR_LOSSES[loss]}))
        base = ROOT / "configs" / "retinanet_focal.py"
        more = "custom_hooks = [dict(type='polyfocal.BiasHeadHook')]\n" * (loss == "debiased")
        scenes = DigitScenes(num_train=24, num_val=4, size=96, digits=(1, 2), digit_size=(20, 40))
        data = ["--data", str(write_digit_scenes(folder / "scenes", scenes)), "--profile", "tiny"]
    config.write_text(f"_base_ = {str(base)!r}\nmodel = {settings!r}\n{more}{keep}")
    options = ["--cfg-options", f"train_cfg.max_epochs={EPOCHS}"]
    return config, [*data, *options]


def train(arguments: list[str], iteration: mmap, moment: Moment | None) -> int:
    """Run the train tool in a process of its own; returns its exit status, negative if killed.

    Args:
        arguments: Arguments of the tool.
        iteration: Shared memory, in which the process says how many iterations it has done.
        moment: When to kill it; None to let it end.
    """
    process = os.fork()
    if process == 0:
        _train_here(arguments, iteration, moment)
    if moment is not None and not moment.checkpoint:
        deadline = time.monotonic() + moment.seconds
        while time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _train_here(arguments: list[str], iteration: mmap, moment: Moment | None) -> None:
    """What the child process does; it does not return."""
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        hooks = ConsoleRunner.call_hook

        def call_hook(self: ConsoleRunner, name: str, **inputs: Any) -> None:
            if name == "after_train_iter":
                iteration[:4] = (self.iter + 1).to_bytes(4, "little")
            hooks(self, name, **inputs)

        ConsoleRunner.call_hook = call_hook
        if moment is not None and moment.checkpoint:
            _die_while_writing(moment)
        status = _tool().main(arguments)
    finally:
        os._exit(status)


def _die_while_writing(moment: Moment) -> None:
    """Replaces the functions that write the n-th checkpoint by ones that end at that step."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    saves = 0
    save, put, replace = ConsoleRunner.save_checkpoint, LocalBackend.put, os.replace

    def counting_save(self: ConsoleRunner, *args: Any, **kwargs: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == moment.checkpoint and moment.name == "before it is written":
            die()
        save(self, *args, **kwargs)
        if saves == moment.checkpoint and moment.name == "before it is named the last one":
            die()
        if saves == moment.checkpoint and moment.name == "while it is named the last one":
            Path(self.work_dir, "last_checkpoint").write_text("")
            die()

    def half_put(self: LocalBackend, content: bytes, filepath: str) -> None:
        if saves == moment.checkpoint and moment.name == "when a part of it is written":
            put(self, content[: random.randrange(len(content))], filepath)
            die()
        put(self, content, filepath)

    def no_replace(source: Any, target: Any) -> None:
        if saves == moment.checkpoint and moment.name == "before it gets its name":
            die()
        replace(source, target)

    ConsoleRunner.save_checkpoint = counting_save  # type: ignore[method-assign]
    LocalBackend.put = half_put
    os.replace = no_replace  # type: ignore[assignment]


WRITING = (
    "before it is written",
    "when a part of it is written",
    "before it gets its name",
    "before it is named the last one",
    "while it is named the last one",
)


def _tool() -> ModuleType:
    spec = spec_from_file_location("tool_train", ROOT / "tools" / "train.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(work_dir: Path) -> Outcome:
    """The weights and the optimizer's state of the last checkpoint."""
    file = work_dir / f"epoch_{EPOCHS}.pth"
    content = torch.load(file, weights_only=True)
    return Outcome(content["state_dict"], content["optimizer"]["state"])


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """Names of what is not the same bit for bit."""
    wrong = [
        name
        for name in expected.weights.keys() | found.weights.keys()
        if name not in found.weights
        or name not in expected.weights
        or not torch.equal(found.weights[name], expected.weights[name])
    ]
    for index, state in expected.optimizer.items():
        for name, value in state.items():
            other = found.optimizer[index][name]
            same = torch.equal(other, value) if torch.is_tensor(value) else other == value
            wrong += [] if same else [f"optimizer {index} {name}"]
    return wrong


def trial(
    start: Callable[[Path, Moment | None, bool], int],
    folder: Path,
    moment: Moment,
    iteration: mmap,
    expected: Outcome,
    interval: int,
) -> list[str]:
    """Kill a training at a moment, resume it, and say what is wrong with what became of it."""
    iteration[:4] = bytes(4)
    status = start(folder, moment, False)
    if status not in (0, -signal.SIGKILL):
        return [f"exit status {status} before it was killed"]
    done = int.from_bytes(iteration[:4], "little")
    wrong = []
    last, at = latest_checkpoint(folder), 0
    if last is not None:
        check_checkpoint(last)
        at = torch.load(last, weights_only=True)["meta"]["iter"]
    if done - at > interval:
        wrong.append(f"{done - at} iterations are lost, of {interval} between two checkpoints")
    status = start(folder, None, True)
    if status != 0:
        return [*wrong, f"exit status {status} of the resumed run"]
    wrong += differences(outcome(folder), expected)[:3]
    wrong += [f"{part.name} was left behind" for part in folder.glob("*.part")]
    when = (
        f"{moment.seconds:5.2f} s" if not moment.checkpoint else f"checkpoint {moment.checkpoint}"
    )
    print(f"  {when:12} {moment.name:34} iteration {done:3}, resumed at {at:3}", end="")
    print("" if not wrong else f"  WRONG: {'; '.join(wrong)}", flush=True)
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the trials of each loss; returns 1 where one went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["classifier", "detector"], default="classifier")
    parser.add_argument("--losses", nargs="+", choices=list(CLASSIFIER_LOSSES))
    parser.add_argument("--kills", type=int, default=20, help="at random times, of each loss")
    parser.add_argument("--writing", type=int, default=1, help="of each moment of writing")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    random.seed(args.seed)
    torch.set_num_threads(1)  # the processes fork
    # What they import is imported before: their time goes into training.
    load_digits()
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    wrong = 0
    began = time.monotonic()
    trials = 0
    with tempfile.TemporaryDirectory() as place, mmap(-1, 4) as iteration:
        for loss in args.losses or CLASSIFIER_LOSSES:
            config, options = write_config(Path(place), args.model, loss)

            def start(
                folder: Path,
                moment: Moment | None,
                resume: bool,
                config: Path = config,
                options: list[str] = options,
            ) -> int:
                arguments = [str(config), "--work-dir", str(folder), *options]
                return train([*arguments, *["--resume"] * resume], iteration, moment)

            reference = Path(place, f"{loss}_reference")
            before = time.monotonic()
            if start(reference, None, False) != 0:
                print(f"{loss}: the uninterrupted training failed")
                return 1
            seconds = time.monotonic() - before
            expected = outcome(reference)
            interval = int.from_bytes(iteration[:4], "little") // EPOCHS
            print(
                f"{args.model}, {loss}: {EPOCHS} epochs of {interval} iterations, {seconds:.1f} s"
            )
            moments = [
                Moment("killed", seconds=random.uniform(0, seconds)) for _ in range(args.kills)
            ]
            moments += [
                Moment(name, checkpoint=random.randint(1, EPOCHS))
                for name in WRITING
                for _ in range(args.writing)
            ]
            for number, moment in enumerate(moments):
                folder = Path(place, f"{loss}_{number}")
                wrong += bool(trial(start, folder, moment, iteration, expected, interval))
                trials += 1
    minutes = (time.monotonic() - began) / 60
    print(f"{trials} trainings killed and resumed in {minutes:.1f} minutes, {wrong} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
