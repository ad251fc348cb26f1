"""Create `.venv` in the repository root and install the stack that polyfocal is tested with.

`make setup`, `make demo` and, with --3d, `make setup-3d`, `make demo-3d` and `make test` run this
file. It needs nothing but the Python that
runs it (3.10 or newer), skips whatever is installed already and may be stopped at any moment:
the next run redoes the step that was not finished.

Nearly all of the time goes into the operators of mmcv, which come as C++ sources. Each of its
77 files reads torch's headers, so they are compiled once, ahead, and the build takes about
3 minutes on 2 cores instead of 16. Where that is not possible the plain build runs.
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
import time
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOG = VENV / "setup.log"
STAMP = VENV / "setup.json"
SCRATCH = VENV / "mmcv-build"

BUILD_TOOLS = ("setuptools", "wheel", "ninja", "packaging")
PINS = {
    "torch": "2.13.0",
    "mmengine": "0.10.7",
    "mmcv": "2.1.0",
    "mmdet": "3.3.0",
    "pycocotools": "2.0.11",
}

# What MMDetection3D and these kits ask for (NumPy 1, a second OpenCV, Open3D) breaks the rest and
# is not needed for what is used here, so they are installed without. What they do need is in
# the extra `mmdet3d` of pyproject.toml.
PINS_3D = {
    "mmdet3d": "1.4.0",
    "nuscenes-devkit": "1.2.0",
    "lyft-dataset-sdk": "0.0.8",
    "descartes": "1.1.0",
}

# Prints, for every distribution of the environment, its version and the folder of its metadata
# if pip never finished writing it (INSTALLER is what pip writes last).
LIST_INSTALLED = """
import importlib.metadata as m, json
print(json.dumps([[d.metadata["Name"] or "", d.version or "",
                   "" if d.read_text("INSTALLER") else str(getattr(d, "_path", ""))]
                  for d in m.distributions()]))
"""

# Ends with 0 if the installed mmcv is one that mmdet 3.3 accepts and its operators load.
PROBE_MMCV = """
import importlib.metadata
from packaging.specifiers import SpecifierSet
version = importlib.metadata.version("mmcv")
assert SpecifierSet(">=2.0.0rc4,<2.2.0").contains(version, prereleases=True), version
import torch, mmcv._ext
"""

# Ends with 0 if the build will be C++ only: without a GPU mmcv leaves its CUDA files out.
PROBE_CPU_ONLY = """
import sys, torch
sys.exit(1 if torch.cuda.is_available() or torch.version.hip else 0)
"""

# Compiles the header given as the first argument with the flags that the build of mmcv will use:
# g++ silently ignores a precompiled header that was made with any other ones.
PRECOMPILE = """
import os, subprocess, sys, sysconfig
import setuptools
from distutils.ccompiler import new_compiler
from distutils.sysconfig import customize_compiler
from torch.utils.cpp_extension import include_paths

compiler = os.environ.get("CXX", "c++")
version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
if sys.platform != "linux" or "Free Software Foundation" not in version:
    sys.exit("precompiled headers are tried with g++ on Linux only")
flags = new_compiler()
customize_compiler(flags)
command = [compiler, *flags.compiler_so[1:], "-std=c++17", "-DTORCH_API_INCLUDE_EXTENSION_H",
           "-DTORCH_EXTENSION_NAME=_ext"]
command += ["-I" + path for path in [*include_paths(), sysconfig.get_paths()["include"]]]
sys.exit(subprocess.run([*command, "-x", "c++-header", sys.argv[1], "-o", sys.argv[1] + ".gch"],
                        ).returncode)
