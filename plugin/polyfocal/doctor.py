"""``python -m polyfocal.doctor``: what is installed here, and whether it fits together.

It says which stack this is, which path each loss takes, and, for everything that does not fit, one
command that mends it. It ends with status 1 if something does not fit.

This module imports only Python's own library. Separate processes import the packages, so that a
broken torch, or a torch that ends its process, is reported like anything else.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from polyfocal.distributions import DISTRIBUTIONS

# Import names, and the distributions that bring them.
PROVIDERS = {
    **{name: (name,) for name in ("torch", "torchvision", "numpy")},
    **DISTRIBUTIONS,
    **{name: (name,) for name in ("mmdet3d", "detectron2", "pycocotools", "polyfocal")},
}
# What must work before a name is tried.
_NEEDS = {
    "torchvision": ("torch",),
    "losses": ("torch",),
    "mmengine": ("torch", "numpy"),
    "mmcv": ("torch", "numpy", "mmengine"),
    "mmdet": ("torch", "numpy", "mmengine", "mmcv", "pycocotools", "losses"),
    "mmdet3d": ("torch", "numpy", "mmengine", "mmcv", "mmdet", "losses"),
    "detectron2": ("torch", "numpy", "torchvision", "pycocotools", "losses"),
}
# Distributions whose name differs from the module that they bring.
_DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "pkg_resources": "setuptools<81",
    "skimage": "scikit-image",
    "google": "protobuf",
    "mpl_toolkits": "matplotlib",
    "nuscenes": "nuscenes-devkit",
    "lyft_dataset_sdk": "lyft-dataset-sdk",
}
_WITHOUT_NEEDS = ("nuscenes-devkit", "lyft-dataset-sdk")  # they ask for old packages of others
_NEWEST_OF_UPSTREAM = (3, 12)  # mmcv below 2.2 cannot be built for a newer Python
# Beside MMDetection 3.3, whatever polyfocal's metadata says; it may be on the path without any.
_MMDET_TAKES = {"mmcv": ">=2.0.0rc4,<2.2.0"}
_WHEELS = "https://download.openmmlab.com/mmcv/dist/{}/torch{}/index.html"
_DETECTRON2 = "git+https://github.com/facebookresearch/detectron2.git"

_LOOK_AT = {
    "torch": """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
try:
    import numpy
except ImportError:
    pass
else:
    torch.from_numpy(numpy.zeros(1)).numpy()
print(json.dumps({"cuda": torch.version.cuda or torch.version.hip, "gpus": names}))
""",
    "torchvision": "import torchvision",
    "pycocotools": "import pycocotools.mask",
    "mmengine": "import polyfocal.mmengine",
    "mmcv": """
import json, mmcv, mmcv._ext
from mmcv.ops import get_compiling_cuda_version
print(json.dumps({"cuda": get_compiling_cuda_version()}))
""",
    "mmdet": "import mmdet, polyfocal.mmdet",
    "mmdet3d": "import mmdet3d, polyfocal.mmdet3d",
    "detectron2": "import detectron2, polyfocal.detectron2",
    "losses": """
