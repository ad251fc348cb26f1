"""The tool that compares trainings: its numbers, its report in a browser, and what it refuses."""

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

from polyfocal.commands import compare
from polyfocal.experiments import comparing
from polyfocal.experiments.intervals import ap_intervals
from polyfocal.experiments.trained import TrainedRun
from polyfocal.mmengine.work_dir import read_trained_run

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CLASSES = ("cat", "dog")


def run(*args):
    """Exit status, standard output and standard error."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = compare.main([str(arg) for arg in args])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve pictures with a cat and a dog each."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 13):
        name = f"picture_{i}.png"
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": i, "file_name": name, "width": 80, "height": 60})
        for category in (1, 2):
            box = [5 + 35 * (category - 1), *rng.integers(5, 20, 1).tolist(), 30, 30]
            annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": category}
            annotations.append({**annotation, "bbox": box, "area": 900, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(truth))
    return folder


def detections(data, seed):
    """Boxes around the objects, some far off, and some where nothing is."""
    rng = np.random.default_rng(seed)
    found = []
    for one in json.loads((data / "val.json").read_text())["annotations"]:
        x, y, w, h = one["bbox"]
        for score, shift in ((rng.uniform(0.3, 1), rng.uniform(0, 12)), (rng.uniform(0, 0.6), 25)):
            box = [x + shift, y, w, h]
            found.append({**{k: one[k] for k in ("image_id", "category_id")}, "bbox": box})
            found[-1]["score"] = round(float(score), 3)
    return found


def pycocotools(data, found):
    """The evaluation by pycocotools itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "val.json"))
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def write_run(folder, data, found=None, *, epsilon=1.0, seed=0, mean_ap=0.5, starts=None):
    """A work directory as tools/train.py leaves it, of two epochs of 10 iterations."""
    starts = starts or [range(1, 21)]
    for number, iterations in enumerate(starts):
        log = folder / f"2026010{number + 1}_000000" / "vis_data"
        log.mkdir(parents=True)
        config = {
            "train_cfg": {"max_epochs": 2},
            "val_dataloader": {"dataset": {"ann_file": str(data / "val.json"), "data_root": ""}},
            "val_evaluator": {"type": "CocoMetric"},
            "model": {"loss_cls": {"type": "polyfocal.Poly1FocalLoss", "epsilon": epsilon}},
            "randomness": {"seed": seed},
            "work_dir": str(folder),
        }
        config["val_dataloader"]["dataset"]["data_prefix"] = {"img": str(data)}
        lines = [f"{key} = {value!r}" for key, value in config.items()]
        (log / "config.py").write_text("\n".join(lines))
        records = []
        for i in iterations:
            loss = 1.0 / i + number
            records.append({"loss": loss, "loss_cls": loss / 2, "time": 0.1 * i, "iter": i})
            records[-1] |= {"step": i, "memory": 100 + i}
            if i % 10 == 0:
                score = mean_ap * i / 20
                records.append({"coco/bbox_mAP": score, "time": 0.5, "step": i // 10})
        (log / "scalars.json").write_text("\n".join(map(json.dumps, records)) + "\n")
    if found is not None:
        (folder / "val.bbox.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Four trainings, the detections of three kept."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for seed in range(3):
        found = detections(data, seed)
        mean_ap = pycocotools(data, found).stats[0]
        run = write_run(
            folder / f"run_{seed}", data, found, seed=seed, epsilon=seed - 1.0, mean_ap=mean_ap
        )
        made.append(run)
    return [*made, write_run(folder / "no <detections>", data, mean_ap=0.9)]


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """The report of the four, and what the tool printed."""
    file = tmp_path_factory.mktemp("report") / "new" / "report.html"
    status, out, err = run(*runs, "--out", file, "--pictures", 3)
    assert status == 0 and err == "", err
    return file, out


def test_average_precision_is_that_of_pycocotools(data, runs):
    comparison = comparing.compare(runs, read_trained_run)
    assert comparison.names == ["run_0", "run_1", "run_2", "no <detections>"]
    found = comparison.detections["bbox"]
    rows = comparing.class_rows(found, comparison.names)
    for column, name in enumerate(comparison.names[:3]):
        evaluation = pycocotools(data, detections(data, column))
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
        for number, one in enumerate(CLASSES):
            assert rows[one][column] == pytest.approx(precision[:, :, number].mean())
        np.testing.assert_allclose(found[name].coco.precision, precision.mean(axis=2))
    assert np.isnan(rows["cat"][3])
    results = comparing.result_rows(comparison)
    assert results["bbox_mAP"][3] == 0.9 and np.isnan(results["bbox_LaECE"][3])
    assert results["bbox_D-ECE"][0] == found["run_0"].calibration.stats["D-ECE"]


def test_detections_of_another_evaluation_are_noticed(data, tmp_path):
    found = detections(data, 0)
    made = [
        write_run(tmp_path / name, data, found, mean_ap=pycocotools(data, found).stats[0])
        for name in ("a", "b")
    ]
    assert comparing.compare(made, read_trained_run).notes == []
    (made[1] / "val.bbox.json").write_text(json.dumps(detections(data, 1)))
    (note,) = comparing.compare(made, read_trained_run).notes
    assert "these are not its detections" in note and str(made[1]) in note


def test_cost_and_curves_of_a_resumed_training(data, tmp_path):
    # Killed at iteration 17, gone on from epoch 1: what was logged from 11 on was done again.
    resumed = write_run(tmp_path / "resumed", data, starts=[range(1, 18), range(11, 21)])
    plain = write_run(tmp_path / "plain", data)
    with (resumed / "20260101_000000" / "vis_data" / "scalars.json").open("a") as stream:
        stream.write('{"loss": 0.1, "iter"')  # the kill came in the middle of a line
    comparison = comparing.compare([resumed, plain], read_trained_run)
    training = comparison.runs["resumed"].training
    assert [record["iter"] for record in training] == list(range(1, 21))
    assert training[9]["loss"] == 1 / 10 and training[10]["loss"] == 1 + 1 / 11
    assert [one["step"] for one in comparison.runs["resumed"].evaluations] == [1, 2]
    rows = comparing.cost_rows(comparison.runs)
    assert rows["seconds per iteration, median"] == ["1.050", "1.050"]  # between 1.0 and 1.1
    assert rows["most memory, MiB"] == ["120", "120"]
    assert rows["epochs"] == ["2", "2"] and rows["last logged iteration"] == ["20", "20"]


def test_a_new_start_leaves_nothing_of_the_training_before(data, tmp_path):
    """Which logged more often, and was better."""
    again = write_run(tmp_path / "again", data, starts=[range(1, 21), range(20, 41, 20)])
    old, new = sorted(again.glob("*/vis_data"))
    for place, start in ((old, False), (new, False)):
        with (place / "config.py").open("a") as stream:
            stream.write(f"\nresume = {start}\n")
    records = [{"loss": 1.0, "iter": 20, "step": 20}, {"coco/bbox_mAP": 0.1, "step": 2}]
    (new / "scalars.json").write_text("\n".join(map(json.dumps, records)) + "\n")
    run = read_trained_run(again)
    assert [record["iter"] for record in run.training] == [20]
    assert run.evaluations == [{"bbox_mAP": 0.1, "step": 2}]


def test_classes_that_the_config_leaves_out_do_not_count(data, tmp_path):
    found = [one for one in detections(data, 0) if one["category_id"] == 2]
    other = [one for one in detections(data, 1) if one["category_id"] == 2]
    evaluations = [
        pycocotools(data, one).eval["precision"][:, :, 1, 0, -1] for one in (found, other)
    ]
    dogs = [float(precision.mean()) for precision in evaluations]
    runs = []
    for name, one, mean_ap in zip("ab", (found, other), dogs, strict=True):
        runs.append(write_run(tmp_path / name, data, one, mean_ap=mean_ap))
        config = runs[-1] / "20260101_000000" / "vis_data" / "config.py"
        with config.open("a") as stream:
            stream.write("\nval_dataloader['dataset']['metainfo'] = dict(classes=('dog',))\n")
    comparison = comparing.compare(runs, read_trained_run)
    assert comparison.notes == []
    rows = comparing.class_rows(comparison.detections["bbox"], comparison.names)
    assert list(rows) == ["dog"] and rows["dog"] == pytest.approx(dogs)
    results = comparing.result_rows(comparison)
    assert results["bbox_LRP"][0] < 1
    first = read_trained_run(runs[0])
    truth = first.truth(data / "val.json")
    assert ap_intervals(truth, [found], [other], draws=100).mean.value == pytest.approx(
        dogs[0] - dogs[1]
    )
    whole = read_trained_run(write_run(tmp_path / "c", data, found))
    assert whole.evaluated_as(first), "this one leaves its classes to the data"


def test_best_threshold():
    score = np.array([0.9, 0.8, 0.8, 0.3])
    right = np.array([True, True, False, False])
    # F1 of 2 objects from 0.9, 0.8 and 0.3 on: 2/3, 4/5, 4/6.
    assert comparing.best_threshold(score, right, 2) == 0.8
    assert comparing.best_threshold(score, np.zeros(4, dtype=bool), 2) == 1.0


def test_pictures_on_which_runs_differ(data, tmp_path):
    truth = json.loads((data / "val.json").read_text())
    perfect = [
        {**{k: one[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for one in truth["annotations"]
    ]
    # The second run misses the dog of picture 4, both objects of 7, and is right elsewhere.
    missing = {(4, 2), (7, 1), (7, 2)}
    worse = [d for d in perfect if (d["image_id"], d["category_id"]) not in missing]
    made = [write_run(tmp_path / n, data, f) for n, f in (("good", perfect), ("worse", worse))]
    comparison = comparing.compare(made, read_trained_run)
    found = comparison.detections["bbox"]
    whole = comparison.truth
    differing = comparing.differing_pictures(whole, data, found, 10)
    assert [(one.id, one.f1) for one in differing] == [
        (7, {"good": 1.0, "worse": 0.0}),
        (4, {"good": 1.0, "worse": pytest.approx(2 / 3)}),
    ]
    assert comparing.differing_pictures(whole, data, found, 1) == differing[:1]


def test_best_of_a_row():
    # A class may be called as a number that is better when it is low: "face" ends in "ace".
    rows = {"face": [0.2, 0.6, math.nan], "box LaACE_0": [0.3, 0.1, 0.2], "same": [0.5, 0.5, 0.5]}
    table = comparing.number_table(["a", "b", "c"], rows, ["box LaACE_0"])
    assert table.best == {(0, 2), (1, 2)}
    assert table.rows[0] == ["face", "0.200", "0.600", "-"]


def test_which_numbers_are_better_when_low(report):
    text = report[0].read_text(encoding="utf-8")
    lines = re.findall(r'<tr><td class="name">(.*?)</td>(.*?)</tr>', text)
    for name, low in (("box D-ECE", True), ("box oLRP", True), ("box mAP", False), ("cat", False)):
        cells = next(cells for first, cells in lines if first == name)
        numbers = [float(one) for one in re.findall(r">(\d\.\d+)<", cells)]
        best = float(re.search(r'class="best">(.*?)<', cells)[1])
        assert best == (min if low else max)(numbers), name


def test_a_class_is_not_taken_for_a_number_that_is_better_when_low():
    """A face, fleece, a loss: the whole name of a number counts, not a part of a class's."""
    high = ("bbox_mAP", "bbox_face_precision", "bbox_fleece_precision", "bbox_loss_precision")
    high += ("Ace_3D_AP40_moderate_strict", "surface_AP_dist_0.5", "segm_D-ECE_precision")
    low = ("ece", "ood_ece", "bbox_D-ECE", "bbox_D-ECE_box", "segm_LaACE_0", "bbox_oLRP", "nll")
    low += ("NuScenes/car_trans_err", "NuScenes/mATE", "val_loss")
    runs = {
        name: TrainedRun(name, {}, [], [dict.fromkeys(high + low, value)])
        for name, value in (("a", 0.2), ("b", 0.6))
    }
    table = comparing.results_table(comparing.Comparison(runs))
    best = {place: column for place, column in table.best}
    assert [best[place] for place in range(len(best))] == [2] * len(high) + [1] * len(low)


def test_settings_that_differ(runs):
    comparison = comparing.compare(runs[:3], read_trained_run)
    assert comparing.differing_settings(comparison.runs) == {
        "model.loss_cls.epsilon": ["-1.0", "0.0", "1.0"],
        "randomness.seed": ["0", "1", "2"],
    }


class _Links(HTMLParser):
    """What a page loads or links to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, value) for name, value in attrs if name in ("src", "href")]


def test_report_asks_for_nothing_else(report):
    text = report[0].read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert {tag for tag, _ in links.found} == {"a", "img"}
    assert all(link.startswith("#" if tag == "a" else "data:image/") for tag, link in links.found)
    assert not re.search(r"url\(|@import|<script", text)
    assert "no &lt;detections&gt; keeps no detections" in text and "no <detections>" not in text
    assert list(report[0].parent.iterdir()) == [report[0]]
    assert f"report {report[0]}" in report[1] and "box mAP" in report[1]


PROBE = """<script>addEventListener("load", () => {
  const page = document.documentElement, images = [...document.images];
  const said = {images: images.length, broken: images.filter(i => !i.naturalWidth).length,
    wider: page.scrollWidth - page.clientWidth, width: page.clientWidth,
    lost: [...document.querySelectorAll("nav a")].filter(
      a => !document.getElementById(a.getAttribute("href").slice(1))).length,
    best: [...document.querySelectorAll("td.best")].map(
      cell => cell.parentNode.cells[0].textContent + " " + cell.textContent)};
  document.body.innerHTML = "<pre id=said>" + JSON.stringify(said) + "</pre>";
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt install chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_report_in_a_browser(report, tmp_path, width):
    text = report[0].read_text(encoding="utf-8")
    # The report forbids scripts to itself; the probe needs one.
    text = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    page = tmp_path / "probed.html"
    page.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    said = json.loads(re.search(r'<pre id="said">(.*)</pre>', ended.stdout)[1])
    # The curves of training, precision and calibration; three pictures.
    assert said["images"] == 6 and said["broken"] == 0 and said["lost"] == 0
    assert said["width"] <= width and said["wider"] == 0
    assert "box mAP 0.900" in said["best"]


def test_errors(data, runs, tmp_path):
    def error(*args):
        status, _, err = run(*args, "--out", tmp_path / "report.html")
        assert status == 2 and err.count("\n") == 1 and not (tmp_path / "report.html").exists()
        return err

    assert "two work directories or more, got one" in error(runs[0])
    assert "two work directories or more, got one" in error(runs[0], runs[0])
    assert f"there is no work directory {tmp_path / 'none'}" in error(runs[0], tmp_path / "none")
    assert "is not the work directory of a training" in error(runs[0], data)
    stopped = write_run(tmp_path / "stopped", data, starts=[range(1, 15)])
    assert "its last evaluation is of epoch 1 of 2" in error(runs[0], stopped)
    other_data = tmp_path / "data"
    shutil.copytree(data, other_data)
    truth = json.loads((data / "val.json").read_text())
    truth["annotations"].pop()
    (other_data / "val.json").write_text(json.dumps(truth))
    other = write_run(tmp_path / "other", other_data)
    assert "were evaluated on different data" in error(runs[0], other)
    assert "--pictures takes 0 or more, got -1" in error(*runs, "--pictures", "-1")
    broken = write_run(tmp_path / "broken", data)
    (broken / "val.bbox.json").write_text("[{")
    assert "val.bbox.json" in error(runs[0], broken)
    status, _, err = run(*runs, "--out", data / "val.json" / "report.html")
    assert status == 2 and "report.html cannot be written" in err