"""


class StepFailed(Exception):
    """A command of a step ended with an error; the text says what the user can do."""


def run(command: Sequence[str | Path], advice: str, env: dict[str, str] | None = None) -> None:
    """Runs one command, its output going to the log, with a sign of life while it lasts.

    Args:
        command: The program and its arguments.
        advice: One sentence on what to do if the command fails.
        env: Variables to set beside the inherited ones.

    Raises:
        StepFailed: The command ended with a status other than 0.
    """
    start = time.monotonic()
    with LOG.open("a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n$ {shlex.join(map(str, command))}\n")
        log.flush()
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
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
            raise StepFailed(f"{tail.rstrip()}\n{advice}")


def probe(code: str) -> bool:
    """Whether a piece of Python runs without an error in the environment."""
    command = [str(PYTHON), "-I", "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def pip_install(*arguments: str, advice: str, env: dict[str, str] | None = None) -> None:
    """Runs `pip install` in the environment."""
    run([PYTHON, "-m", "pip", "install", *arguments], advice, env)


def installed() -> dict[str, str]:
    """Versions of the environment's distributions by normalised name.

    What pip was writing when it was interrupted counts as missing, and its metadata is removed:
    pip would take it for complete.
    """
    listing = subprocess.run(
        [str(PYTHON), "-I", "-c", LIST_INSTALLED], capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        return {}
    versions = {}
    for name, version, unfinished in json.loads(listing.stdout):
        if not unfinished:
            versions[re.sub(r"[-_.]+", "-", name).lower()] = version
        elif unfinished.endswith(".dist-info") and VENV in Path(unfinished).parents:
            shutil.rmtree(unfinished, ignore_errors=True)
    return versions


def create_venv() -> None:
    """Creates the environment, or completes one whose creation was interrupted."""
    if PYTHON.exists() and "pip" in installed():
        return
    with Step(f"Python environment in {VENV.name}", "some seconds"):
        try:
            venv.create(VENV, with_pip=True, symlinks=os.name != "nt")
        except (OSError, subprocess.CalledProcessError) as error:
            raise StepFailed(
                f"    | {error}\nPython's venv module does not work here: install it (on Debian "
                "and Ubuntu: apt install python3-venv) or use another one: make PYTHON=..."
            ) from error


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


def build_mmcv() -> None:
    """Installs mmcv with its operators: quickly with a precompiled header, else plainly."""
    requirement = f"mmcv=={PINS['mmcv']}"
    plain = [requirement, "--no-build-isolation"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    env = {"MMCV_WITH_OPS": "1", "MAX_JOBS": jobs}
    if not probe(PROBE_CPU_ONLY):
        advice = (
            "mmcv's CUDA operators could not be built: install the CUDA toolkit (nvcc) of torch's "
            "CUDA version, or set CUDA_VISIBLE_DEVICES to the empty string to build for the CPU."
        )
        with Step(f"{requirement} with its CUDA operators", "can take half an hour"):
            pip_install(*plain, advice=advice, env=env)
            accept_mmcv(plain, advice, env)
        return

    env["FORCE_CUDA"] = "0"
    try:
        with Step(f"{requirement}, compiled with a precompiled header", "about 4 minutes"):
            quick = {**env, **precompile_torch()}
            pip_install(*plain, advice="", env=quick)
            accept_mmcv(plain, "", quick)
    except StepFailed as failure:
        print(f"{failure}\n    The quick build does not work here: the plain one follows.")
        advice = (
            "mmcv could not be built: a C++17 compiler (g++ or clang++), Python's headers and "
            "4 GB of memory are needed; MAX_JOBS=1 makes it use less memory."
        )
        with Step(f"{requirement}, compiled plainly", "15 to 30 minutes"):
            pip_install(*plain, advice=advice, env=env)
            accept_mmcv(plain, advice, env)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


def precompile_torch() -> dict[str, str]:
    """Compiles torch's headers ahead; returns the variables with which the build uses them."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir()
    header = SCRATCH / "torch_types.h"
    header.write_text("#include <torch/types.h>\n", encoding="utf-8")
    flags = "-g0 -O2 -DNDEBUG"
    run([PYTHON, "-c", PRECOMPILE, header], "", {"CFLAGS": flags})
    return {"CFLAGS": f"{flags} -include {shlex.quote(str(header))} -Winvalid-pch"}


def accept_mmcv(arguments: Sequence[str], advice: str, env: dict[str, str]) -> None:
    """Checks that the installed operators load; if not, builds them anew.

    pip keeps the wheel that it built, and one built for another torch does not load beside this.
    """
    if not probe(PROBE_MMCV):
        rebuild = ["--no-cache-dir", "--force-reinstall", "--no-deps"]
        pip_install(*rebuild, *arguments, advice=advice, env=env)
    if not probe(PROBE_MMCV):
        raise StepFailed(f"    mmcv was installed, but its operators do not load.\n{advice}")


