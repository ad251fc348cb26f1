"""Create an environment in the repository root and install a stack that polyfocal is tested with.

`make setup`, `make demo` and `make test` run this file for `.venv`, `make test-core`,
`make test-stack` and `make test-detectron2` for others beside it. It needs nothing but the Python
that runs it (3.10 to 3.14), skips whatever is installed already and may be stopped at any moment:
the next run redoes the step that was not finished.

There are three stacks of MMDetection, see STACKS. Which of them works depends on the Python and on
the machine; without --stack the environment's own is kept, or a new one gets the one that works.

Nearly all of the time goes into the operators of mmcv. A prebuilt wheel is taken where there is
one. Otherwise they are compiled: each of the 77 C++ files reads torch's headers, so those are
compiled once, ahead, and the build takes about 3 minutes on 2 cores instead of 16. With another
compiler than g++ the plain build runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 10), (3, 14))  # the oldest and the newest that this file knows

BUILD_TOOLS = ("setuptools", "wheel", "ninja", "packaging")
ONLINE = "Look at the lines above; pip needs a network, or an index that it can reach."
PIP_BROKE_OFF = 2


@dataclass(frozen=True)
class Stack:
    """MMDetection and what it stands on, in versions that are known to work together.

    Attributes:
        what: One line for people.
        extra: The extra of pyproject.toml that names it.
        mmcv: The distribution that brings mmcv.
        accepted: Versions of that distribution that work with the others.
        pins: What is installed. torch comes first, mmcv when the others are there.
        newest_python: The newest Python that all of it can be had for.
        wheels: Page with prebuilt wheels of mmcv, with places for torch's version and CUDA's.
        wheels_torch: The torch that those are made for: taken where there is a GPU.
        with_3d: Whether MMDetection3D accepts this mmcv.
    """

    what: str
    extra: str
    mmcv: str
    accepted: str
    pins: Mapping[str, str]
    newest_python: tuple[int, int]
    wheels: str = ""
    wheels_torch: str = ""
    with_3d: bool = True


UPSTREAM = {"mmengine": "0.10.7", "mmcv": "2.1.0", "mmdet": "3.3.0", "pycocotools": "2.0.11"}
STACKS = {
    "upstream": Stack(
        "MMDetection 3.3 on torch 2.13, mmcv built from its sources",
        extra="mmdet",
        mmcv="mmcv",
        accepted=">=2.0.0rc4,<2.2.0",
        pins={"torch": "2.13.0", **UPSTREAM},
        newest_python=(3, 12),
    ),
    # What MMDetection's own install guide ends in: the newest torch that wheels of an mmcv below
    # 2.2 were made for, and the last NumPy and OpenCV before the ones that need NumPy 2.
    "torch21": Stack(
        "MMDetection 3.3 on torch 2.1, for which mmcv's authors publish wheels",
        extra="mmdet",
        mmcv="mmcv",
        accepted=">=2.0.0rc4,<2.2.0",
        pins={
            "torch": "2.1.2",
            "numpy": "1.26.4",
            "opencv-python": "4.11.0.86",
            **UPSTREAM,
        },
        newest_python=(3, 11),
        wheels="https://download.openmmlab.com/mmcv/dist/{cuda}/torch{major}.{minor}/index.html",
        wheels_torch="2.1.2",
    ),
    "onedl": Stack(
        "OneDL's MMDetection 3.5, the maintained line",
        extra="onedl",
        mmcv="onedl-mmcv",
        accepted=">=2.3.6,<3",
        pins={
            "torch": "2.13.0",
            "onedl-mmengine": "0.10.12",
            "onedl-mmcv": "2.3.6",
            "onedl-mmdetection": "3.5.1",
            "pycocotools": "2.0.11",
        },
        newest_python=PYTHONS[1],
        wheels="https://mmwheels.onedl.ai/simple/{cuda}-torch{major}{minor}{micro}/onedl-mmcv/",
        wheels_torch="2.12.0",
        with_3d=False,
    ),
}

# Distributions that bring the same import name, and so overwrite each other's files.
RIVALS = (
    ("mmengine", "mmengine-lite", "onedl-mmengine", "onedl-mmengine-lite"),
    ("mmcv", "mmcv-lite", "mmcv-full", "onedl-mmcv", "onedl-mmcv-lite"),
    ("mmdet", "onedl-mmdetection"),
)

# What MMDetection3D and these kits ask for (NumPy 1, a second OpenCV, Open3D) breaks the rest and
# is not needed for what is used here, so they are installed without. What they do need is in
# the extra `mmdet3d` of pyproject.toml.
PINS_3D = {
    "mmdet3d": "1.4.0",
    "nuscenes-devkit": "1.2.0",
    "lyft-dataset-sdk": "0.0.8",
    "descartes": "1.1.0",
}

# Detectron2 has no release; what its main branch was built and run with.
DETECTRON2 = "git+https://github.com/facebookresearch/detectron2.git"
PINS_DETECTRON2 = {"torch": "2.14.1", "torchvision": "0.29.1"}

# Prints, for every distribution of the environment, its version and the folder of its metadata
# if pip never finished writing it (INSTALLER is what pip writes last).
LIST_INSTALLED = """
import importlib.metadata as m, json
print(json.dumps([[d.metadata["Name"] or "", d.version or "",
                   "" if d.read_text("INSTALLER") else str(getattr(d, "_path", ""))]
                  for d in m.distributions()]))
