"""The set-up: which stack it chooses, what it refuses before it installs, and what it takes."""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
setup_env = importlib.util.module_from_spec(spec)
sys.modules["setup_env"] = setup_env  # dataclasses look their module up
spec.loader.exec_module(setup_env)


class Held(setup_env.Environment):
    """An environment of which only its Python's version and its distributions are known."""

    def __init__(self, tmp_path, python=(3, 11), **versions):
        super().__init__(tmp_path / "env")
        self.folder.mkdir(exist_ok=True)
        self.version, self.versions = python, versions

    def python_version(self):
        return self.version

    def installed(self):
        return {name.replace("_", "-"): version for name, version in self.versions.items()}


@pytest.mark.parametrize(
    ("python", "gpu", "nvcc", "stack", "why"),
    [
        ((3, 10), None, False, "upstream", "works on Python 3.10"),
        ((3, 12), None, False, "upstream", "works on Python 3.12"),
        ((3, 13), None, False, "onedl", "cannot be built on Python 3.13"),
        ((3, 14), None, True, "onedl", "cannot be built on Python 3.14"),
        ((3, 11), (9, 0), True, "upstream", "works on Python 3.11"),
        (
            (3, 11),
            (9, 0),
            False,
            "torch21",
            "no nvcc .* wheels with GPU operators are for torch 2.1",
        ),
        ((3, 12), (9, 0), False, "onedl", "no nvcc"),
        ((3, 11), (12, 0), False, "onedl", "no nvcc"),  # torch 2.1 does not know this GPU
    ],
)
def test_choice(python, gpu, nvcc, stack, why):
    chosen, reason = setup_env.choose_stack(python, gpu, nvcc)
    assert chosen == stack
    assert re.search(why, reason), reason
    assert python <= setup_env.STACKS[chosen].newest_python


@pytest.mark.parametrize(
    ("stack", "held", "sentence"),
    [
        ("upstream", dict(python=(3, 13)), "upstream works up to Python 3.12, this is 3.13"),
        ("torch21", dict(python=(3, 12)), "torch21 works up to Python 3.11, this is 3.12"),
        ("upstream", dict(onedl_mmcv="2.3.6"), "env holds onedl-mmcv 2.3.6, .* brings mmcv,"),
        ("onedl", dict(mmdet="3.3.0"), "env holds mmdet 3.3.0, .* brings onedl-mmdetection,"),
        ("torch21", dict(mmcv_lite="2.1.0"), "env holds mmcv-lite 2.1.0, .* brings mmcv,"),
        ("onedl", dict(mmengine="0.10.7"), "env holds mmengine 0.10.7, .* brings onedl-mmengine,"),
    ],
)
def test_refused_before_anything_is_installed(stack, held, sentence, tmp_path):
    with pytest.raises(setup_env.Refused, match=sentence):
        setup_env.check_stack(stack, Held(tmp_path, **held), "2.13.0")


def test_no_compiler_is_said_before_anything_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        setup_env.Refused, match=r"a C\+\+ compiler \(no-such-compiler\) is missing"
    ):
        setup_env.check_stack("upstream", Held(tmp_path), "2.13.0")
    # Where there may be a wheel, it is too early to say so.
    setup_env.check_stack("torch21", Held(tmp_path), "2.1.2")
    monkeypatch.setenv("CXX", "")  # as good as unset
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_env.Refused, match=r"a C\+\+ compiler \(c\+\+\) is missing"):
        setup_env.check_stack("upstream", Held(tmp_path), "2.13.0")