import json, polyfocal
from polyfocal.doctor import loss_paths
print(json.dumps(loss_paths()))
""",
}


@dataclass(frozen=True)
class Look:
    """The result of an import in a separate process.

    Attributes:
        error: The last line of the error, empty if there was none.
        found: What the process printed.
    """

    error: str = ""
    found: Any = None


@dataclass(frozen=True)
class Found:
    """What is installed.

    Attributes:
        versions: Versions of the distributions, by normalised name.
        requires: What polyfocal asks for, as its metadata has it.
        wheels: For which Python and machine the distributions' wheels were made.
        looks: Results for the installed import names of ``PROVIDERS`` and for ``losses``.
        compiler: Path of the C++ compiler, empty if there is none.
        compiler_error: The compiler's error for a file of one line that includes Python's header.
        gpu: Whether the machine has a GPU that the driver lists.
        python: The interpreter's version.
        environ: The environment variables.
    """

    versions: Mapping[str, str]
    requires: tuple[str, ...] = ()
    wheels: Mapping[str, str] = field(default_factory=dict)
    looks: Mapping[str, Look] = field(default_factory=dict)
    compiler: str = ""
    compiler_error: str = ""
    gpu: bool = False
    python: tuple[int, ...] = tuple(sys.version_info[:3])
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def provider(self, name: str) -> str:
        """The distribution that brings an import name, empty where none is installed."""
        return next((one for one in PROVIDERS[name] if one in self.versions), "")

    def version(self, name: str) -> str:
        """The version of an import name, empty where it is not installed."""
        return self.versions.get(self.provider(name), "")

    def asks_for(self, extra: str) -> dict[str, str]:
        """The versions that an extra of polyfocal asks for, by distribution; '' for the core."""
        found = {}
        for requirement in self.requires:
            wanted, _, marker = requirement.partition(";")
            of = re.search(r"extra == ['\"]([^'\"]+)", marker)
            match = re.match(r"\s*([\w.-]+)\s*(\[.*\])?\s*(.*?)\s*$", wanted)
            if match and (of[1] if of else "") == extra:
                found[_normal(match[1])] = match[3].strip("() ").replace(" ", "")
        return found


@dataclass(frozen=True)
class Problem:
    """What does not fit together.

    Attributes:
        what: One sentence.
        mend: The command that mends it.
        names: The import names that it is about; what needs them is not checked further.
    """

    what: str
    mend: str
    names: tuple[str, ...] = ()


def main() -> int:
    """Print the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m polyfocal.doctor",
        description="Say what is installed, which path each loss takes, what does not fit "
        "together, and the command that mends it. The exit status is 1 where something does not.",
    )
    parser.parse_args()
    print("looking at what is installed (half a minute) ...", file=sys.stderr, flush=True)
    found = look_around()
    print("\n".join(report(found)))
    wrong = problems(found)
    if not wrong:
        print("\nEverything fits together.")
    for number, problem in enumerate(wrong, start=1):
        print(f"\nproblem {number}: {problem.what}\n    {problem.mend}")
    return 1 if wrong else 0


def look_around() -> Found:
    """Look at this interpreter's environment."""
    versions: dict[str, str] = {}
    wheels: dict[str, str] = {}
    requires: tuple[str, ...] = ()
    for distribution in importlib.metadata.distributions():
        name = _normal(distribution.metadata["Name"] or "")
        if name in versions:  # the first on the path is the one that is imported
            continue
        versions[name] = distribution.version or "?"
        wheels[name] = distribution.read_text("WHEEL") or ""
        if name == "polyfocal":
            requires = tuple(distribution.requires or ())
    for name in PROVIDERS:
        if not any(one in versions for one in PROVIDERS[name]) and _is_there(name):
            versions[name] = "?"
    looks = {"torch": _look("torch")} if "torch" in versions else {}
    if looks and not looks["torch"].error:
        there = {name for name, by in PROVIDERS.items() if any(one in versions for one in by)}
        there -= {"torch", "mmengine"} if "mmdet" in there else {"torch"}  # which imports it
        rest = [name for name in _LOOK_AT if name in {*there, "losses"}]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            looks.update(zip(rest, pool.map(_look, rest), strict=True))
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    compiler = next((path for name in names if name and (path := shutil.which(name))), "")
    return Found(
        versions,
        requires,
        wheels,
        looks,
        compiler,
        _compiler_error(compiler),
        os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
        and _output(["nvidia-smi", "-L"]) != "",
    )


def report(found: Found) -> list[str]:
    """What is there, as lines of a table."""
    lines = [
        f"{'stack':12}{stack(found)}",
        f"{'Python':12}{'.'.join(map(str, found.python))} on {platform.platform()}",
    ]
    for name in PROVIDERS:
        provider = found.provider(name)
        by = f" ({provider})" if provider not in ("", name) else ""
        shown = found.version(name)
        if shown == "?":
            shown = "found on the path, of an unknown version"
        if name == "polyfocal" and not found.requires:
            shown += "; which versions of others it needs is not known: it is not installed"
        lines.append(f"{name:12}{shown or 'not installed'}{by}")
    torch = found.looks.get("torch", Look()).found
    gpu = "unknown, since torch does not work"
    if torch:
        built = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPUs"
        gpu = f"{', '.join(torch['gpus']) or 'none that torch can use'} (torch built for {built})"
    lines += [f"{'compiler':12}{found.compiler or 'none'}", f"{'GPU':12}{gpu}"]
    paths = found.looks.get("losses", Look()).found or {}
    if paths:
        lines += ["", "which path each loss takes", *(f"  {n:30}{p}" for n, p in paths.items())]
    return lines


