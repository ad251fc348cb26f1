"""What a user gets who installs the package: its imports, its version, its files, its licence."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import polyfocal

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("mmengine", "mmcv", "mmdet", "mmdet3d", "detectron2", "pycocotools")

# Makes the packages named on the command line behave as if they were not installed.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def requirements_of(extra: str) -> list[str]:
    """Names that the metadata asks for with an extra."""
    found = []
    for requirement in importlib.metadata.requires("polyfocal") or []:
        wanted, _, marker = requirement.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", marker):
            found.append(re.split(r"[^\w.-]", wanted)[0])
    return found


def test_import_leaves_the_frameworks_alone():
    done = run_python("import json, sys, polyfocal; print(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "torch" in loaded
    assert loaded.isdisjoint(FRAMEWORKS)


def test_core_works_where_no_framework_is_installed():
    use = "import torch, polyfocal\nloss = polyfocal.Poly1FocalLoss(epsilon=1.0, use_sigmoid=True)"
    call = "print(float(loss(torch.zeros(2, 3), torch.tensor([0, 3]))))"
    done = run_python(f"{BLOCKER}\n{use}\n{call}", *FRAMEWORKS)
    assert done.returncode == 0, done.stderr
    # All p_t are 1/2: alpha_t (1/4 ln 2 + 1/8), with alpha_t 1/4 once and 3/4 five times, mean.
    assert float(done.stdout) == pytest.approx(4.0 * (0.25 * 0.6931471805599453 + 0.125) / 6)


@pytest.mark.parametrize("missing", ["mmengine", "mmcv", "mmdet"])
def test_missing_framework_gives_one_sentence(missing):
    if missing != "mmdet":  # which is looked for first
        pytest.importorskip("mmdet", reason="needs MMDetection, of which one part is hidden")
    catch = "\ntry:\n    import polyfocal.mmdet\nexcept ImportError as error:\n    print(error)"
    done = run_python(BLOCKER + catch, missing)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done.stdout
    assert missing in lines[0]
    assert "pip install" in lines[0]


RIVALS = [
    ("mmdet", "mmdet 3.3.0", "onedl-mmdetection 3.5.1"),
    ("mmcv", "mmcv 2.1.0", "onedl-mmcv 2.3.6"),
    ("mmcv", "mmcv 2.1.0", "mmcv-lite 2.1.0"),
    ("mmengine", "mmengine 0.10.7", "onedl-mmengine 0.10.12"),
]


def test_two_distributions_of_one_module_are_refused(tmp_path):
    tries = []
    for i, (_, *pair) in enumerate(RIVALS):
        for name, version in map(str.split, pair):
            metadata = tmp_path / str(i) / f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
            metadata.parent.mkdir(parents=True)
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        tries += [
            (str(tmp_path / str(i)), f"polyfocal.{module}") for module in ("mmengine", "mmdet")
        ]
    code = f"""
import importlib, polyfocal, sys
path = sys.path
for place, module in {tries!r}:
    sys.path = [place, *(p for p in path if "site-packages" not in p)]
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(RIVALS)
    for i, (module, one, other) in enumerate(RIVALS):
        for line in lines[2 * i : 2 * i + 2]:
            assert line.startswith(
                f"{one} and {other} are both installed, and both bring '{module}'"
            )
            assert f"pip uninstall -y {one.split()[0]} {other.split()[0]}" in line


def test_version_is_the_one_of_the_metadata():
    assert polyfocal.__version__ == importlib.metadata.version("polyfocal")


def test_torch_is_the_only_hard_dependency():
    hard = [
        requirement
        for requirement in importlib.metadata.requires("polyfocal") or []
        if "extra ==" not in requirement
    ]
    assert [re.split(r"[^\w.-]", requirement)[0] for requirement in hard] == ["torch"]


@pytest.mark.parametrize(
    ("extra", "needed"),
    [
        ("mmdet", {"mmengine", "mmcv", "mmdet", "pycocotools", "scikit-learn"}),
        ("onedl", {"onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "pycocotools"}),
        ("mmdet3d", {"polyfocal", "numba"}),
        ("detectron2", {"fvcore", "omegaconf", "pycocotools"}),
        ("docs", {"mkdocs", "mkdocs-material", "mkdocstrings"}),
        ("test", {"pytest", "ruff", "mypy"}),
    ],
)
def test_extras(extra, needed):
    assert needed <= set(requirements_of(extra))


def test_the_two_lines_of_mmdetection_differ_in_their_names_only():
    lines = {"mmdet": {"mmengine", "mmcv", "mmdet"}}
    lines["onedl"] = {"onedl-mmengine", "onedl-mmcv", "onedl-mmdetection"}
    rest = {extra: set(requirements_of(extra)) - names for extra, names in lines.items()}
    assert rest["mmdet"] == rest["onedl"]
    assert not rest["onedl"] & lines["mmdet"]  # never one beside the other


def test_no_extra_asks_for_another_torch():
    # What torch brings must be left as it is: an exact triton replaces it, and torch with it.
    pinned = [
        requirement
        for requirement in importlib.metadata.requires("polyfocal") or []
        if re.match(r"(torch|triton|nvidia)[\w-]*\s*[=<>~!]", requirement)
    ]
    assert pinned == ["torch>=2.1"]


def test_wheel_holds_the_package_its_type_marker_and_its_licence(tmp_path):
    sources = tmp_path / "sources"
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "plugin", sources / "plugin", ignore=hidden)
    shutil.copytree(ROOT / "configs", sources / "configs", ignore=hidden)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, sources)
    # Building must not import torch: an isolated build does not have it.
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER + build, "torch"],
        cwd=sources,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = sources.glob("*.whl")
    assert wheel.name.split("-")[:2] == ["polyfocal", polyfocal.__version__]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    plugin = ROOT / "plugin"
    modules = {path.relative_to(plugin).as_posix() for path in plugin.rglob("*.py")}
    assert "polyfocal/losses/functional.py" in modules
    assert modules <= names
    assert "polyfocal/py.typed" in names
    configs = {
        f"polyfocal/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "configs").rglob("*.*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {name for name in names if name.startswith("polyfocal/configs/")} == configs
    assert "polyfocal/configs/studies/shortcut.yml" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"polyfocal"}


def test_every_config_is_in_the_model_index():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text(encoding="utf-8"))
    listed = []
    for name in index["Import"]:
        metafile = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        collections = {collection["Name"] for collection in metafile["Collections"]}
        for collection in metafile["Collections"]:
            assert {"Metadata", "Paper", "README", "Code"} <= set(collection)
            assert (ROOT / collection["README"]).is_file(), collection["README"]
            code = collection["Code"]["URL"]
            assert code.startswith("https://") or (ROOT / code).is_file(), code
        for model in metafile["Models"]:
            assert model["In Collection"] in collections
            assert model["Name"] == Path(model["Config"]).stem
            listed.append(model["Config"])
    shipped = [f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")]
    assert sorted(listed) == sorted(shipped)
