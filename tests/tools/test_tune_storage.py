"""One search of several processes that is not in a folder: PostgreSQL, gRPC proxy, journal file."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="needs Optuna: pip install 'polyfocal[mmdet]'")

import optuna
from optuna.trial import TrialState
from searching import SETTINGS, Fake

from polyfocal.errors import UserError
from polyfocal.experiments import tuning
from polyfocal.experiments.request import Request

ROOT = Path(__file__).parents[2]

# Begins a trial and is killed in the middle of it, with no time to say so.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from searching import SETTINGS
from polyfocal.experiments import tuning
tuning._HEARTBEAT = 1
study = tuning.open_study(Path(sys.argv[1]), SETTINGS, {}, sys.argv[2])
def objective(trial):
    trial.suggest_float("epsilon", -1.0, 5.0)
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
study.optimize(objective, n_trials=1)
"""


@pytest.fixture(scope="module")
def postgresql():
    """The address of a PostgreSQL of its own, without a password, behind a socket."""
    if os.name == "nt":
        pytest.skip("the server is started as on Linux")
    pytest.importorskip("psycopg", reason="needs a driver: pip install 'psycopg[binary]'")
    places = [os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    path = os.pathsep.join(places)
    initdb, pg_ctl = (shutil.which(name, path=path) for name in ("initdb", "pg_ctl"))
    if initdb is None or pg_ctl is None:
        pytest.skip("needs PostgreSQL's server, Debian's package postgresql")
    folder = tempfile.mkdtemp(prefix="pg")  # short, for the name of a socket
    who = {}
    if os.geteuid() == 0:  # for which PostgreSQL does not run
        who = {"user": "postgres", "group": "postgres"}
        shutil.chown(folder, "postgres")

    def command(*words):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=folder, **who)

    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    server = [pg_ctl, "--pgdata", f"{folder}/data", "--log", f"{folder}/log"]
    try:
        command(initdb, "--username=me", "--auth=trust", "--no-sync", f"{folder}/data")
        command(*server, "-w", "-o", options, "start")
        yield f"postgresql+psycopg://me:secret@/postgres?host={folder}"
        command(*server, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def grpc(tmp_path):
    """The address of Optuna's proxy, in front of a file."""
    pytest.importorskip("grpc", reason="needs gRPC: pip install grpcio protobuf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import optuna, sys; optuna.storages.run_grpc_proxy_server("
        "optuna.storages.RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/proxy.db", str(port)]
    with subprocess.Popen(command) as server:
        for _ in range(600):
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"grpc://127.0.0.1:{port}"
        server.kill()


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "journal.log")


def searching(folder, train, storage):
    """A search of trials that are ``train(epsilon, watcher)``, and the way to go on with it."""
    tuned = tuning.Tuning(
        Request(lambda request: Fake(train), "mine.py"), folder, epochs=4, storage=storage
    )
    study = tuning.open_study(folder, SETTINGS, {}, storage)

    def search(trials):
        tuned.search(study, seed=0, minutes=None, trials=trials, report=lambda trial: None)

    return study, search


@pytest.mark.parametrize("kind", ["postgresql", "grpc", "journal"])
def test_two_workers_share_a_search(kind, tmp_path, request):
    storage = request.getfixturevalue(kind)
    second = []

    def train(epsilon, watcher):
        if second:  # the first trial is under way when the second worker comes
            second.pop()(trials=2)
        watcher.evaluated(4, {"top1": 0.5})
        return 1.0 - abs(epsilon - 2.0)

    study, search = searching(tmp_path / "search", train, storage)
    second.append(searching(tmp_path / "search", train, storage)[1])
    search(trials=6)
    trials = study.get_trials(states=tuning.DONE)
    assert len(trials) == 6 and trials[0].params == {"epsilon": 1.0}, "the config's own come first"
    assert len({trial.params["epsilon"] for trial in trials}) == 6
    tried = [tuning.rounded(trial.params)["epsilon"] for trial in trials]
    assert study.best_value == max(1.0 - abs(epsilon - 2.0) for epsilon in tried)
    assert not (tmp_path / "search" / tuning.STORAGE_FILE).exists()
    # Another folder is another search; one of other data is refused.
    assert not searching(tmp_path / "other", train, storage)[0].trials[1:]
    with pytest.raises(UserError, match=r"/search with other data: give another --work"):
        tuning.open_study(tmp_path / "search", SETTINGS, {"data": "other"}, storage)


def test_a_worker_that_dies_gives_its_trial_back(postgresql, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_HEARTBEAT", 1)
    places = [str(ROOT / "plugin"), str(ROOT / "tests" / "helpers"), *sys.path]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), postgresql],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )
    assert killed.returncode == -9
    study, search = searching(tmp_path, lambda epsilon, watcher: 0.5, postgresql)
    (under_way,) = study.trials
    assert under_way.state == TrialState.RUNNING and under_way.params == {"epsilon": 1.0}
    time.sleep(3)  # two heartbeats are missing
    search(trials=2)
    first, *others = study.trials
    assert first.state == TrialState.FAIL
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 2
    assert others[0].params == {"epsilon": 1.0} or others[1].params == {"epsilon": 1.0}


def test_workers_of_the_tool_share_a_search(postgresql, tmp_path):
    pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    config = ROOT / "configs" / "classification" / "poly1.py"
    command = [sys.executable, ROOT / "tools" / "tune.py", config, "--demo", "--epochs", 1]
    command += ["--work-dir", tmp_path, "--trials", 3, "--seeds", 0, "--workers", 2]
    command += ["--storage", postgresql, "--cfg-options", "train_cfg.max_epochs=2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name=tmp_path.as_posix(), storage=postgresql)
    trials = study.get_trials(states=tuning.DONE)
    assert 3 <= len(trials) <= 4, "two may have been under way"
    assert all(0 < trial.value <= 1 for trial in trials if trial.state == TrialState.COMPLETE)
    assert not (tmp_path / tuning.STORAGE_FILE).exists()


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/x",
            r"//me:\*\*\*@127.0.0.1:1/x cannot keep",
        ),
        ("nosql://x", "--storage nosql://x cannot keep a search: "),
        ("grpc://here", "expected grpc://HOST:PORT"),
        ("away/journal.log", "--storage away/journal.log cannot keep a search: .*No such file"),
    ],
)
def test_what_cannot_be_a_storage(storage, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "psycopg" in storage:
        pytest.importorskip("psycopg", reason="needs a driver: pip install 'psycopg[binary]'")
    with pytest.raises(UserError, match=sentence) as error:
        tuning.open_study(tmp_path / "search", SETTINGS, {}, storage)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