def stack(found: Found) -> str:
    """Which of the stacks of the documentation is installed."""
    frameworks = []
    if found.version("mmdet"):
        name = "OneDL's MMDetection" if _line(found) == "onedl" else "MMDetection"
        torch = ".".join(map(str, _numbers(found.version("torch"))[:2]))
        wheel = found.wheels.get(found.provider("mmcv"), "")
        mmcv = " with a published wheel of mmcv" if "manylinux" in wheel else ""
        mmcv = " with an mmcv that was built here" if "-linux_" in wheel else mmcv
        frameworks.append(f"{name} on torch {torch}{mmcv}")
    frameworks += ["MMDetection3D"] if found.version("mmdet3d") else []
    frameworks += ["Detectron2"] if found.version("detectron2") else []
    if not frameworks and found.version("mmengine"):
        frameworks = ["MMEngine alone"]
    return " and ".join(frameworks) or "core: the losses alone"


def problems(found: Found) -> list[Problem]:
    """What does not fit together, the causes before what follows of them."""
    wrong: list[Problem] = []
    for check in (_versions, _rivals, _ranges, _numpy, _variables, _compiler, _gpu, _imports):
        blamed = {name for problem in wrong for name in problem.names}
        wrong += check(found, blamed)
    return wrong


def _versions(found: Found, blamed: set[str]) -> Iterable[Problem]:
    for name, wanted in {"torch": ">=2.1", **found.asks_for("")}.items():
        version = found.versions.get(name, "")
        if not version:
            yield Problem(f"{name} is not installed.", _pip(f"{name}{wanted}"), (name,))
        elif not _fits(version, wanted):
            sentence = f"{name} {version} is too old: polyfocal needs {wanted}."
            yield Problem(sentence, _pip("--upgrade", f"{name}{wanted}"), (name,))


def _rivals(found: Found, blamed: set[str]) -> Iterable[Problem]:
    """Distributions of one import name, of two lines, and those without operators."""
    line = _line(found)
    wrong, names = [], []
    for name in DISTRIBUTIONS:
        there = [one for one in PROVIDERS[name] if one in found.versions]
        shown = " and ".join(f"{one} {found.versions[one]}" for one in there)
        if len(there) > 1:
            wrong.append(f"{shown} have the same files, and one has overwritten the other's")
        elif not there or there[0] in _asked(found, line):
            continue
        elif name == "mmcv" and there[0].endswith("-lite"):
            wrong.append(f"{shown} has no operators, which MMDetection needs")
        elif there[0].startswith("onedl") == (line == "onedl"):
            continue  # the same without what polyfocal does not use
        else:
            other = found.provider("mmdet")
            wrong.append(f"{shown} is of another line than {other} {found.versions[other]}")
        names.append(name)
    if wrong:
        wanted = {
            one: range_
            for one, range_ in _asked(found, line).items()
            if any(one in PROVIDERS[name] for name in names)
        }
        yield Problem(f"{'; '.join(wrong)}.", _replace(found, names, wanted), tuple(names))


def _ranges(found: Found, blamed: set[str]) -> Iterable[Problem]:
    """Versions beside MMDetection that it refuses, or that polyfocal was not tried with."""
    framework = found.provider("mmdet")
    if not framework:
        return
    line = _line(found)
    beside = f"{framework} {found.version('mmdet')}"
    for wanted, range_ in _asked(found, line).items():
        name = next(name for name in DISTRIBUTIONS if wanted in PROVIDERS[name])
        version = found.version(name)
        if name in blamed or (version and _fits(version, range_)):
            continue
        if not version:
            sentence = f"{beside} is installed and {wanted} is not."
        elif name == "mmdet":
            sentence = f"{beside} is not a version that polyfocal works with: it needs {range_}."
        else:
            sentence = f"{wanted} {version} does not fit {beside}, which needs {range_}."
        mend = _build(found, {wanted: range_})
        if wanted == "mmcv" and found.python[:2] > _NEWEST_OF_UPSTREAM:
            sentence += " That cannot be built for this Python, and OneDL's line can."
            mend = _replace(found, DISTRIBUTIONS, _asked(found, "onedl"))
        yield Problem(sentence, mend, (name,))
    if line == "onedl" and found.version("mmdet3d"):
        yield Problem(
            f"mmdet3d {found.version('mmdet3d')} needs an mmcv below 2.2, and OneDL's is newer: "
            "MMDetection3D works beside MMDetection's own packages only.",
            f"{_python()} -m pip uninstall -y mmdet3d",
            ("mmdet3d",),
        )


