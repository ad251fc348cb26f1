"""The tools for data: what they write, print and refuse."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def load(tool: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_demo_data, browse_dataset = load("make_demo_data"), load("browse_dataset")


def run(module: ModuleType, *args: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = module.main([str(arg) for arg in args])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "set"
    status, stdout, stderr = run(
        make_demo_data, out, "--num-train", 6, "--num-val", 3, "--digits", 2, 3
    )
    assert status == 0, stderr
    assert "digit scenes (train 6, val 3 pictures)" in stdout
    return out


def test_the_options_reach_the_set(digits: Path) -> None:
    settings = json.loads((digits / "digit_scenes.json").read_text())["settings"]
    assert (settings["num_train"], settings["num_val"], settings["digits"]) == (6, 3, [2, 3])
    assert len(list((digits / "images" / "train").iterdir())) == 6


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--spurious", 2], "error: spurious of digit scenes must be between 0 and 1, got 2.0."),
        (["--num-train", 7, "--num-val", 3], "num_train 6 there, 7 wanted"),
    ],
)
def test_bad_settings(digits: Path, args: list, sentence: str) -> None:
    status, _, stderr = run(make_demo_data, digits, *args)
    assert status == 2
    assert sentence in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1


def test_browse_draws_boxes_and_masks(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen"
    status, stdout, stderr = run(browse_dataset, digits, "--split", "val", "--out", out)
    assert status == 0, stderr
    assert sorted(file.name for file in out.iterdir()) == [
        "01_000001.png",
        "02_000002.png",
        "03_000003.png",
        "contact_sheet.png",
    ]
    content = json.loads((digits / "annotations" / "val.json").read_text())
    assert f"all {len(content['annotations'])}" in " ".join(stdout.split())
    assert "every object has a mask" in stdout

    drawn = np.asarray(Image.open(out / "01_000001.png").convert("RGB")).astype(float)
    plain = Image.open(digits / "images" / "val" / "000001.png").resize(drawn.shape[1::-1])
    changed = np.abs(drawn - np.asarray(plain)).max(2) > 20
    x, y, width, height = content["annotations"][0]["bbox"]
    scale = drawn.shape[1] / 160
    edge = changed[round((y + height) * scale), round(x * scale) : round((x + width) * scale)]
    assert edge.mean() > 0.9
    assert changed.mean() < 0.5


def test_browse_one_category(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((digits / "annotations" / "train.json").read_text())
    category = content["annotations"][0]["category_id"]
    with_it = {a["image_id"] for a in content["annotations"] if a["category_id"] == category}
    monkeypatch.chdir(tmp_path)
    status, _, stderr = run(browse_dataset, digits, "--category", category - 1)
    assert status == 0, stderr
    drawn = {file.name[3:9] for file in (tmp_path / "work_dirs/browse/set_train").glob("0*.png")}
    assert drawn == {f"{id_:06d}" for id_ in with_it}


def test_browse_removes_its_own_pictures_only(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen"
    run(browse_dataset, digits, "--out", out)
    assert len(list(out.glob("0*_*.png"))) == 6
    for name in ("99_mine.png", "01_mine.png", "notes_1.png"):
        Image.new("RGB", (4, 4)).save(out / name)
    (out / "98_text.png").write_text("no picture")
    shutil.copy(out / "contact_sheet.png", out / "kept.png")
    others = {"99_mine.png", "01_mine.png", "notes_1.png", "98_text.png", "kept.png"}
    status, stdout, _ = run(browse_dataset, digits, "--split", "val", "--num", 2, "--out", out)
    assert status == 0 and f"2 pictures and contact_sheet.png are in {out}" in stdout
    drawn = {"01_000001.png", "02_000003.png", "contact_sheet.png"}
    assert {file.name for file in out.iterdir()} == drawn | others


def test_browse_takes_names_as_they_are(digits: Path, tmp_path: Path) -> None:
    root = shutil.copytree(digits, tmp_path / "set")
    file, name = root / "annotations" / "val.json", r"cost $\frac$.png"
    content = json.loads(file.read_text())
    (root / "images/val" / content["images"][0]["file_name"]).rename(root / "images/val" / name)
    content["images"][0]["file_name"] = name
    for category in content["categories"]:
        category["name"] = rf"a $\sqrt$ {category['id']}"
    file.write_text(json.dumps(content))
    status, _, stderr = run(browse_dataset, root, "--split", "val", "--out", tmp_path / "seen")
    assert status == 0, stderr
    assert (tmp_path / "seen" / "contact_sheet.png").is_file()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--category", "zebra"], "error: --category 'zebra' is not a class of"),
        (["--split", "test"], "annotations holds train.json, val.json."),
        (["--num", -1], "error: --num must be 0 or more, got -1."),
        (["--out", "/dev/null/x"], "/dev/null/x/01_000001.png cannot be written: Not a directory."),
    ],
)
def test_browse_refuses(digits: Path, args: list, sentence: str) -> None:
    status, _, stderr = run(browse_dataset, digits, *args)
    assert status == 2
    assert sentence in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("tool", ["make_demo_data", "browse_dataset"])
def test_exit_status_of_the_command(tool: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "plugin")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'file'} ") and done.stderr.count("\n") == 1


def test_browse_shows_what_a_training_sees(tmp_path: Path) -> None:
    """A turned PNG upright, 12 bits in 16 nearly black, missing areas with a note."""
    pytest.importorskip("cv2", reason="needs OpenCV, which comes with mmcv")
    (tmp_path / "annotations").mkdir()
    top_red = np.zeros((80, 60, 3), np.uint8)
    top_red[:40, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right: red on the right, 80 wide and 60 high
    Image.fromarray(top_red).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((60, 80), 4095, np.uint16)).save(tmp_path / "dark.png")
    content = {
        "images": [
            {"id": i, "file_name": name, "width": 80, "height": 60}
            for i, name in enumerate(("turned.png", "dark.png"))
        ],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [30, 20, 5, 5]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    status, out, err = run(browse_dataset, tmp_path, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    for said in ("have no area: it is taken", "numbers its annotations from 0", "is nearly black"):
        assert said in out
    turned, dark = (
        np.asarray(Image.open(tmp_path / "out" / f"0{n}.png").convert("RGB")).astype(int)
        for n in ("1_turned", "2_dark")
    )
    height, width, _ = turned.shape
    assert width / height == pytest.approx(80 / 60, rel=0.01)
    assert turned[height // 4, width // 8].tolist() == [0, 0, 0]
    assert turned[height // 4, width * 7 // 8].tolist() == [255, 0, 0]
    assert dark[height // 2, width // 2].max() <= 16
