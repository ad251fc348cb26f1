"""Which format is this? Each is named in the sentence that refuses it, with what to do."""

import json
import shlex
from pathlib import Path

import pytest

from polyfocal.coco import DatasetError, load_split
from polyfocal.data.annotations import read_annotations
from polyfocal.data.layouts import recognise

LABELME = {"version": "5.4.1", "flags": {}, "shapes": [], "imagePath": "a.jpg", "imageData": None}
BOX = {"x": 10, "y": 20, "width": 5, "height": 5, "rectanglelabels": ["cat"]}
LABEL_STUDIO = [{"id": 1, "annotations": [{"result": []}], "data": {"image": "/data/a.jpg"}}]
JSON_MIN = [{"image": "/data/a.jpg", "id": 1, "label": [BOX], "annotator": 1, "lead_time": 2.5}]
CREATE_ML = [{"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": {"x": 1}}]}]
VIA = {"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": []}}
VIA_PROJECT = {"_via_settings": {}, "_via_img_metadata": VIA}
PANOPTIC = {"images": [], "annotations": [{"segments_info": [], "file_name": "a.png"}]}
CAPTIONS = {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
DATUMARO = {"info": {}, "categories": {"label": {}}, "items": []}
SUPERVISELY = {"size": {"height": 4, "width": 4}, "objects": [], "tags": []}
BDD = [{"name": "a.jpg", "labels": [{"category": "car", "box2d": {"x1": 1}}]}]
DETECTIONS = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]

VOC = "<annotation><filename>a.jpg</filename></annotation>"
CVAT = "<?xml version='1.0' encoding='utf-8'?>\n<annotations>\n<version>1.1</version></annotations>"
DLIB = "<?xml-stylesheet href='a.xsl'?><dataset><images/></dataset>"
DATA_YAML = "# dataset\npath: ../datasets/x\ntrain: images/train\nval: images/val\nnames:\n  0: a\n"
DOTA = "imagesource:GoogleEarth\ngsd:0.14\n1.0 2.0 3.0 2.0 3.0 4.0 1.0 4.0 plane 0\n"

CONVERTED = {
    "train/_annotations.coco.json": ("{}", "a Roboflow export in COCO's format"),
    "data.yaml": (DATA_YAML, "a YOLO data set"),
    "obj.data": (
        "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n",
        "a YOLO data set",
    ),
    "labels/train/a.txt": ("0 0.5 0.5 0.1 0.1\n", "YOLO's labels"),
    "train/labels/a.txt": ("2 0.5 .5 1e-2 1 0.9", "YOLO's labels"),
    "labels/b.txt": ("", "YOLO's labels"),
    "a.txt": ("0 .1 .1 .2 .1 .2 .3\n", "YOLO's labels"),
    "Annotations/a.xml": (VOC, "Pascal VOC's XML"),
    "VOCdevkit/VOC2007/Annotations/a.xml": (VOC, "Pascal VOC's XML"),
    "train/a.xml": (VOC, "Pascal VOC's XML"),
}
OTHERS = {
    "annotations.xml": (CVAT, "CVAT's XML", "in CVAT, export the task as COCO 1.0 instead"),
    "faces.xml": (DLIB, "XML of dlib's imglab", "write the boxes as COCO's JSON"),
    "labelTxt/a.txt": (DOTA, "DOTA's rotated boxes", "write upright boxes"),
    "annotations/a.txt": ("684,8,273,116,0,0,0,0\n", "VisDrone's labels", "write them as"),
    "train/_annotations.csv": (
        "filename,width,height,class,xmin,ymin,xmax,ymax\n",
        "a table of boxes",
        "",
    ),
    "train/cells.tfrecord": ("", "TensorFlow's records", "export it as COCO"),
    "cells.v1.coco.zip": ("PK", "an archive", "unpack it"),
}
JSON = {
    "labelme": (LABELME, "a file of labelme", "make one COCO file of them with labelme's"),
    "Label Studio": (LABEL_STUDIO, "a Label Studio export (JSON)", "in Label Studio, export it"),
    "JSON-MIN": (JSON_MIN, "a Label Studio export (JSON-MIN)", "in Label Studio, export it"),
    "CreateML": (CREATE_ML, "a CreateML file", "export it as COCO instead"),
    "VIA": (VIA, "a file of the VGG Image Annotator", "there, export it as COCO"),
    "VIA project": (VIA_PROJECT, "a file of the VGG Image Annotator", "there, export it as COCO"),
    "panoptic": (PANOPTIC, "a panoptic file (segments_info)", "a detector needs objects with box"),
    "captions": (CAPTIONS, "a file of captions", "a detector needs objects"),
    "Datumaro": (DATUMARO, "a file of Datumaro", "export it as COCO instead (datum convert"),
    "Supervisely": (SUPERVISELY, "a file of Supervisely", "there, export it as COCO"),
    "BDD100K": (BDD, "a file of BDD100K", "convert it with bdd100k's"),
    "detections": (DETECTIONS, "a file of detections (COCO's results format)", "the ground truth"),
}