def _numpy(found: Found, blamed: set[str]) -> Iterable[Problem]:
    torch, numpy = found.version("torch"), found.version("numpy")
    if numpy and torch and _numbers(torch) < (2, 3) and _numbers(numpy) >= (2,):
        yield Problem(
            f"torch {torch} was built for NumPy 1, and NumPy {numpy} is installed: it cannot turn "
            "tensors into arrays.",
            _pip("numpy<2"),
            ("numpy", "torch"),
        )


def _variables(found: Found, blamed: set[str]) -> Iterable[Problem]:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    if found.environ.get(name, "0").lower() in ("1", "y", "yes", "true"):
        yield Problem(
            f"the environment variable {name} is set: torch then refuses every other check of a "
            "checkpoint than its own, polyfocal's too.",
            f"unset {name}",
        )
    value = found.environ.get("POLYFOCAL_OPS", "auto")
    if value not in ("auto", "blocked", "composed"):
        yield Problem(
            f"the environment variable POLYFOCAL_OPS is {value!r}: expected auto, blocked or "
            "composed.",
            "unset POLYFOCAL_OPS",
            ("losses",),
        )


def _compiler(found: Found, blamed: set[str]) -> Iterable[Problem]:
    package = "g++" if not found.compiler else "python3-dev"
    mend = {
        "darwin": "xcode-select --install",
        "win32": "winget install Microsoft.VisualStudio.2022.BuildTools",
    }.get(sys.platform, f"apt-get install -y {package}")
    if not found.compiler:
        yield Problem(
            "there is no C++ compiler: torch.compile does not work, large sigmoid losses on a CPU "
            "take the blocked pass, Triton's kernels and mmcv cannot be built.",
            mend,
        )
    elif found.compiler_error:
        yield Problem(
            f"{found.compiler} cannot compile what torch.compile writes: {found.compiler_error}",
            mend,
        )
    torch, setuptools = found.version("torch"), found.versions.get("setuptools", "")
    if _numbers(torch)[:2] == (2, 1) and not (setuptools and _numbers(setuptools) < (81,)):
        which = f"setuptools {setuptools} has no more" if setuptools else "setuptools has"
        yield Problem(
            f"torch.compile of torch {torch} needs pkg_resources, which {which}: large sigmoid "
            "losses on a CPU take the blocked pass.",
            _pip("setuptools<81"),
        )


def _gpu(found: Found, blamed: set[str]) -> Iterable[Problem]:
    torch = found.looks.get("torch", Look()).found
    if not torch:
        return
    version = found.version("torch").partition("+")[0]
    if found.gpu and not torch["cuda"]:
        yield Problem(
            f"this machine has a GPU, and torch {found.version('torch')} is a build for CPUs.",
            _pip("--force-reinstall", f"torch=={version}"),
        )
    elif found.gpu and not torch["gpus"]:
        yield Problem(
            f"this machine has a GPU, and torch {found.version('torch')} finds none: the driver is "
            f"too old for CUDA {torch['cuda']}, or CUDA_VISIBLE_DEVICES names no GPU of this "
            "machine. nvidia-smi says which CUDA the driver can do: install a newer driver, or a "
            "torch for that CUDA.",
            "nvidia-smi",
        )
    mmcv = found.looks.get("mmcv", Look()).found
    if torch["gpus"] and mmcv and mmcv["cuda"] == "not available" and "mmcv" not in blamed:
        provider = found.provider("mmcv")
        yield Problem(
            f"torch uses the GPU, and {provider} {found.version('mmcv')} was built without its "
            "CUDA operators.",
            f"FORCE_CUDA=1 {_build(found, {provider: '==' + found.version('mmcv')}, again=True)}",
            ("mmcv",),
        )


