"""The scripts for many GPUs: with processes on the CPU, and a stand-in for Slurm's srun."""

import importlib.util
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

import torch

import polyfocal.mmengine  # noqa: F401  (which lets torch read MMEngine's checkpoints)

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
CONFIG = ROOT / "configs" / "classification" / "cyclical.py"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the scripts are for bash")


def start(script, *arguments, **variables):
    return subprocess.Popen(
        [str(TOOLS / script), *map(str, arguments)],
        env={**ENVIRONMENT, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def accuracy(table):
    (line,) = (line for line in table.splitlines() if " top1" in line)
    return line


@pytest.mark.skipif(torch.cuda.is_available(), reason="would take GPUs, of which one may be there")
def test_two_machines_train_and_two_processes_evaluate(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ("--demo", "--work-dir", tmp_path)
    settings = ("--cfg-options", "train_cfg.max_epochs=1")
    machines = [
        start(
            *("dist_train.sh", CONFIG, 1, *options, *settings),
            NNODES="2",
            NODE_RANK=rank,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in "01"
    ]
    for status, _, err in map(outcome, machines):
        assert status == 0, err[-5000:]
    checkpoint = tmp_path / "epoch_1.pth"
    state = torch.load(checkpoint)
    assert state["meta"]["iter"] == -(-1074 // 2 // 64), "each had half of the 1,074 digits"

    status, two, err = outcome(start("dist_test.sh", CONFIG, checkpoint, 2, *options))
    assert status == 0, err[-5000:]
    spec = importlib.util.spec_from_file_location("tool_test", TOOLS / "test.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main([str(one) for one in (CONFIG, checkpoint, *options)]) == 0
    assert accuracy(two) == accuracy(capsys.readouterr().out), "each digit of val once"


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (["dist_train.sh", CONFIG], {}, "error: usage: tools/dist_train.sh CONFIG GPUS"),
        (["dist_train.sh", CONFIG, "--demo"], {}, "error: usage: tools/dist_train.sh CONFIG GPUS"),
        (["dist_train.sh", CONFIG, 8], {"NNODES": "2"}, "NODE_RANK: is the number of this machine"),
        (["dist_test.sh", CONFIG, "a.pth", 0], {}, "error: usage: tools/dist_test.sh CONFIG CHECK"),
        (["slurm_train.sh", "gpu", "name"], {}, "error: usage: tools/slurm_train.sh PARTITION"),
        (["slurm_test.sh"], {}, "error: usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG"),
    ],
)
def test_wrong_use(arguments, variables, sentence):
    status, out, err = outcome(start(*arguments, **variables))
    assert status != 0 and sentence in err and not out


@pytest.mark.parametrize(
    ("script", "fourth", "tool", "option"),
    [
        ("slurm_train.sh", "work", "train.py", ["--work-dir", "work"]),
        ("slurm_test.sh", "a.pth", "test.py", ["a.pth"]),
    ],
)
def test_slurm(tmp_path, script, fourth, tool, option):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SRUN_ARGS": "--time 1:00 -A lab"}
    arguments = (script, "gpu", "job", "a.py", fourth, "--cfg-options", "a=[1, 2]")
    status, out, err = outcome(start(*arguments, GPUS="16", **variables))
    assert status == 0, err
    given = out.splitlines()
    pairs = dict(itertools.pairwise(given))
    wanted = {"--partition": "gpu", "--job-name": "job", "--ntasks": "16", "--gres": "gpu:8"}
    assert {key: pairs[key] for key in wanted} == wanted
    assert pairs["--time"] == "1:00" and pairs["--ntasks-per-node"] == "8"
    command = given[given.index(sys.executable) :]
    assert command[:2] == [sys.executable, "-u"] and Path(command[2]).samefile(TOOLS / tool)
    assert command[3:] == ["a.py", *option, "--launcher", "slurm", "--cfg-options", "a=[1, 2]"]
    status, out, _ = outcome(start(*arguments, GPUS="4", **variables))
    assert "gpu:4" in out.splitlines(), "no more GPUs of a machine than are asked for"
