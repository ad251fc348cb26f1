"""What a user gets who installs the package: its imports, its version, its files, its licence."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import polyfocal
from polyfocal.__main__ import COMMANDS, main
from polyfocal.shipped import CONFIGS, config_file

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this clone, built as ``python -m build`` does but with this Python's tools."""
    sources = tmp_path_factory.mktemp("wheel") / "sources"
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
    (built,) = sources.glob("*.whl")
    return built


def test_wheel_holds_the_package_its_type_marker_and_its_licence(wheel):
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


def test_the_installed_wheel_trains_a_shipped_config_without_a_clone(wheel, tmp_path):
    pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    pytest.importorskip("pip", reason="needs pip")
    site, data = tmp_path / "site", tmp_path / "digits"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", site, wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}  # before the clone, if that is installed

    def command(*words):
        done = subprocess.run(
            [site / "bin" / "polyfocal", *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("--version") == f"{polyfocal.__version__}\n"
    few = ("--num-train", 6, "--num-val", 3, "--size", 64, "--digits", 1, 2, "--digit-size", 20, 40)
    command("make_demo_data", data, *few)
    options = [f"{part}_dataloader.num_workers=0" for part in ("train", "val")]
    options += [f"{part}_dataloader.persistent_workers=False" for part in ("train", "val")]
    settings = ("--profile", "tiny", "--cfg-options", "train_cfg.max_epochs=1", *options)
    assert "mAP" in command("train", "retinanet_poly1", "--data", data, *settings)
    work_dir = tmp_path / "work_dirs" / "retinanet_poly1"
    assert (work_dir / "epoch_1.pth").is_file()
    assert str(ROOT) not in "".join(log.read_text("utf-8") for log in work_dir.rglob("*.log"))


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


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_tool_of_a_clone_too(name, capsys):
    tool = (ROOT / "tools" / f"{name}.py").read_text(encoding="utf-8")
    assert f"from polyfocal.commands.{name} import main" in tool
    try:
        status = main([name, "--help"])
    except SystemExit as ended:
        status = ended.code
        assert capsys.readouterr().out.startswith(f"usage: polyfocal {name} ")
    else:  # what it needs is not here
        assert re.match(r"error: polyfocal.* needs .*pip install", capsys.readouterr().err)
    assert status == 0 or not importlib.util.find_spec("mmdet")


def test_commands_are_found_by_name(capsys):
    for wrong in ([], ["trian"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
    assert "'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("missing", "command", "sentence"),
    [
        ("mmengine", "train", "error: polyfocal.mmengine needs MMEngine, which is not installed"),
        ("pycocotools", "browse_dataset", "error: polyfocal browse_dataset needs pycocotools"),
    ],
)
def test_a_command_names_the_package_that_it_needs(missing, command, sentence):
    if missing == "pycocotools":  # before which it needs others
        pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'polyfocal[mmdet]'")
    use = f"from polyfocal.__main__ import main\nsys.exit(main([{command!r}, 'retinanet_poly1']))"
    done = run_python(BLOCKER + use, missing)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1, done.stderr
    assert "pip install" in done.stderr


def test_a_config_is_a_file_or_the_name_of_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(CONFIGS / "retinanet_poly1.py")
    for name in ("retinanet_poly1", "retinanet_poly1.py", "configs/retinanet_poly1.py"):
        assert config_file(name) == shipped and Path(shipped).is_file()
    assert config_file("classification/focal") == str(CONFIGS / "classification" / "focal.py")
    assert config_file("detectron2/retinanet_poly1.yaml").endswith("retinanet_poly1.yaml")
    assert config_file("mine") == "mine" and config_file("mmdet::a.py") == "mmdet::a.py"
    Path("retinanet_poly1").mkdir()  # a work directory is no config
    assert config_file("retinanet_poly1") == shipped
    Path("retinanet_poly1.py").write_text("model = {}\n")
    assert config_file("retinanet_poly1.py") == "retinanet_poly1.py"


def test_the_version_stands_in_one_place():
    files = [ROOT / name for name in ("pyproject.toml", "setup.py", "CITATION.cff", "mkdocs.yml")]
    for file in files:
        assert polyfocal.__version__ not in file.read_text(encoding="utf-8"), file
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == polyfocal.__version__


def test_the_workflow_runs_targets_that_there_are():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]["make"]["strategy"]["matrix"]["include"]
    assert {"lint", "docs"} <= {job["name"] for job in jobs}
    assert workflow["jobs"]["make"]["steps"][-1] == {"run": "${{ matrix.command }}"}
    for job in jobs:
        done = subprocess.run(
            [*shlex.split(job["command"]), "--dry-run"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "setup_env.py" in done.stdout, job["name"]


def test_pre_commit_has_the_linters_of_make_test():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = hooks["repos"]
    entries = {hook["entry"].replace(" --force-exclude", "") for hook in local["hooks"]}
    test = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ntest:")[1]
    lines = test.split("\n\n")[0].splitlines()
    linters = {line.strip() for line in lines if re.match(r"\t\.venv/bin/(ruff|mypy)", line)}
    assert entries == {line.removesuffix(" .").removesuffix(" --check") for line in linters}