def _imports(found: Found, blamed: set[str]) -> Iterable[Problem]:
    failed = set(blamed) | {name for name, look in found.looks.items() if look.error}
    for name, look in found.looks.items():
        if not look.error or name in blamed or failed & set(_NEEDS.get(name, ())):
            continue
        provider = "polyfocal" if name == "losses" else found.provider(name)
        version = found.versions.get(provider, "")
        sentence = f"{provider} {version} does not work: {look.error}"
        missing = re.search(r"No module named '([\w.]+)'", look.error)
        if name == "mmcv":
            mend = _build(found, {provider: f"=={version}"}, again=True)
        elif missing and missing[1].partition(".")[0] not in PROVIDERS:
            top = missing[1].partition(".")[0]
            package = _DISTRIBUTIONS.get(top, top)
            mend = _pip(*["--no-deps"] * (package in _WITHOUT_NEEDS), package)
        elif name == "torchvision":
            minor = _numbers(found.version("torch"))[1] + 15  # its version counts with torch's
            mend = f"{_python()} -m pip uninstall -y torchvision"
            if found.version("detectron2"):
                mend = _pip("--force-reinstall", "--no-deps", f"torchvision==0.{minor}.*")
        elif name == "detectron2":
            mend = _pip(*_AGAIN, "--no-build-isolation", _DETECTRON2)
        elif name == "losses":
            sentence, mend = (
                f"the losses do not work: {look.error}",
                "export POLYFOCAL_OPS=composed",
            )
        else:
            mend = _pip(*_AGAIN, f"{provider}=={version.partition('+')[0]}")
        yield Problem(sentence, mend, (name,))


_AGAIN = ("--force-reinstall", "--no-deps", "--no-cache-dir")


def loss_paths() -> dict[str, str]:
    """Which path each loss takes here, found by calling it; for a separate process, with spies.

    Returns:
        By the loss's name: what its sigmoid and its softmax form are computed by.
    """
    import inspect

    import torch

    from polyfocal import losses
    from polyfocal.errors import UserError
    from polyfocal.ops import cpu, fused

    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton = fused._triton() if device == "cuda" else None
    large = f"blocked, compiled from {cpu._COMPILE_FROM:,} logits on"
    if not cpu.has_compiler() or fused._path != "auto":
        large = "blocked"
    seen: list[str] = []
    for module, name, what in (
        (cpu, "sigmoid", large),
        (cpu, "softmax_loss", "blocked"),
        (triton, "sigmoid", "Triton"),
        (triton, "softmax_loss", "Triton"),
        (fused, "composed_sigmoid", "composed"),
        (fused, "composed_softmax", "composed"),
    ):
        if module is not None:
            setattr(module, name, _noting(getattr(module, name), what, seen))

    counts, scores = (8.0, 4.0, 2.0, 1.0), torch.rand(6, 4, device=device)
    labels = torch.tensor([0, 1, 2, 3, 0, 1], device=device)
    settings: dict[str, Any] = {
        "epsilon": 1.0,
        "epsilons": (1.0,),
        "gamma": 2.0,
        "k": 2,
        "class_counts": counts,
        "max_margin": 0.5,
    }
    paths = {}
    for name in sorted(losses.LOSSES):
        kind = losses.LOSSES[name]
        wanted = inspect.signature(kind).parameters
        arguments = {
            key: value
            for key, value in settings.items()
            if key in wanted and wanted[key].default in (inspect.Parameter.empty, None)
        }
        arguments |= {
            key: losses.ClassPriors(counts) for key in ("bias", "teacher") if key in wanted
        }
        taken = {}
        for form in ("sigmoid", "softmax"):
            if "use_sigmoid" in wanted:
                arguments["use_sigmoid"] = form == "sigmoid"
            try:
                loss = kind(**arguments).to(device)
            except UserError:  # it has no such form
                continue
            if hasattr(loss, "set_progress"):
                loss.set_progress(0.5)
            errors = []
            for target in (labels, scores, (labels, scores[:, 0])):
                seen.clear()
                prediction = torch.rand(6, 4, device=device, requires_grad=True)
                try:
                    loss(prediction, target).backward()
                except Exception as error:  # it may take another kind of target
                    errors.append(error)
                    continue
                taken[form] = seen[0] if seen else "composed"
                break
            else:
                raise errors[0]
        if taken:
            same = len(set(taken.values())) == 1
            parts = [f"{form}: {path}" for form, path in taken.items()]
            paths[name] = next(iter(taken.values())) if same else "; ".join(parts)
    return paths