def fingerprint(versions: dict[str, str], pins: Iterable[str]) -> dict[str, str]:
    """What has to be the same for a finished set-up to be still valid."""
    init = (ROOT / "plugin/polyfocal/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__\s*=\s*"([^"]+)"', init, re.MULTILINE)
    pyproject = (ROOT / "pyproject.toml").read_bytes()
    return {
        "polyfocal": version.group(1) if version else "",
        "pyproject": hashlib.sha256(pyproject).hexdigest(),
        "python": str(PYTHON),
        **{name: versions.get(name, "") for name in pins},
    }


def set_up(with_3d: bool) -> None:
    """Brings the environment to the tested state, step by step.

    Args:
        with_3d: With MMDetection3D.

    Raises:
        StepFailed: A step did not work.
    """
    online = "Look at the lines above; pip needs a network, or an index that it can reach."
    start = time.monotonic()
    create_venv()
    versions = installed()
    try:
        finished = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        finished = {}
    pins = [*PINS, *PINS_3D] if with_3d else list(PINS)
    wanted = fingerprint(versions, pins)
    if wanted.items() <= finished.items() and "polyfocal" in versions:
        took = time.monotonic() - start
        print(f"The environment in {VENV.name} is complete (looked for {took:.1f} s).")
        return

    LOG.write_text("", encoding="utf-8")
    old_setuptools = int(versions.get("setuptools", "999").split(".")[0]) < 81
    if not old_setuptools or any(name not in versions for name in BUILD_TOOLS):
        # mmcv's setup.py imports pkg_resources, which setuptools 81 no longer brings.
        tools = ["setuptools<81", *(name for name in BUILD_TOOLS if name != "setuptools")]
        with Step("build tools", "some seconds"):
            pip_install("--upgrade", "pip", *tools, advice=online)

    # Local builds of torch are called "2.13.0+cpu" and the like.
    if versions.get("torch", "").split("+")[0] != PINS["torch"]:
        with Step(f"torch {PINS['torch']}", "a minute or two"):
            pip_install(f"torch=={PINS['torch']}", advice=online)

    plain = [name for name in PINS if name not in ("torch", "mmcv")]
    missing = [f"{name}=={PINS[name]}" for name in plain if versions.get(name) != PINS[name]]
    if missing:
        with Step(" ".join(missing), "a minute"):
            pip_install(*missing, advice=online)

    if not probe(PROBE_MMCV):
        build_mmcv()

    extra = "mmdet3d" if with_3d else "mmdet"
    with Step(f"polyfocal with the extras {extra}, docs and test", "some seconds"):
        editable = ["--no-build-isolation", "-e", f"{ROOT}[{extra},docs,test]"]
        pip_install(*editable, advice=online)

    if with_3d:
        missing = [f"{name}=={pin}" for name, pin in PINS_3D.items() if versions.get(name) != pin]
        if missing:
            with Step(" ".join(missing), "some seconds"):
                pip_install("--no-deps", *missing, advice=online)

    partial = STAMP.with_suffix(".tmp")
    partial.write_text(
        json.dumps(fingerprint(installed(), pins), indent=1) + "\n", encoding="utf-8"
    )
    os.replace(partial, STAMP)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"The environment in {VENV.name} is complete: {minutes} min {seconds} s.")


def main() -> int:
    """Runs the set-up; returns the exit status."""
    if sys.version_info < (3, 10):  # noqa: UP036  (the reader's Python may well be older)
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"error: Python 3.10 or newer is needed, this is {found}.", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description="Create .venv and install the tested stack.")
    parser.add_argument("--3d", action="store_true", dest="with_3d", help="with MMDetection3D")
    args = parser.parse_args()
    try:
        set_up(args.with_3d)
    except StepFailed as failure:
        print(f"{failure}\nerror: the set-up stopped." + f" All output: {LOG}" * LOG.exists())
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The next run goes on with the step that was not finished.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
