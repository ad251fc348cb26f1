"""The calibration tool, as a person runs it."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from polyfocal.calibration import DetectionCalibration
from polyfocal.coco import evaluate
from polyfocal.commands import calibration

ROOT = Path(__file__).parents[2]


def run(*args):
    """Exit status, standard output and standard error."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = calibration.main([str(arg) for arg in args])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def files(tmp_path):
    """A detector that finds each of 60 objects, is far too sure and as often wrong as right."""
    rng = np.random.default_rng(0)
    images, annotations, found = [], [], []
    for i in range(30):
        images.append({"id": i, "file_name": f"{i}.png", "width": 100, "height": 100})
        for category in (1, 2):
            box = [*rng.integers(0, 60, 2).tolist(), 30, 30]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": category,
                    "bbox": box,
                    "area": 900,
                    "iscrowd": 0,
                }
            )
            other = [(box[0] + 50) % 70, (box[1] + 50) % 70, 30, 30]
            for place in (box, other):
                score = round(float(rng.uniform(0.8, 1.0)), 3)
                found.append(
                    {"image_id": i, "category_id": category, "bbox": place, "score": score}
                )
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps([{**one, "note": "kept"} for one in found]))
    return tmp_path


def test_prints_the_numbers(files):
    status, out, err = run(files / "found.json", files / "truth.json", "--diagrams", files / "d")
    assert status == 0, err
    metric = DetectionCalibration()
    metric.update(files / "truth.json", files / "found.json")
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    for name, value in metric.compute().stats.items():
        assert f"{value:.3f}" in rows[name]
    assert metric.compute().d_ece == pytest.approx(0.4, abs=0.05)  # sure to 0.9, right to 0.5
    assert {"mAP", "cat", "dog"} < set(rows) and " 30 " in rows["cat"] and " 60 " in rows["cat"]
    drawn = {file.name for file in (files / "d").iterdir()}
    assert drawn == {"reliability.png", "reliability_by_class.png"}


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_fits_and_applies(files, method):
    found, truth, saved = files / "found.json", files / "truth.json", files / "c.json"
    status, out, err = run(found, truth, "--fit", method, "--save", saved)
    assert status == 0, err
    assert "fitted to" in out and saved.is_file()
    status, out, err = run(found, truth, "--apply", saved, "--out", files / "new.json")
    assert status == 0, err
    assert "before" in out and "after" in out
    new = json.loads((files / "new.json").read_text())
    assert all(one["note"] == "kept" for one in new)

    def la_ece(file):
        metric = DetectionCalibration()
        metric.update(truth, file)
        return metric.compute().la_ece

    # A temperature can only bring scores as near to 1/2 as they are to be here: all come closer.
    assert la_ece(files / "new.json") < la_ece(found) / 2
    before, after = evaluate(truth, found), evaluate(truth, files / "new.json")
    assert after.stats["mAP"] == pytest.approx(before.stats["mAP"], abs=1e-9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_id": 99}, "detection 3 of {file} has image_id 99, not declared in {truth}."),
        ({"category_id": 7}, "detection 3 of {file} has category_id 7, not declared in {truth}."),
        (
            {"score": 1.01},
            "detection 3 of {file} has score 1.01; calibration needs a probability in [0, 1].",
        ),
        (
            {"bbox": [float("nan"), 0, 1, 1]},
            "detection 3 of {file} has bbox [nan, 0, 1, 1]; it must be 4 numbers x, y, "
            "width, height, none beyond 100000 pixels.",
        ),
    ],
)
def test_bad_results(files, change, sentence):
    file, truth = files / "found.json", files / "truth.json"
    content = json.loads(file.read_text())
    content[3].update(change)
    file.write_text(json.dumps(content))
    status, out, err = run(file, truth)
    assert (status, out) == (2, "")
    assert err == f"error: {sentence.format(file=file, truth=truth)}\n"


def test_bad_use(files):
    found, truth = files / "found.json", files / "truth.json"
    status, _, err = run(found, truth, "--apply", files / "none.json")
    assert status == 2 and err.startswith(f"error: {files / 'none.json'} cannot be read")
    status, _, err = run(found, truth, "--iou", 2)
    assert status == 2 and err == "error: iou must be between 0 and 1, got 2.0.\n"
    wrongs = (["--fit", "platt"], ["--save", "x"], ["--out", "x"], ["--shared"])
    for wrong in (*wrongs, ["--apply", "x", "--target", "iou"]):
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            calibration.parse_args([str(found), str(truth), *wrong])


def dense(folder, objects, detections_each=1):
    """A picture full of objects, all of them found."""
    side = 400
    boxes = [[20 * (i % 20), 20 * (i // 20), 10, 10] for i in range(objects)]
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": side, "height": side}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            for i, box in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9 / (1 + again)}
        for again in range(detections_each)
        for box in boxes
    ]
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(found))
    return folder / "results.json", folder / "truth.json"


def row(table, name):
    (line,) = (line for line in table.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_the_limit_rises_with_the_objects_of_a_picture(tmp_path):
    files = dense(tmp_path, 400)
    status, out, err = run(*files)
    assert (
        (status, err) == (0, "") and row(out, "mAP") == ["1.000"] and row(out, "LRP") == ["0.000"]
    )
    assert row(out, "AR@400") == ["1.000"]
    assert "note: a picture holds up to 400 objects: up to 400 detections of a class" in out
    # 100 of 400 found, all right: precision 1 at the recalls 0, 0.01, ..., 0.25.
    _, out, _ = run(*files, "--max-dets", "100")
    assert row(out, "mAP") == [f"{26 / 101:.3f}"] and "note:" not in out


def test_detections_that_do_not_count_are_noted(tmp_path):
    files = dense(tmp_path, 60, detections_each=3)
    _, out, _ = run(*files)
    assert (
        "note: a picture has up to 180 detections of a class: the best 100 count, as is customary; "
        "--max-dets 180 counts them all." in out
    )
    _, out, _ = run(*dense(tmp_path, 60))
    assert "note:" not in out