def write(folder: Path, name: str, content: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(DatasetError) as caught:
        load_split(folder, split)
    return str(caught.value)


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("parent", ["set", "my set"])
def test_what_can_be_converted_is_named_with_the_command(
    tmp_path: Path, parent: str, name: str
) -> None:
    folder = tmp_path / parent
    content, what = CONVERTED[name]
    write(folder, name, content)
    write(folder, "README.txt", "Pictures of cells.\n")
    command = f"polyfocal convert {shlex.quote(str(folder))} {shlex.quote(f'{folder}_coco')}"
    assert refusal(folder) == (
        f"{folder} has neither annotations/train.json nor annotations/instances_train2017.json: it "
        f"holds {what} ({name}), convert it: {command}."
    )


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_named(tmp_path: Path, name: str) -> None:
    content, what, advice = OTHERS[name]
    file = write(tmp_path, name, content)
    assert f": it holds {what}" in refusal(tmp_path) and f"({name}), {advice}" in refusal(tmp_path)
    assert f"It is {what}" in refusal(file)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("place", ["x.json", "train/x.json", "annotations/x.json"])
def test_json_of_others_is_named(tmp_path: Path, name: str, place: str) -> None:
    content, what, advice = JSON[name]
    file = write(tmp_path, place, json.dumps(content))
    assert f": it holds {what}" in refusal(tmp_path) and f"({place}), {advice}" in refusal(tmp_path)
    assert f"It is {what}" in refusal(file)
    with pytest.raises(DatasetError) as caught:
        read_annotations(file)
    assert str(caught.value).startswith(f"{file} is {what}")
    assert advice in str(caught.value)


def test_json_in_the_place_of_coco_s_is_named(tmp_path: Path) -> None:
    write(tmp_path, "annotations/train.json", json.dumps(LABELME))
    assert refusal(tmp_path).startswith(f"{tmp_path}/annotations/train.json is a file of labelme")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (VOC, "is Pascal VOC's XML and not JSON: polyfocal convert makes a COCO folder"),
        (CVAT, "is CVAT's XML and not JSON: in CVAT, export the task as COCO 1.0 instead."),
        ("<svg/>", "is XML and not JSON"),
        ('{"filename": "a.jpg"}\n{"filename": "b.jpg"}\n', "has one JSON value per line, as ODVG"),
    ],
)
def test_what_is_no_json_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    file = write(tmp_path, "annotations/train.json", content)
    with pytest.raises(DatasetError) as caught:
        read_annotations(file)
    assert str(caught.value).startswith(f"{file} {sentence}")


@pytest.mark.parametrize("name", ["data.yaml", "train/_annotations.csv", "annotations.xml"])
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, name: str) -> None:
    content, what = (CONVERTED.get(name) or OTHERS[name])[:2]
    file = write(tmp_path, name, content)
    assert refusal(file).startswith(
        f"{file} is not a folder; give the folder that holds annotations/train.json and the "
        f"pictures. It is {what}: "
    )


def test_kitti_is_named(tmp_path: Path) -> None:
    write(tmp_path, "ImageSets/train.txt", "000000\n")
    write(tmp_path, "training/label_2/000000.txt", "Car 0 0 0 1 1 9 9 1 2 3 0 1 9 0\n")
    write(tmp_path, "training/calib/000000.txt", "P2: 1 0 0 0 0 1 0 0 0 0 1 0\n")
    assert "it holds KITTI's layout (training), take a config of MMDetection3D" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pom.xml", "<project/>"),
        ("requirements.txt", "torch\n"),
        ("config.yaml", "train: {epochs: 3}\n"),
        ("scores.csv", "epoch,loss\n"),
        ("notes.json", '{"info": 1}'),
        (".hidden/a.xml", VOC),
        ("__MACOSX/Annotations/._a.xml", VOC),
    ],
)
def test_what_is_nothing_is_not_named(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, name, content)
    assert recognise(tmp_path) is None


def test_coco_s_other_files_stay_what_the_sentence_names(tmp_path: Path) -> None:
    write(tmp_path, "annotations/captions_val2017.json", json.dumps(CAPTIONS))
    found = {"images": [], "annotations": [], "categories": []}
    write(tmp_path, "annotations/instances_val2017.json", json.dumps(found))
    assert "annotations holds captions_val2017.json, instances_val2017.json" in refusal(tmp_path)