def _noting(function: Any, what: str, seen: list[str]) -> Any:
    def noting(*arguments: Any, **options: Any) -> Any:
        seen.append(what)
        return function(*arguments, **options)

    return noting


def _look(name: str) -> Look:
    command = [sys.executable, "-W", "ignore", "-c", _LOOK_AT[name]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Look("it does not answer within 5 minutes")
    if done.returncode < 0:
        return Look(f"it ends the process with signal {-done.returncode}")
    if done.returncode:
        said = done.stderr.splitlines()
        errors = [line for line in said if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        return Look((errors or said or ["it fails without a word"])[-1].strip())
    answer = done.stdout.strip().splitlines()
    try:
        return Look(found=json.loads(answer[-1]) if answer else None)
    except ValueError:
        return Look()


def _compiler_error(compiler: str) -> str:
    if not compiler or os.path.basename(compiler).startswith("cl."):
        return ""
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-x", "c++", "-std=c++17", "-fsyntax-only", f"-I{include}", "-"]
    try:
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True, check=False
        )
    except OSError as error:
        return str(error)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    return (errors or done.stderr.splitlines() or ["it fails"])[0] if done.returncode else ""


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _line(found: Found) -> str:
    """The extra of the line of MMDetection that is here, or that is to stay where both are."""
    upstream, onedl = "mmdet" in found.versions, "onedl-mmdetection" in found.versions
    if upstream != onedl:
        return "onedl" if onedl else "mmdet"
    if upstream:
        return "onedl" if found.python[:2] > _NEWEST_OF_UPSTREAM else "mmdet"
    return "onedl" if any(name.startswith("onedl") for name in found.versions) else "mmdet"


def _asked(found: Found, line: str) -> dict[str, str]:
    """What a line consists of, by distribution, with the versions that polyfocal asks for."""
    asked = found.asks_for(line)
    start = "onedl" if line == "onedl" else "mm"
    names = [one for name in DISTRIBUTIONS for one in PROVIDERS[name] if one.startswith(start)]
    whole = (one for one in names if not one.endswith(("-lite", "-full")))
    return {one: asked.get(one, _MMDET_TAKES.get(one, "")) for one in whole}


def _replace(found: Found, names: Iterable[str], wanted: Mapping[str, str]) -> str:
    """Uninstalls what brings some import names, and installs other distributions."""
    there = [one for name in names for one in PROVIDERS[name] if one in found.versions]
    return f"{_python()} -m pip uninstall -y {' '.join(there)} && {_build(found, wanted)}"


def _build(found: Found, wanted: Mapping[str, str], again: bool = False) -> str:
    """Installs distributions, of which mmcv may have to be compiled against this torch."""
    options = ["--no-build-isolation", *(_AGAIN if again else ())]
    torch = _numbers(found.version("torch"))[:2]
    if "mmcv" in wanted and torch in ((2, 0), (2, 1)):
        cuda = (found.looks.get("torch", Look()).found or {"cuda": None})["cuda"]
        build = "cu" + cuda.replace(".", "") if cuda else "cpu"
        options += ["--find-links", _WHEELS.format(build, ".".join(map(str, torch)))]
    command = _pip(*options, *(f"{name}{pin}" for name, pin in wanted.items()))
    if any("mmcv" in name for name in wanted):
        setuptools = _numbers(found.versions.get("setuptools", "999"))
        if setuptools >= (81,) or "ninja" not in found.versions:
            command = f"{_pip('setuptools<81', 'wheel', 'ninja')} && {command}"
    return command


def _pip(*arguments: str) -> str:
    return f"{_python()} -m pip install {shlex.join(arguments)}"


def _python() -> str:
    return shlex.quote(sys.executable)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 0, 0) for 2.0.0rc4 and 2.0.0+cpu."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0, 0)


def _fits(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ``>=2.0.0rc4,<2.2.0``."""
    if version == "?":
        return True
    have = _numbers(version)
    for part in filter(None, wanted.split(",")):
        match = re.match(r"(>=|<=|==|!=|~=|<|>)(.*)", part)
        if not match:
            continue
        limit = _numbers(match[2])
        width = max(len(have), len(limit))
        a, b = ((*v, *(0,) * (width - len(v))) for v in (have, limit))
        ok = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}
        if not ok.get(match[1], True):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
