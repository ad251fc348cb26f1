"""What the doctor finds in environments broken on purpose, and the command that it names."""

import importlib.util
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from polyfocal import doctor
from polyfocal.distributions import DISTRIBUTIONS
from polyfocal.doctor import Found, Look, problems, report, stack

ROOT = Path(__file__).resolve().parent.parent
PIP = f"{sys.executable} -m pip"

# As the metadata of the package has it.
REQUIRES = (
    "torch>=2.1",
    'mmengine<1,>=0.10.3; extra == "mmdet"',
    'mmcv<2.2.0,>=2.0.0rc4; extra == "mmdet"',
    'mmdet<3.4,>=3.3; extra == "mmdet"',
    'onedl-mmengine<1,>=0.10.12; extra == "onedl"',
    'onedl-mmcv<3,>=2.3.6; extra == "onedl"',
    'onedl-mmdetection<4,>=3.5.1; extra == "onedl"',
)
CORE = {"torch": "2.13.0", "numpy": "2.4.6", "polyfocal": "0.1.0", "setuptools": "80.9.0"}
CORE["ninja"] = "1.11"
UPSTREAM = {**CORE, "mmengine": "0.10.7", "mmcv": "2.1.0", "mmdet": "3.3.0"}
ONEDL = {
    **CORE,
    "onedl-mmengine": "0.10.12",
    "onedl-mmcv": "2.3.6",
    "onedl-mmdetection": "3.5.1",
}
TORCH = Look(found={"cuda": None, "gpus": []})
CUDA = Look(found={"cuda": "12.1", "gpus": ["NVIDIA H100"]})


def found(versions, **more):
    looks = {"torch": TORCH, **more.pop("looks", {})}
    more = {"python": (3, 11, 2), "compiler": "/usr/bin/g++", "environ": {}, **more}
    return Found(versions, REQUIRES, looks=looks, **more)


@pytest.mark.parametrize(
    ("versions", "name"),
    [
        (CORE, "core: the losses alone"),
        (UPSTREAM, "MMDetection on torch 2.13"),
        ({**UPSTREAM, "torch": "2.1.2", "mmdet3d": "1.4.0"}, "MMDetection on torch 2.1 and MMDet"),
        (ONEDL, "OneDL's MMDetection on torch 2.13"),
        ({**CORE, "detectron2": "0.6"}, "Detectron2"),
        ({**CORE, "mmengine": "0.10.7"}, "MMEngine alone"),
    ],
)
def test_what_fits_together(versions, name):
    versions = {**versions, "numpy": "1.26.4"} if "mmdet3d" in versions else versions
    assert problems(found(versions)) == []
    assert stack(found(versions)).startswith(name)


def test_where_mmcv_comes_from():
    for tag, words in (
        ("Tag: cp311-cp311-manylinux1_x86_64\n", "with a published wheel of mmcv"),
        ("Tag: cp311-cp311-linux_x86_64\n", "with an mmcv that was built here"),
    ):
        assert stack(found(UPSTREAM, wheels={"mmcv": tag})).endswith(words)


LITE = {name: version for name, version in UPSTREAM.items() if name != "mmcv"}
BARE = {name: version for name, version in LITE.items() if name != "ninja"}