"""

# Ends with 0 if the installed mmcv is one that MMDetection accepts and its operators load.
PROBE_MMCV = """
import importlib.metadata
from packaging.specifiers import SpecifierSet
version = importlib.metadata.version({mmcv!r})
assert SpecifierSet({accepted!r}).contains(version, prereleases=True), version
import torch, mmcv._ext
"""

# Prints the CUDA version that torch was built for, if any, and whether the build of mmcv will have
# CUDA operators: without a GPU it leaves them out.
PROBE_CUDA = """
import torch
print(torch.version.cuda or "", int(torch.cuda.is_available() or bool(torch.version.hip)))
"""

# Prints the folder of a Python's packages.
PURELIB = "import sysconfig; print(sysconfig.get_paths()['purelib'])"

# Stands in for the C++ compiler during the build of mmcv. At the first source it compiles torch's
# headers ahead, with that command's own flags: g++ silently ignores a precompiled header that was
# made with any other ones, and they differ from torch to torch and from Linux to Linux.
COMPILER = """#!{python}
import fcntl, os, subprocess, sys

compiler, header = {compiler!r}, {header!r}
command = [*compiler, *sys.argv[1:]]
sources = [word for word in command if word.endswith(".cpp")]
if "-c" in command and len(sources) == 1:
    command += ["-g0", "-O2"]
    flags, skip = [], False
    for word in command:
        if not skip and word not in ("-c", "-o", "-MF", "-MMD", "-MD", *sources):
            flags.append(word)
        skip = word in ("-o", "-MF")
    with open(header + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(header + ".tried"):
            open(header + ".tried", "w").close()
            made = [*flags, "-x", "c++-header", header, "-o", header + ".new"]
            if subprocess.run(made).returncode == 0:
                os.replace(header + ".new", header + ".gch")
    if os.path.exists(header + ".gch"):
        command += ["-include", header, "-Winvalid-pch"]
os.execvp(command[0], command)
"""


class StepFailed(Exception):
    """A command of a step ended with an error; the text says what the user can do.

    Attributes:
        status: The command's exit status, where a command failed.
    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class Refused(Exception):
    """What was asked for cannot work here; the sentence says what would."""


class Step:
    """Says what is being done, and then how long it took."""

    def __init__(self, what: str, expected: str) -> None:
        print(f"* {what} ({expected})", flush=True)
        self.start = time.monotonic()

    def __enter__(self) -> Step:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        verdict = "done" if kind is None else "stopped"
        print(f"    {verdict} after {time.monotonic() - self.start:.1f} s", flush=True)


class Environment:
    """A Python environment in a folder: what it holds, and what is installed into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.log = folder / "setup.log"
        self.stamp = folder / "setup.json"
        self.constraints: dict[str, str] = {}  # versions that no later step may change

    def python_version(self) -> tuple[int, int]:
        """The environment's own, or that of the Python that will make it."""
        text = self.answer("import sys; print(*sys.version_info[:2])")
        major, minor = map(int, text.split()) if text else sys.version_info[:2]
        return major, minor

    def create(self, plan: Mapping[str, object]) -> None:
        """Makes the environment, or completes one whose creation was interrupted.

        Args:
            plan: What it is for; the next run must not make something else of it.
        """
        if not (self.python.exists() and "pip" in self.installed()):
            with Step(f"Python environment in {self.folder.name}", "some seconds"):
                try:
                    venv.create(self.folder, with_pip=True, symlinks=os.name != "nt")
                except (OSError, subprocess.CalledProcessError) as error:
                    raise StepFailed(
                        f"    | {error}\nPython's venv module does not work here: install it (on "
                        "Debian and Ubuntu: apt install python3-venv) or use another one: "
                        "make PYTHON=..."
                    ) from error
        self.log.write_text("", encoding="utf-8")
        if int(self.installed()["pip"].split(".")[0]) < 26:
            # Only later ones go on with a download where it broke off.
            with Step("pip", "some seconds"):
                self.pip_install("--upgrade", "pip>=26")
        self.note(plan, {})

    def run(
        self, command: Sequence[str | Path], advice: str, env: Mapping[str, str] | None = None
    ) -> None:
        """Runs one command, its output going to the log, with a sign of life while it lasts.

        Args:
            command: The program and its arguments.
            advice: One sentence on what to do if the command fails.
            env: Variables to set beside the inherited ones.

        Raises:
            StepFailed: The command ended with a status other than 0.
        """
        start = time.monotonic()
        # Ninja, with which mmcv's files are compiled side by side, is found by its name.
        path = os.pathsep.join([str(self.python.parent), os.environ.get("PATH", os.defpath)])
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            log.write(f"\n$ {shlex.join(map(str, command))}\n")
            log.flush()
            begin = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env={**os.environ, "PATH": path, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                while True:
                    try:
                        status = process.wait(timeout=60)
                        break
                    except subprocess.TimeoutExpired:
                        print(f"    ... {time.monotonic() - start:.0f} s", flush=True)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            if status != 0:
                log.seek(begin)
                tail = "".join(f"    | {line}" for line in log.readlines()[-25:])
                raise StepFailed(f"{tail.rstrip()}\n{advice}", status)

    def answer(self, code: str) -> str | None:
        """What a piece of Python prints in the environment, or None if it ends with an error."""
        if not self.python.exists():
            return None
        return answer_of(self.python, code)

    def pip_install(
        self, *arguments: str, advice: str = ONLINE, env: Mapping[str, str] | None = None
    ) -> None:
        """Runs `pip install`; what is in `constraints` stays or becomes what it says.

        pip ends with status 2 where it met an error that it does not know, such as a connection
        that broke off while torch came: then it is run once more.
        """
        if self.constraints:
            lines = [f"{name}{pin}\n" for name, pin in sorted(self.constraints.items())]
            path = self.folder / "constraints.txt"
            path.write_text("".join(lines), encoding="utf-8")
            arguments = ("--constraint", str(path), *arguments)
        command: list[str | Path] = [self.python, "-m", "pip", "install", *arguments]
        try:
            self.run(command, advice, env)
        except StepFailed as error:
            if error.status != PIP_BROKE_OFF:
                raise
            print("    pip broke off, see the log; once more", flush=True)
            self.run(command, advice, env)

    def pip_install_missing(self, pins: Mapping[str, str], *options: str, expected: str) -> None:
        """Installs what is not there in its version (torch's local builds: 2.13.0+cpu)."""
        versions = self.installed()
        missing = [
            f"{name}=={pin}"
            for name, pin in pins.items()
            if versions.get(name, "").partition("+")[0] != pin
        ]
        if missing:
            with Step(" ".join(missing), expected):
                self.pip_install(*options, *missing)

    def installed(self) -> dict[str, str]:
        """Versions of the environment's distributions by normalised name.

        What pip was writing when it was interrupted counts as missing, and its metadata is removed:
        pip would take it for complete.
        """
        listing = self.answer(LIST_INSTALLED)
        versions: dict[str, str] = {}
        for name, version, unfinished in json.loads(listing or "[]"):
            if not unfinished:
                versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
            elif unfinished.endswith(".dist-info") and self.folder in Path(unfinished).parents:
                shutil.rmtree(unfinished, ignore_errors=True)
        return versions

    def install_build_tools(self) -> None:
        """What mmcv and Detectron2 are built with: their setup.py imports pkg_resources."""
        versions = self.installed()
        fits = 77 <= int(versions.get("setuptools", "0").split(".")[0]) < 81
        if not fits or any(name not in versions for name in BUILD_TOOLS):
            # setuptools 81 and later have no pkg_resources, before 77 they cannot read our licence.
            tools = ["setuptools>=77,<81", *BUILD_TOOLS[1:]]
            with Step("build tools", "some seconds"):
                self.pip_install("--upgrade", *tools)

    def install_polyfocal(self, *extras: str) -> None:
        """This package, from its sources, with some of its extras."""
        with Step(f"polyfocal with the extras {', '.join(extras)}", "some seconds"):
            self.pip_install("--no-build-isolation", "-e", f"{ROOT}[{','.join(extras)}]")

    def plan(self) -> dict[str, Any]:
        """What the environment is for, as noted by `create`."""
        return self.noted().get("plan", {})

    def finished(self, plan: Mapping[str, object]) -> bool:
        """Whether this plan was carried out here and nothing of it has changed since."""
        noted = self.noted()
        return noted.get("plan") == plan and noted["state"] == self.state(noted["state"])

    def finish(self, plan: Mapping[str, object], names: Iterable[str]) -> None:
        """Notes that a plan was carried out, and the versions of what it installed."""
        self.note(plan, self.state(names))

    def noted(self) -> dict[str, Any]:
        """The plan and what its end looked like, or nothing."""
        try:
            noted = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return noted if {"plan", "state"} <= noted.keys() else {}

    def note(self, plan: Mapping[str, object], state: Mapping[str, str]) -> None:
        """Writes down a plan, and what its end looks like where it was reached."""
        partial = self.stamp.with_suffix(".tmp")
        text = json.dumps({"plan": plan, "state": state}, indent=1) + "\n"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.stamp)

    def state(self, names: Iterable[str]) -> dict[str, str]:
        """What has to be the same for a finished set-up to be still valid."""
        versions = self.installed()
        found = {name: versions.get(name, "") for name in names if name not in ("python", "source")}
        pyproject = (ROOT / "pyproject.toml").read_bytes()
        init = (ROOT / "plugin/polyfocal/__init__.py").read_bytes()
        version = re.findall(rb"^__version__.*", init, re.MULTILINE)
        source = hashlib.sha256(b"".join([pyproject, *version])).hexdigest()
        return {**found, "python": str(self.python), "source": source}


def answer_of(python: str | Path, code: str) -> str | None:
    """What a piece of code prints in that Python, or None if it ends with an error."""
    done = subprocess.run(
        [str(python), "-I", "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def dotted(version: Sequence[int]) -> str:
    """3.13 for (3, 13)."""
    return ".".join(map(str, version))


def find_gpu() -> tuple[int, ...] | None:
    """The compute capability of the newest GPU that may be used, or None without one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.findall(r"(\d+)\.(\d+)", listing)
    return max((tuple(map(int, pair)) for pair in found), default=None)


def find_nvcc() -> bool:
    """Whether there is a CUDA compiler where torch looks for one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return bool(shutil.which("nvcc")) or Path(home, "bin", "nvcc").exists()


def choose_stack(
    python: tuple[int, int], gpu: tuple[int, ...] | None, nvcc: bool
) -> tuple[str, str]:
    """The stack that works for a Python and a machine, and why that one."""
    if gpu and not nvcc:
        if python <= STACKS["torch21"].newest_python and gpu < (10, 0):
            return "torch21", (
                "there is a GPU and no nvcc to build mmcv's operators for it, and its authors' "
                "wheels with GPU operators are for torch 2.1"
            )
        return "onedl", (
            "there is a GPU and no nvcc to build mmcv's operators for it, and OneDL publishes "
            f"wheels with GPU operators for Python {dotted(python)}"
        )
    if python > STACKS["upstream"].newest_python:
        return "onedl", (
            f"mmcv 2.1.0 cannot be built on Python {dotted(python)}: its setup.py reads a variable "
            "in a way that Python 3.13 no longer allows"
        )
    return "upstream", f"it works on Python {dotted(python)}"


def check_stack(name: str, environment: Environment, torch: str) -> None:
    """Refuses what cannot work, before anything is installed.

    Raises:
        Refused: The Python is too new, a compiler is missing, or another stack is there.
    """
    stack, folder = STACKS[name], environment.folder.name
    python = environment.python_version()
    if python > stack.newest_python:
        raise Refused(
            f"the stack {name} works up to Python {dotted(stack.newest_python)}, this is "
            f"{dotted(python)}: name an older one, make "
            f"PYTHON=python{dotted(stack.newest_python)} ..., or take STACK=onedl"
        )
    versions = environment.installed()
    for rivals in RIVALS:
        for rival in rivals:
            if rival in versions and rival not in stack.pins:
                (ours,) = (other for other in rivals if other in stack.pins)
                raise Refused(
                    f"{folder} holds {rival} {versions[rival]}, and the stack {name} brings "
                    f"{ours}, which has the same files: remove the environment (rm -r {folder}), "
                    f"or {rival} alone ({folder}/bin/pip uninstall {rival})"
                )
    if torch != stack.wheels_torch and not environment.answer(probe_of(stack)):
        refuse_without_compiler()


def cxx() -> list[str]:
    """The command of the C++ compiler, as setuptools takes it."""
    return shlex.split(os.environ.get("CXX") or "c++")


def refuse_without_compiler() -> None:
    """Says what a build of mmcv needs and this machine does not have."""
    compiler = cxx()[0]
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if os.name == "nt":
        return
    for found, what, package in (
        (shutil.which(compiler), f"a C++ compiler ({compiler})", "g++"),
        (header.exists(), f"Python's headers ({header})", "python3-dev"),
    ):
        if not found:
            raise Refused(
                f"mmcv's operators have to be compiled here, and {what} is missing: on Debian and "
                f"Ubuntu, apt install {package}"
            )


def probe_of(stack: Stack) -> str:
    """Code that prints something if the stack's mmcv is there and its operators load."""
    return PROBE_MMCV.format(mmcv=stack.mmcv, accepted=stack.accepted) + "\nprint(version)"


def install_mmcv(environment: Environment, stack: Stack) -> None:
    """Installs mmcv with its operators: a wheel where there is one, else built from its sources."""
    requirement = f"{stack.mmcv}=={stack.pins[stack.mmcv]}"
    cuda, _, has_gpu = (environment.answer(PROBE_CUDA) or " 0").rpartition(" ")
    torch = environment.installed()["torch"]
    if take_wheel(environment, stack, requirement, torch, cuda):
        return
    refuse_without_compiler()

    plain = [requirement, "--no-build-isolation"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    env = {"MMCV_WITH_OPS": "1", "MAX_JOBS": jobs, **cache_of(environment, torch, has_gpu)}
    if has_gpu != "0":
        advice = (
            "mmcv's CUDA operators could not be built: install the CUDA toolkit (nvcc) of torch's "
            "CUDA version, or set CUDA_VISIBLE_DEVICES to the empty string to build for the CPU."
        )
        with Step(f"{requirement} with its CUDA operators", "can take half an hour"):
            environment.pip_install(*plain, advice=advice, env=env)
            accept_mmcv(environment, stack, advice)
        return

    env["FORCE_CUDA"] = "0"
    advice = (
        "mmcv could not be built: a C++17 compiler (g++ or clang++), Python's headers and 4 GB of "
        "memory are needed; MAX_JOBS=1 makes it use less memory."
    )
    scratch = environment.folder / "mmcv-build"
    quick = precompiling_compiler(environment, scratch)
    expected = "about 4 minutes" if quick else "15 to 30 minutes"
    try:
        with Step(f"{requirement}, compiled", expected):
            environment.pip_install(*plain, advice=advice, env={**env, **quick})
            accept_mmcv(environment, stack, advice)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def take_wheel(
    environment: Environment, stack: Stack, requirement: str, torch: str, cuda: str
) -> bool:
    """Installs a prebuilt wheel of mmcv if pip finds one whose operators load beside this torch."""
    options = ["--only-binary", stack.mmcv, "--retries", "1", "--timeout", "15"]
    if stack.wheels_torch == torch.partition("+")[0]:
        major, minor, micro = re.findall(r"\d+", torch)[:3]
        build = "cu" + cuda.replace(".", "") if cuda else "cpu"
        page = stack.wheels.format(cuda=build, major=major, minor=minor, micro=micro)
        options += ["--find-links", page]
    try:
        with Step(f"{requirement} as a wheel, if there is one", "some seconds"):
            environment.pip_install(*options, requirement, advice="")
    except StepFailed:
        print("    There is none for this machine.")
        return False
    if environment.answer(probe_of(stack)):
        return True
    print("    Its operators do not load beside this torch: it is removed.")
    environment.run([environment.python, "-m", "pip", "uninstall", "-y", stack.mmcv], "")
    return False


def cache_of(environment: Environment, torch: str, has_gpu: str) -> dict[str, str]:
    """Where pip keeps the mmcv that it builds: one built for another torch would not load."""
    cache = subprocess.run(
        [str(environment.python), "-m", "pip", "cache", "dir"],
        capture_output=True,
        text=True,
        check=False,
    )
    if cache.returncode != 0:  # caching is switched off
        return {}
    kind = "gpu" if has_gpu != "0" else "cpu"
    return {"PIP_CACHE_DIR": str(Path(cache.stdout.strip(), f"polyfocal-torch-{torch}-{kind}"))}


def precompiling_compiler(environment: Environment, scratch: Path) -> dict[str, str]:
    """Makes a compiler that reads torch's headers once; returns the variable that names it.

    With another compiler than g++ on Linux it returns nothing: the build is then the plain one.
    """
    compiler = cxx()
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return {}
    if sys.platform != "linux" or "Free Software Foundation" not in version:
        return {}
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    header, wrapper = scratch / "torch_types.h", scratch / "g++"
    header.write_text("#include <torch/types.h>\n", encoding="utf-8")
    text = COMPILER.format(python=environment.python, compiler=compiler, header=str(header))
    wrapper.write_text(text, encoding="utf-8")
    wrapper.chmod(0o755)
    return {"CXX": str(wrapper)}


def accept_mmcv(environment: Environment, stack: Stack, advice: str) -> None:
    """Checks that the installed operators load."""
    if not environment.answer(probe_of(stack)):
        raise StepFailed(f"    mmcv was installed, but its operators do not load.\n{advice}")


def set_up_stack(environment: Environment, name: str | None, with_3d: str | None) -> None:
    """Brings an environment to a tested state, step by step.

    Args:
        environment: Where.
        name: Which stack; None keeps the environment's, or chooses the one that works here.
        with_3d: "needed" installs MMDetection3D, "where-possible" leaves it out where it cannot be
            had and says so, None leaves it out.
    """
    python, gpu = environment.python_version(), find_gpu()
    held = environment.plan().get("stack")
    if name is None:
        name, reason = (held, "") if held else choose_stack(python, gpu, find_nvcc())
        if reason:
            print(f"The stack is {name} ({STACKS[name].what}): {reason}.")
    if held and held != name:
        raise Refused(
            f"{environment.folder.name} was set up with the stack {held}: remove it "
            f"(rm -r {environment.folder.name}) to set it up with {name}"
        )
    stack = STACKS[name]
    if with_3d and not stack.with_3d:
        why = f"MMDetection3D 1.4 needs an mmcv below 2.2, and the stack {name} has a newer one"
        if with_3d == "needed":
            folder = environment.folder.name
            first = f", after rm -r {folder}" if environment.folder.exists() else ""
            raise Refused(
                f"{why}: use Python 3.10 to 3.12 and the stack upstream{first}: "
                "make PYTHON=python3.12 STACK=upstream ..."
            )
        print(f"{why}: it is left out, and its tests are skipped.")
    with_3d = with_3d if stack.with_3d else None

    pins = dict(stack.pins)
    if gpu and stack.wheels_torch:
        pins["torch"] = stack.wheels_torch
    plan = {"stack": name, "pins": pins, "3d": bool(with_3d)}
    start = time.monotonic()
    if environment.finished(plan) or environment.finished({**plan, "3d": True}):
        print(f"The environment in {environment.folder.name} is complete.")
        return
    check_stack(name, environment, pins["torch"])

    environment.create(plan)
    environment.install_build_tools()
    environment.constraints = {package: f"=={pin}" for package, pin in pins.items()}
    early = {package: pin for package, pin in pins.items() if package in ("torch", "numpy")}
    environment.pip_install_missing(early, expected="a minute or two")
    others = {package: pin for package, pin in pins.items() if package not in (*early, stack.mmcv)}
    environment.pip_install_missing(others, expected="a minute")
    if not environment.answer(probe_of(stack)):
        install_mmcv(environment, stack)
    environment.constraints[stack.mmcv] = f"=={environment.installed()[stack.mmcv]}"
    environment.install_polyfocal("mmdet3d" if with_3d else stack.extra, "docs", "test")
    if with_3d:
        environment.pip_install_missing(PINS_3D, "--no-deps", expected="some seconds")
    environment.finish(plan, [*pins, *(PINS_3D if with_3d else ()), "polyfocal"])
    say_complete(environment, start)


def set_up_core(environment: Environment, torch: str) -> None:
    """The package alone, without a framework, on a torch.

    Args:
        environment: Where.
        torch: A version, or "newest" for the index's newest.
    """
    start = time.monotonic()
    newest = torch == "newest"
    if not newest and not re.fullmatch(r"\d+\.\d+(\.\d+)?", torch):
        raise Refused(f"TORCH={torch}: expected a version such as 2.1.2, or newest")
    pins = {} if newest else {"torch": f"=={torch}"}
    if not newest and tuple(map(int, torch.split(".")[:2])) < (2, 3):
        pins["numpy"] = "<2"  # torch before 2.3 was built for NumPy 1
        pins["setuptools"] = "<81"  # later ones have no pkg_resources, for its torch.compile
    plan = {"stack": "core", "torch": torch, "pins": dict(pins)}
    if environment.finished(plan) and not newest:
        print(f"The environment in {environment.folder.name} is complete.")
        return
    environment.create(plan)
    environment.constraints = pins
    wanted = [f"torch{pins.get('torch', '')}", f"numpy{pins.get('numpy', '')}"]
    python = dotted(environment.python_version())
    advice = (
        f"torch {torch} could not be installed for Python {python}. Where the lines above list "
        "other versions, this one has no build for it: name another Python: make test-core "
        f"TORCH={torch} PYTHON=... If there is no such list: {ONLINE[0].lower()}{ONLINE[1:]}"
    )
    with Step(" ".join(wanted), "a minute or two"):
        environment.pip_install("--upgrade", "setuptools>=77", *wanted, advice=advice)
    if newest:  # the test tools must not change it
        pins["torch"] = "==" + environment.installed()["torch"].partition("+")[0]
    environment.install_polyfocal("test")
    environment.finish(plan, ["torch", "numpy", "polyfocal"])
    say_complete(environment, start)


def set_up_detectron2(environment: Environment) -> None:
    """Detectron2 with the test tools.

    Where the Python that runs this file imports Detectron2, that one is used, through a path file
    in an environment of its own; nothing is installed beside it. Elsewhere Detectron2's main branch
    is built.
    """
    python = sys.executable
    found = answer_of(python, "import detectron2.config\n" + PURELIB)
    plan = {"stack": "detectron2", "of": python if found else "", "pins": PINS_DETECTRON2}
    start = time.monotonic()
    if environment.finished(plan):
        print(f"The environment in {environment.folder.name} is complete.")
        return
    if environment.plan().get("of", plan["of"]) != plan["of"]:
        name = environment.folder.name
        raise Refused(f"{name} belongs to another Detectron2: remove it first: rm -r {name}")
    environment.create(plan)
    if found:
        print(f"Detectron2 is that of {python}.")
        place = Path(environment.answer(PURELIB) or "")
        line = f"import site; site.addsitedir({found!r})\n"
        (place / "packages_of_another.pth").write_text(line, encoding="utf-8")
        for name, version in environment.installed().items():
            if name not in ("pip", "setuptools", "wheel", "polyfocal", "detectron2"):
                environment.constraints[name] = f"=={version.partition('+')[0]}"
        environment.install_build_tools()
    else:
        environment.install_build_tools()
        environment.constraints = {name: f"=={pin}" for name, pin in PINS_DETECTRON2.items()}
        environment.pip_install_missing(PINS_DETECTRON2, expected="some minutes")
    environment.install_polyfocal("detectron2", "test")
    if not found:
        advice = (
            "Detectron2 could not be built: it needs git, a network and a C++ compiler. Where it "
            "is installed already, name its Python: make test-detectron2 PYTHON=..."
        )
        with Step("Detectron2's main branch, compiled", "5 minutes"):
            environment.pip_install("--no-build-isolation", DETECTRON2, advice=advice)
    environment.finish(plan, ["torch", "torchvision", "detectron2", "polyfocal"])
    say_complete(environment, start)


def check_python(environment: Environment) -> None:
    """Refuses an environment of another Python, which would be used in place of this one."""
    name, version = environment.folder.name, environment.python_version()
    if version != sys.version_info[:2]:
        raise Refused(
            f"{name} has Python {dotted(version)}, and PYTHON is {dotted(sys.version_info[:2])}: "
            f"leave PYTHON out, or remove the environment first: rm -r {name}"
        )


def say_complete(environment: Environment, start: float) -> None:
    """The last line of a set-up."""
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"The environment in {environment.folder.name} is complete: {minutes} min {seconds} s.")


def main() -> int:
    """Runs the set-up; returns the exit status."""
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        print(
            f"error: Python {dotted(oldest)} to {dotted(newest)} is needed, this is "
            f"{dotted(sys.version_info[:2])}: make PYTHON=python3.12 ...",
            file=sys.stderr,
        )
        return 2
    parser = argparse.ArgumentParser(description="Create an environment with a tested stack.")
    parser.add_argument("--into", default=".venv", metavar="NAME", help="its folder (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--stack",
        choices=STACKS,
        help="; ".join(f"{name}: {stack.what}" for name, stack in STACKS.items())
        + ". Without it: the environment's own, or the one that works here",
    )
    what.add_argument("--core", metavar="TORCH", help="without a framework, on a torch, or newest")
    what.add_argument("--detectron2", action="store_true", help="with Detectron2")
    parser.add_argument(
        "--3d",
        dest="with_3d",
        choices=("needed", "where-possible"),
        help="with MMDetection3D, which is refused or left out where it cannot be had",
    )
    parser.add_argument(
        "--this-python",
        action="store_true",
        help="refuse an environment of another Python than the one that runs this",
    )
    args = parser.parse_args()
    environment = Environment(ROOT / args.into)
    try:
        if args.this_python:
            check_python(environment)
        if args.core:
            set_up_core(environment, args.core)
        elif args.detectron2:
            set_up_detectron2(environment)
        else:
            set_up_stack(environment, args.stack, args.with_3d)
    except Refused as sentence:
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except StepFailed as failure:
        log = f" All output: {environment.log}" * environment.log.exists()
        print(f"{failure}\nerror: the set-up stopped.{log}")
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The next run goes on with the step that was not finished.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