@pytest.mark.parametrize("version", [(3, 9), (3, 15)])
def test_a_python_that_it_does_not_know(version, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    assert setup_env.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Python 3.10 to 3.14 is needed") and error.count("\n") == 1


def test_an_environment_keeps_its_python(tmp_path, monkeypatch):
    environment = Held(tmp_path)
    environment.python.parent.mkdir()
    environment.python.symlink_to(sys.executable)
    setup_env.check_python(environment)
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    with pytest.raises(setup_env.Refused, match=rf"env has Python {own}, and PYTHON is 3\.99"):
        setup_env.check_python(environment)


@pytest.mark.parametrize(
    ("arguments", "given"), [([], False), (["PYTHON=python3"], True), (["STACK=onedl"], False)]
)
def test_make_tells_the_set_up_of_a_python_that_was_asked_for(arguments, given):
    make = ["make", "--dry-run", *arguments, "setup"]
    said = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert ("--this-python" in said) == given


def test_the_environments_own_programs_are_found(tmp_path):
    """Ninja above all: without it mmcv's files are compiled one after the other."""
    environment = Held(tmp_path)
    environment.python.parent.mkdir()
    tool = environment.python.parent / "a-build-tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    code = "import subprocess; subprocess.run(['a-build-tool'], check=True)"
    environment.run([sys.executable, "-c", code], "it was not found")


@pytest.mark.parametrize(("status", "runs"), [(2, 2), (1, 1)])
def test_pip_runs_once_more_where_it_broke_off(status, runs, tmp_path, capsys):
    """pip ends with 2 for an error that it does not know, with 1 for a version not there."""
    environment = Held(tmp_path)
    calls = tmp_path / "calls"
    pip = environment.python
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ntest -e {tmp_path}/again && exit 0\n')
    with pip.open("a") as file:
        file.write(f"touch {tmp_path}/again\nexit {status}\n")
    pip.chmod(0o755)
    expected = pytest.raises(setup_env.StepFailed) if status == 1 else contextlib.nullcontext()
    with expected:
        environment.pip_install("torch==2.1.2")
    assert calls.read_text() == "-m pip install torch==2.1.2\n" * runs
    assert ("once more" in capsys.readouterr().out) == (runs == 2)


def test_an_environment_keeps_its_stack(tmp_path, monkeypatch):
    environment = Held(tmp_path)
    environment.note({"stack": "onedl"}, {})
    with pytest.raises(setup_env.Refused, match="was set up with the stack onedl: remove it"):
        setup_env.set_up_stack(environment, "upstream", None)
    with pytest.raises(setup_env.Refused, match="below 2.2.*, after rm -r env: make"):
        setup_env.set_up_stack(environment, None, "needed")
    nothing = setup_env.Environment(tmp_path / "nothing")  # to remove
    with pytest.raises(setup_env.Refused, match="use Python 3.10 to 3.12 and the stack upstream: "):
        setup_env.set_up_stack(nothing, "onedl", "needed")


@pytest.mark.parametrize("torch", ["2", "new", "2.1.2; rm"])
def test_core_refuses_what_is_no_version(torch, tmp_path):
    with pytest.raises(setup_env.Refused, match="expected a version such as 2.1.2, or newest"):
        setup_env.set_up_core(Held(tmp_path), torch)


def wheel_of_mmcv(folder, extension):
    """A wheel named mmcv 2.1.0 whose operators are a Python module."""
    name = folder / "mmcv-2.1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "mmcv/__init__.py,,\nmmcv/_ext.py,,\nmmcv-2.1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(name, "w") as wheel:
        wheel.writestr("mmcv/__init__.py", "")
        wheel.writestr("mmcv/_ext.py", extension)
        wheel.writestr("mmcv-2.1.0.dist-info/METADATA", metadata)
        wheel.writestr("mmcv-2.1.0.dist-info/WHEEL", tags)
        wheel.writestr("mmcv-2.1.0.dist-info/RECORD", record)


def test_a_wheel_is_taken_if_its_operators_load(tmp_path, monkeypatch):
    environment = setup_env.Environment(tmp_path / "env")
    venv.create(environment.folder, with_pip=True)
    packages = Path(environment.answer(setup_env.PURELIB))
    (packages / "torch.py").write_text("")
    shutil.copytree(Path(pytest.importorskip("packaging").__file__).parent, packages / "packaging")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    stack = setup_env.STACKS["upstream"]

    def take():
        return setup_env.take_wheel(environment, stack, "mmcv==2.1.0", "2.13.0+cpu", "")

    assert not take()  # there is none
    wheel_of_mmcv(wheels, "raise ImportError('undefined symbol')")
    assert not take() and "mmcv" not in environment.installed()
    wheel_of_mmcv(wheels, "")
    assert take() and environment.installed()["mmcv"] == "2.1.0"


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a compiler")
def test_headers_are_compiled_once_with_the_builds_own_flags(tmp_path):
    environment = setup_env.Environment(tmp_path)
    environment.python = Path(sys.executable)
    compiler = setup_env.precompiling_compiler(environment, tmp_path / "scratch").get("CXX")
    if compiler is None:
        pytest.skip("c++ is not g++")
    header = tmp_path / "scratch" / "torch_types.h"
    header.write_text("#include <string>\ninline int ahead() { return SIX; }\n")
    for i in (6, 7):
        (tmp_path / f"{i}.cpp").write_text(
            f"#include <string>\nint main() {{ return {i} - SIX; }}\n"
        )
        # -H lists the headers read; "!" is a precompiled one that is used.
        flags = ["-H", "-MMD", "-MF", f"{i}.d", "-D_GLIBCXX_USE_CXX11_ABI=0", "-fPIC", "-DSIX=6"]
        done = subprocess.run(
            [compiler, *flags, "-c", "-c", f"{i}.cpp", "-o", f"{i}.o"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert f"! {header}.gch" in done.stderr and "warning" not in done.stderr
        subprocess.run([compiler, f"{i}.o", "-o", f"{i}"], cwd=tmp_path, check=True)
        assert subprocess.run([tmp_path / f"{i}"]).returncode == i - 6
    before = (tmp_path / "scratch" / "torch_types.h.gch").stat().st_mtime_ns
    done = subprocess.run([compiler, "-dumpversion"], capture_output=True, check=True)
    assert done.stdout and (header.parent / f"{header.name}.gch").stat().st_mtime_ns == before


def test_the_notes_of_an_interrupted_set_up_are_not_taken_for_finished(tmp_path):
    environment = Held(tmp_path, torch="2.13.0", polyfocal="0.1")
    plan = {"stack": "upstream"}
    assert not environment.finished(plan)
    environment.note(plan, {})
    assert environment.plan() == plan and not environment.finished(plan)
    environment.finish(plan, ["torch", "polyfocal"])
    assert environment.finished(plan) and not environment.finished({"stack": "onedl"})
    environment.versions["torch"] = "2.14.0"
    assert not environment.finished(plan)
    environment.stamp.write_text(json.dumps({"torch": "2.13.0"}))  # what older versions wrote
    assert not environment.finished(plan)


def test_the_first_of_two_distributions_on_the_path_counts(tmp_path, monkeypatch):
    environment = setup_env.Environment(tmp_path)
    unfinished = tmp_path / "numpy-2.0.dist-info"
    unfinished.mkdir()
    listing = [["setuptools", "65.5.0", ""], ["Typing.Extensions", "4", ""]]
    listing += [["setuptools", "80.0", ""], ["numpy", "2.0", str(unfinished)]]
    monkeypatch.setattr(environment, "answer", lambda code: json.dumps(listing))
    assert environment.installed() == {"setuptools": "65.5.0", "typing-extensions": "4"}
    assert not unfinished.exists()  # pip would take it for complete