BROKEN = {
    "mmcv 2.2 beside mmdet 3.3": (
        {**UPSTREAM, "mmcv": "2.2.0"},
        {"looks": {"mmdet": Look("AssertionError: MMCV==2.2.0 is used but incompatible.")}},
        r"mmcv 2.2.0 does not fit mmdet 3.3.0, which needs <2.2.0,>=2.0.0rc4\.",
        f"{PIP} install --no-build-isolation 'mmcv<2.2.0,>=2.0.0rc4'",
    ),
    "mmcv-lite": (
        {**LITE, "mmcv-lite": "2.1.0"},
        {"looks": {"mmcv": Look("ModuleNotFoundError: No module named 'mmcv._ext'")}},
        r"mmcv-lite 2.1.0 has no operators, which MMDetection needs\.",
        f"{PIP} uninstall -y mmcv-lite && "
        f"{PIP} install --no-build-isolation 'mmcv<2.2.0,>=2.0.0rc4'",
    ),
    "two mmcv": (
        {**UPSTREAM, "onedl-mmcv": "2.3.6"},
        {},
        r"mmcv 2.1.0 and onedl-mmcv 2.3.6 have the same files",
        f"{PIP} uninstall -y mmcv onedl-mmcv && "
        f"{PIP} install --no-build-isolation 'mmcv<2.2.0,>=2.0.0rc4'",
    ),
    "two stacks": (
        {**UPSTREAM, **ONEDL},
        {},
        r"mmengine 0.10.7 and onedl-mmengine 0.10.12 have the same files.*; mmdet 3.3.0 and onedl",
        f"{PIP} uninstall -y mmengine onedl-mmengine mmcv onedl-mmcv mmdet onedl-mmdetection && "
        f"{PIP} install --no-build-isolation 'mmengine<1,>=0.10.3' 'mmcv<2.2.0,>=2.0.0rc4' "
        "'mmdet<3.4,>=3.3'",
    ),
    "two stacks on a Python without the one": (
        {**UPSTREAM, **ONEDL},
        {"python": (3, 13, 5)},
        "have the same files",
        f"{PIP} uninstall -y mmengine onedl-mmengine mmcv onedl-mmcv mmdet onedl-mmdetection && "
        f"{PIP} install --no-build-isolation 'onedl-mmengine<1,>=0.10.12' 'onedl-mmcv<3,>=2.3.6' "
        "'onedl-mmdetection<4,>=3.5.1'",
    ),
    "OneDL's mmcv beside upstream's mmdet": (
        {**LITE, "onedl-mmcv": "2.3.6"},
        {},
        r"onedl-mmcv 2.3.6 is of another line than mmdet 3.3.0\.",
        f"{PIP} uninstall -y onedl-mmcv && "
        f"{PIP} install --no-build-isolation 'mmcv<2.2.0,>=2.0.0rc4'",
    ),
    "no mmcv": (
        {**BARE, "torch": "2.1.2", "numpy": "1.26.4"},
        {"looks": {"torch": CUDA}},
        r"mmdet 3.3.0 is installed and mmcv is not\.",
        f"{PIP} install 'setuptools<81' wheel ninja && {PIP} install --no-build-isolation "
        "--find-links https://download.openmmlab.com/mmcv/dist/cu121/torch2.1/index.html "
        "'mmcv<2.2.0,>=2.0.0rc4'",
    ),
    "mmcv of another torch": (
        UPSTREAM,
        {"looks": {"mmcv": Look("ImportError: mmcv/_ext.so: undefined symbol: _ZN2at4")}},
        r"mmcv 2.1.0 does not work: ImportError: mmcv/_ext.so: undefined symbol",
        f"{PIP} install --no-build-isolation --force-reinstall --no-deps --no-cache-dir "
        "mmcv==2.1.0",
    ),
    "mmcv without CUDA": (
        UPSTREAM,
        {"looks": {"torch": CUDA, "mmcv": Look(found={"cuda": "not available"})}, "gpu": True},
        r"torch uses the GPU, and mmcv 2.1.0 was built without its CUDA operators\.",
        f"FORCE_CUDA=1 {PIP} install --no-build-isolation --force-reinstall --no-deps "
        "--no-cache-dir mmcv==2.1.0",
    ),
    "a driver that is too old for torch": (
        CORE,
        {"looks": {"torch": Look(found={"cuda": "13.0", "gpus": []})}, "gpu": True},
        r"has a GPU, and torch 2.13.0 finds none: the driver is too old for CUDA 13.0, or CUDA_V",
        "nvidia-smi",
    ),
    "an mmcv that is too new, on a Python without another": (
        {**UPSTREAM, "mmcv": "2.2.0"},
        {"python": (3, 13, 5)},
        r"mmcv 2.2.0 does not fit mmdet 3.3.0, .* cannot be built for this Python",
        f"{PIP} uninstall -y mmengine mmcv mmdet && "
        f"{PIP} install --no-build-isolation 'onedl-mmengine<1,>=0.10.12' 'onedl-mmcv<3,>=2.3.6' "
        "'onedl-mmdetection<4,>=3.5.1'",
    ),
    "a package whose module has another name": (
        {**UPSTREAM, "numpy": "1.26.4", "mmdet3d": "1.4.0"},
        {"looks": {"mmdet3d": Look("ModuleNotFoundError: No module named 'skimage'")}},
        r"mmdet3d 1.4.0 does not work: ModuleNotFoundError: No module named 'skimage'",
        f"{PIP} install scikit-image",
    ),
    "a package that asks for old ones": (
        {**UPSTREAM, "numpy": "1.26.4", "mmdet3d": "1.4.0"},
        {"looks": {"mmdet3d": Look("ModuleNotFoundError: No module named 'nuscenes'")}},
        r"mmdet3d 1.4.0 does not work: ModuleNotFoundError: No module named 'nuscenes'",
        f"{PIP} install --no-deps nuscenes-devkit",
    ),
    "NumPy 2 beside torch 2.1": (
        {**CORE, "torch": "2.1.2+cu121"},
        {"looks": {"torch": Look("RuntimeError: Numpy is not available")}},
        r"torch 2.1.2\+cu121 was built for NumPy 1, and NumPy 2.4.6 is installed",
        f"{PIP} install 'numpy<2'",
    ),
    "no compiler": (
        CORE,
        {"compiler": ""},
        r"there is no C\+\+ compiler: torch.compile does not work",
        "apt-get install -y g++",
    ),
    "no headers": (
        CORE,
        {"compiler_error": "fatal error: Python.h: No such file or directory"},
        r"/usr/bin/g\+\+ cannot compile what torch.compile writes: fatal error: Python.h",
        "apt-get install -y python3-dev",
    ),
    "setuptools too new for the torch.compile of torch 2.1": (
        {**CORE, "torch": "2.1.2", "numpy": "1.26.4", "setuptools": "82.0"},
        {},
        r"torch.compile of torch 2.1.2 needs pkg_resources, which setuptools 82.0 has no more",
        f"{PIP} install 'setuptools<81'",
    ),
    "no torch": (
        {"numpy": "2.4.6", "polyfocal": "0.1.0"},
        {},
        r"torch is not installed\.",
        f"{PIP} install 'torch>=2.1'",
    ),
    "an old torch": (
        {**CORE, "torch": "2.0.1", "numpy": "1.26.4"},
        {},
        r"torch 2.0.1 is too old: polyfocal needs >=2.1\.",
        f"{PIP} install --upgrade 'torch>=2.1'",
    ),
    "a torch that crashes": (
        CORE,
        {"looks": {"torch": Look("it ends the process with signal 11")}},
        r"torch 2.13.0 does not work: it ends the process with signal 11",
        f"{PIP} install --force-reinstall --no-deps --no-cache-dir torch==2.13.0",
    ),
    "torchvision of another build": (
        {**CORE, "torchvision": "0.28.0"},
        {"looks": {"torchvision": Look("RuntimeError: operator torchvision::nms does not exist")}},
        "torchvision 0.28.0 does not work: RuntimeError: operator torchvision::nms",
        f"{PIP} uninstall -y torchvision",
    ),
    "the same for Detectron2": (
        {**CORE, "torch": "2.14.1", "torchvision": "0.28.0", "detectron2": "0.6"},
        {
            "looks": {
                "torchvision": Look("RuntimeError: operator torchvision::nms does not exist"),
                "detectron2": Look("RuntimeError: operator torchvision::nms does not exist"),
            }
        },
        "torchvision 0.28.0 does not work",
        f"{PIP} install --force-reinstall --no-deps 'torchvision==0.29.*'",
    ),
    "a package that mmdet imports": (
        UPSTREAM,
        {"looks": {"mmdet": Look("ModuleNotFoundError: No module named 'cv2'")}},
        "mmdet 3.3.0 does not work: ModuleNotFoundError: No module named 'cv2'",
        f"{PIP} install opencv-python-headless",
    ),
    "MMDetection3D beside OneDL": (
        {**ONEDL, "mmdet3d": "1.4.0"},
        {},
        "mmdet3d 1.4.0 needs an mmcv below 2.2, and OneDL's is newer",
        f"{PIP} uninstall -y mmdet3d",
    ),
    "torch for CPUs on a GPU": (
        {**CORE, "torch": "2.13.0+cpu"},
        {"gpu": True},
        r"this machine has a GPU, and torch 2.13.0\+cpu is a build for CPUs\.",
        f"{PIP} install --force-reinstall torch==2.13.0",
    ),
    "a variable": (
        CORE,
        {"environ": {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}},
        "the environment variable TORCH_FORCE_WEIGHTS_ONLY_LOAD is set",
        "unset TORCH_FORCE_WEIGHTS_ONLY_LOAD",
    ),
    "another variable": (
        CORE,
        {"environ": {"POLYFOCAL_OPS": "fast"}, "looks": {"losses": Look("polyfocal.errors...")}},
        "the environment variable POLYFOCAL_OPS is 'fast': expected auto, blocked or composed",
        "unset POLYFOCAL_OPS",
    ),
    "losses that fail": (
        CORE,
        {"looks": {"losses": Look("RuntimeError: Failed to find C compiler.")}},
        "the losses do not work: RuntimeError: Failed to find C compiler.",
        "export POLYFOCAL_OPS=composed",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the commands are Debian's")
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name):
    versions, more, sentence, mend = BROKEN[name]
    (problem,) = problems(found(versions, **more))  # one cause, and nothing of what follows of it
    assert re.search(sentence, problem.what), problem.what
    assert problem.mend == mend


def test_two_causes_are_two_problems():
    wrong = problems(found({**UPSTREAM, "mmcv": "2.2.0", "torch": "2.1.2"}, compiler=""))
    assert [problem.what.split()[0] for problem in wrong] == ["mmcv", "torch", "there"]


def test_without_metadata_of_the_package():
    """On the path and not installed: what MMDetection itself refuses is known all the same."""
    (problem,) = problems(Found({**UPSTREAM, "mmcv": "2.2.0"}, compiler="g++", environ={}))
    assert "mmcv 2.2.0 does not fit mmdet 3.3.0, which needs >=2.0.0rc4,<2.2.0" in problem.what
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"mmcv{doctor._MMDET_TAKES["mmcv"]}"' in pyproject
    lines = report(Found(UPSTREAM, compiler="g++", environ={}))
    assert "GPU         unknown, since torch does not work" in lines
    assert any(line.startswith("polyfocal") and "not installed" in line for line in lines)


def test_report_names_everything():
    looks = {"torch": CUDA, "losses": Look(found={"FocalLoss": "Triton"})}
    text = "\n".join(report(found(ONEDL, looks=looks)))
    for line in (
        r"mmcv +2\.3\.6 \(onedl-mmcv\)",
        r"mmdet3d +not installed",
        r"compiler +/usr/bin/g\+\+",
        r"GPU +NVIDIA H100 \(torch built for CUDA 12\.1\)",
        r"  FocalLoss +Triton",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), text


def run_doctor(python=sys.executable, path=(), **variables):
    """The command itself, with folders of packages beside this one's sources."""
    folders = os.pathsep.join(map(str, [*path, ROOT / "plugin"]))
    return subprocess.run(
        [python, "-m", "polyfocal.doctor"],
        env={**os.environ, "PYTHONPATH": folders, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python in whose environment nothing is installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=os.name != "nt")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(folder, **versions):
    """Leaves of each distribution what its metadata says, and nothing to import."""
    for name, version in versions.items():
        place = folder / f"{name}-{version}.dist-info"
        place.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        if name == "polyfocal":
            lines += [f"Requires-Dist: {requirement}" for requirement in REQUIRES]
        (place / "METADATA").write_text("\n".join(lines) + "\n\n")


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ({}, "torch is not installed"),
        ({"torch": "2.13.0", "mmcv": "2.2.0", "mmdet": "3.3.0", "mmengine": "0.10.7"}, "mmcv 2.2"),
        ({"torch": "2.1.2", "numpy": "2.4.6"}, "torch 2.1.2 was built for NumPy 1, and NumPy 2"),
        ({"torch": "2.13.0", "mmcv_lite": "2.1.0", "mmdet": "3.3.0"}, "mmcv-lite 2.1.0 has no op"),
        ({"torch": "2.13.0", "mmcv": "2.1.0", "onedl_mmcv": "2.3.6"}, "onedl-mmcv 2.3.6 have the "),
        ({"torch": "2.13.0"}, "torch 2.13.0 does not work: ModuleNotFoundError: No module named"),
    ],
    ids=["nothing", "mmcv 2.2", "NumPy 2", "mmcv-lite", "two mmcv", "torch without its files"],
)
def test_the_command_in_a_broken_environment(tmp_path, bare_python, versions, sentence):
    install(tmp_path, polyfocal="0.1.0", **versions)
    done = run_doctor(bare_python, path=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    assert sentence in done.stdout and "Traceback" not in done.stderr
    assert re.search(r"^problem 1: .*\n    \S", done.stdout, re.MULTILINE)
    assert "Everything fits" not in done.stdout


def test_the_command_without_a_compiler(tmp_path, bare_python):
    done = run_doctor(bare_python, PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert "there is no C++ compiler" in done.stdout


def test_the_command_here():
    """What it says of the losses is what they do: the same from their own choice of a path."""
    from polyfocal.ops import cpu

    done = run_doctor()
    shown = dict(re.findall(r"^  (\w+Loss) +(\S.*)$", done.stdout, re.MULTILINE))
    assert done.returncode == (1 if "problem 1" in done.stdout else 0), done.stderr
    assert {"FocalLoss", "Poly1FocalLoss", "NoisedTopKLoss", "LDAMLoss"} <= set(shown), done.stdout
    import torch

    if not torch.cuda.is_available():
        compiled = ", compiled from 1,048,576 logits on" if cpu.has_compiler() else ""
        assert shown["FocalLoss"] == f"sigmoid: blocked{compiled}; softmax: blocked"
        assert shown["NoisedTopKLoss"] == "composed" and shown["LDAMLoss"] == "blocked"


def test_the_set_up_knows_the_same():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    setup_env = importlib.util.module_from_spec(spec)
    sys.modules["setup_env"] = setup_env
    spec.loader.exec_module(setup_env)
    assert tuple(DISTRIBUTIONS.values()) == setup_env.RIVALS
    for name, known in setup_env.STACKS.items():
        versions = {**known.pins, "polyfocal": "0.1.0", "setuptools": "80.0", "ninja": "1"}
        versions.setdefault("numpy", "2.2.0")
        assert problems(found(versions)) == [], name
