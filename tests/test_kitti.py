"""Folders in KITTI's layout: what is read from them, and what is refused."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyfocal import kitti
from polyfocal.errors import UserError

KITTI_MINI = Path(__file__).resolve().parents[1] / "../shared/data/kitti_mini"

# A camera one metre above the scanner that looks along its x, 100 pixels a unit of slope.
CALIB = """P2: 100 0 600 0 0 100 180 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 1 1 0 0 0

"""
# Its middle is 10 m ahead, 2 m to the left, 0.75 m above the scanner; it heads along the
# scanner's x.
CAR = "Car 0.10 0 -1.37 500 150 600 191 1.5 1.6 4.0 -2 1 10 -1.5707963267948966"
DONT_CARE = "DontCare -1 -1 -10 10 20 30 40 -1 -1 -1 -1000 -1000 -1000 -10"
# Two in the box (one in its corner), one beside, one above, one behind it all.
POINTS = [
    (10, 2, 0.7, 0.5),
    (8.01, 1.21, 0.01, 0.5),
    (10, 1.1, 0.7, 0.5),
    (10, 2, 1.6, 0.5),
    (-10, 2, 0.7, 0.5),
]


@pytest.fixture
def tree(tmp_path):
    for folder in ("ImageSets", "training/velodyne", "training/label_2", "training/calib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/train.txt").write_text("000007\n")
    np.array(POINTS, np.float32).tofile(tmp_path / "training/velodyne/000007.bin")
    (tmp_path / "training/label_2/000007.txt").write_text(f"{CAR}\n{DONT_CARE}\n")
    (tmp_path / "training/calib/000007.txt").write_text(CALIB)
    return tmp_path


def test_a_frame_worked_out_by_hand(tree):
    infos = kitti.load_infos(tree, "train")
    assert infos["metainfo"]["categories"]["Car"] == 2
    assert infos["metainfo"]["categories"]["DontCare"] == -1
    (info,) = infos["data_list"]
    assert info["sample_idx"] == 7
    assert info["lidar_points"]["lidar_path"] == "000007.bin"
    camera = info["images"]["CAM2"]
    assert (camera["height"], camera["width"]) == (375, 1242) and "img_path" not in camera
    assert set(info["images"]) == {"CAM2", "R0_rect"}
    assert camera["lidar2cam"] == [[0, -1, 0, 0], [0, 0, -1, 1], [1, 0, 0, 0], [0, 0, 0, 1]]
    # (10, 2, 1) in the scanner's frame is (-2, 0, 10) in the camera's: u = 600 - 20, v = 180.
    u, v, depth, _ = np.array(camera["lidar2img"]) @ [10, 2, 1, 1]
    assert (u / depth, v / depth, depth) == (580, 180, 10)

    car, region = info["instances"]
    assert car["bbox"] == [500, 150, 600, 191]
    assert car["bbox_label"] == car["bbox_label_3d"] == 2
    assert car["bbox_3d"] == [-2, 1, 10, 4.0, 1.5, 1.6, -math.pi / 2]
    assert (car["truncated"], car["occluded"], car["alpha"], car["score"]) == (0.1, 0, -1.37, 0)
    assert (car["difficulty"], car["num_lidar_pts"]) == (0, 2)
    assert (car["index"], car["group_id"]) == (0, 0)
    assert car["depth"] == 10
    np.testing.assert_allclose(car["center_2d"], [580, 182.5])
    assert (region["bbox_label"], region["num_lidar_pts"], region["index"]) == (-1, -1, -1)

    box = kitti.boxes_in_lidar(np.array([car["bbox_3d"]]), np.array(camera["lidar2cam"]))
    np.testing.assert_allclose(box, [[10, 2, 0.75, 4, 1.6, 1.5, 0]], atol=1e-12)


@pytest.mark.parametrize(
    ("height", "occluded", "truncated", "difficulty"),
    [
        (40.01, 0, 0.15, 0),
        (40, 0, 0, 1),
        (100, 1, 0, 1),
        (100, 0, 0.3, 1),
        (100, 2, 0.5, 2),
        (100, 3, 0, -1),
        (100, 0, 0.51, -1),
        (25, 0, 0, -1),
    ],
)
def test_difficulty(tree, height, occluded, truncated, difficulty):
    line = CAR.split()
    line[1:3], line[7] = [str(truncated), str(occluded)], str(150 + height)
    (tree / "training/label_2/000007.txt").write_text(" ".join(line))
    (info,) = kitti.load_infos(tree, "train")["data_list"]
    assert info["instances"][0]["difficulty"] == difficulty


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_pictures(tree, ending):
    (tree / "training/image_2").mkdir()
    Image.new("RGB", (582, 370)).save(tree / f"training/image_2/000007.{ending}")
    (info,) = kitti.load_infos(tree, "train")["data_list"]
    camera = info["images"]["CAM2"]
    assert (camera["img_path"], camera["height"], camera["width"]) == (f"000007.{ending}", 370, 582)
    # One point of the car is at u = 600 - 200 / 10 = 580, the other at 600 - 121 / 8.01 = 584.9.
    assert info["instances"][0]["num_lidar_pts"] == 1


def test_the_test_split_has_no_labels(tree):
    (tree / "training").rename(tree / "testing")
    (tree / "testing/label_2/000007.txt").unlink()
    (tree / "ImageSets/train.txt").rename(tree / "ImageSets/test.txt")
    (info,) = kitti.load_infos(tree, "test")["data_list"]
    assert "instances" not in info


def write_label(line):
    return lambda tree: (tree / "training/label_2/000007.txt").write_text(line)


def write_calib(text):
    return lambda tree: (tree / "training/calib/000007.txt").write_text(text)


def write_points(values):
    return lambda tree: np.array(values, np.float32).tofile(tree / "training/velodyne/000007.bin")


def names(text):
    return lambda tree: (tree / "ImageSets/train.txt").write_text(text)


def remove(name):
    return lambda tree: (tree / name).unlink()


def garbage_picture(tree):
    (tree / "training/image_2").mkdir()
    (tree / "training/image_2/000007.png").write_bytes(b"nothing")


BAD = {
    "no split": (remove("ImageSets/train.txt"), r"train.txt is missing: .*no ImageSets/\*.txt\."),
    "an empty split": (names("\n"), r"train.txt names no frames; the train split needs at least"),
    "a name": (names("000007\ncar\n"), r"train.txt names 'car' in line 2; a frame's name is dig"),
    "twice": (names("000007\n\n7\n"), r"train.txt names frame 7 twice, 000007 and, in line 3, 7\."),
    "a long name": (names("7" * 5000), r"in line 1; a frame's name is digits such as 000123"),
    "no such frame": (names("000008\n"), r"000008.bin is missing, .*ImageSets names the frame 00"),
    "no points": (write_points([]), r"000007.bin holds no points; a frame needs at least one\."),
    "cut": (write_points([1, 2, 3]), r"000007.bin has 12 bytes, which is no multiple of 16: a p"),
    "NaN": (write_points([[1, 2, 3, 0], [1, np.nan, 3, 0]]), r"has nan in point 1 of 2; every"),
    "infinite": (write_points([[np.inf, 2, 3, 0]]), r"has inf in point 0 of 1"),
    "no labels": (remove("training/label_2/000007.txt"), r"000007.txt is missing, the labels of"),
    "14 fields": (
        write_label(f"{CAR}\n{' '.join(CAR.split()[:14])}\n"),
        r"label_2/000007.txt, line 2, has 14 fields; an object has 15: type, truncated, occlud",
    ),
    "no number": (write_label(CAR.replace("4.0", "long")), r"line 1, has 'long'; it must be a nu"),
    "nan": (write_label(CAR.replace("4.0", "nan")), r"line 1, has 'nan'; it must be a number"),
    "a type": (write_label(CAR.replace("Car", "car")), r"has the type 'car'; KITTI's are Pedestr"),
    "occluded": (write_label(CAR.replace("0.10 0", "0.10 7")), r"has occluded 7; it must be 0, 1"),
    "zero size": (
        write_label(CAR.replace("4.0", "0")),
        r"has a box of height 1.5, width 1.6 and length 0; each must be above 0 metres\.",
    ),
    "zero 2D box": (write_label(CAR.replace("600 191", "500 191")), r"has a 2D box from 500, 150"),
    "nothing cared for": (write_label(DONT_CARE), r"no object in the 1 frames of the train split"),
    "no calib": (remove("training/calib/000007.txt"), r"000007.txt is missing, the calibration"),
    "no R0_rect": (write_calib(CALIB.replace("R0_rect", "R_rect")), r"has no line R0_rect; it n"),
    "11 numbers": (write_calib(CALIB.replace("600 0 0", "600 0")), r"has 11 numbers in P2; it"),
    "calib nan": (write_calib(CALIB.replace("600", "x")), r"000007.txt, P2 has 'x'; it must be"),
    "no rotation": (write_calib(CALIB.replace("0 -1 0 0", "0 0 0 0")), r"Tr_velo_to_cam that is"),
    "mirrored": (
        write_calib(CALIB.replace("R0_rect: 1 0 0", "R0_rect: -1 0 0")),
        r"R0_rect that is no rotation: .* right-handed\.",
    ),
    "no camera": (
        write_calib(CALIB.replace("180 0 0 0 1", "180 0 0 0 9")),
        r"has a P2 that is no camera",
    ),
    "far": (write_label(CAR.replace("4.0", "1e308")), r"has '1e308'; it must be a number from -1e"),
    "identity": (
        write_calib(CALIB.replace("0 -1 0 0 0 0 -1 1 1 0 0 0", "1 0 0 0 0 1 0 0 0 0 1 0")),
        r"has a Tr_velo_to_cam that turns nothing: it must turn the scanner's axes .*; docs",
    ),
    "tracking's calib": (
        write_calib(CALIB.replace("R0_rect:", "R_rect").replace("Tr_velo_to_cam:", "Tr_velo_cam")),
        r"has no line R0_rect; .* of the object benchmark, and not of the tracking benchmark\.",
    ),
    "tracking": (
        write_label(f"0 3 {CAR}"),
        r"has 17 fields, as the tracking benchmark has them, a",
    ),
    "custom": (
        write_label("10 2 0.75 4 1.6 1.5 0 Car"),
        r"has 8 fields, as boxes without a camera have \(docs/data.md says how to write those of",
    ),
    "no 2D box": (
        write_label(CAR.replace("500 150 600 191", "0 0 0 0")),
        r"has a 2D box from 0, 0 to 0, 0; .* how difficult it is; docs/data.md says",
    ),
    "centimetres": (
        write_label(CAR.replace("1.5 1.6 4.0 -2 1 10", "150 160 400 -200 100 1000")),
        r"1 objects in the train split, and no point .* boxes: the labels look like centimetres, a",
    ),
    "millimetres of points": (
        write_points(np.array(POINTS) * [1000, 1000, 1000, 1]),
        r"no point of the scans lies in any of their boxes: the scans look like millimetres, and",
    ),
    "the scanner's axes": (
        write_label(CAR.replace("-2 1 10 -1.5707963267948966", "10 2 0 0")),
        r"boxes: the boxes look like those of the scanner's axes \(x ahead, y left, z up\), and mu",
    ),
    "the scanner's axes, from the middle": (
        write_label(CAR.replace("-2 1 10 -1.5707963267948966", "10 2 0.75 0")),
        r"boxes: the boxes look like those of the scanner's axes",
    ),
    "elsewhere": (
        write_label(CAR.replace("-2 1 10", "-12 1 30")),
        r"no point of the scans lies in any of their boxes; see whether calib belongs to the lab",
    ),
    "a picture": (garbage_picture, r"000007.png is no picture that can be read\."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tree, case):
    spoil, sentence = BAD[case]
    spoil(tree)
    for function in (kitti.load_split, kitti.load_infos):
        with pytest.raises(UserError, match=sentence) as caught:
            function(tree, "train")
        message = str(caught.value)
        assert message.startswith(str(tree)) and "\n" not in message
        assert message.endswith(".") and ". " not in message.replace(str(tree), "")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder; give the one that holds Image"):
        kitti.load_split(tmp_path / "nowhere", "train")
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets/train.txt").write_text("000007\n")
    with pytest.raises(UserError, match="has no folder training; KITTI keeps its frames there"):
        kitti.load_split(tmp_path, "train")


def test_some_boxes_without_points_are_noted(tree):
    far = CAR.replace("-2 1 10", "-12 1 30")
    write_label("\n".join([CAR] * 9 + [far.replace("Car", "Van")]))(tree)
    assert kitti.load_split(tree, "train").notes == ()  # as in real labels
    write_label("\n".join([CAR] * 7 + [far, far, far.replace("Car", "Van")]))(tree)
    assert kitti.load_split(tree, "train").notes == (
        f"3 of 10 boxes of the train split of {tree} hold no point of their scan (2 of 9 Car, 1 of "
        "1 Van); see whether calib belongs to the labels.",
    )


def test_a_box_beside_the_picture_holds_its_points(tree):
    # (10, 2, 0.7) is at u = 600 - 20: beside a picture of 500 pixels.
    (tree / "training/image_2").mkdir()
    Image.new("RGB", (500, 370)).save(tree / "training/image_2/000007.png")
    split = kitti.load_split(tree, "train")
    assert split.notes == () and split.infos["data_list"][0]["instances"][0]["num_lidar_pts"] == 0


def test_byte_order_marks_are_read(tree):
    wanted = kitti.load_infos(tree, "train")
    for file in tree.rglob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert kitti.load_infos(tree, "train") == wanted


def test_a_split_is_read_once_until_a_file_changes(tree, monkeypatch):
    long_ago = 10**18
    for file in tree.rglob("*.*"):
        os.utime(file, ns=(long_ago, long_ago))
    first = kitti.load_split(tree, "train")
    assert kitti.load_split(str(tree), "train") is first
    infos = kitti.load_infos(tree, "train")
    infos["data_list"][0]["images"]["CAM2"]["height"] = 1  # others are not disturbed
    assert first.infos["data_list"][0]["images"]["CAM2"]["height"] == 375
    write_label(CAR.replace("Car", "Van"))(tree)
    again = kitti.load_split(tree, "train")
    assert again is not first and again.infos["data_list"][0]["instances"][0]["bbox_label"] == 3


@pytest.mark.skipif(not KITTI_MINI.is_dir(), reason="needs the real frames of kitti_mini")
def test_real_frames_agree_with_their_annotations():
    truth = {
        frame["frame"]: frame
        for frame in json.loads((KITTI_MINI / "annotations/trainval.json").read_text())
    }
    infos = kitti.load_infos(KITTI_MINI, "trainval")
    assert len(infos["data_list"]) == len(truth) == 40
    checked = 0
    for info in infos["data_list"]:
        frame = truth[f"{info['sample_idx']:06d}"]
        camera = info["images"]["CAM2"]
        assert ("img_path" in camera) == frame["has_image"]
        if frame["has_image"]:
            assert [camera["width"], camera["height"]] == frame["image_size"]
        found = [item for item in info["instances"] if item["bbox_label"] >= 0]
        boxes = kitti.boxes_in_lidar(
            np.array([item["bbox_3d"] for item in found]), np.array(camera["lidar2cam"])
        )
        assert len(found) == len(frame["objects"])
        for item, box, wanted in zip(found, boxes, frame["objects"], strict=True):
            assert kitti.CLASSES[item["bbox_label"]] == wanted["type"]
            np.testing.assert_allclose(box[:6], wanted["box_lidar"][:6], atol=1e-3)
            turn = box[6] - wanted["box_lidar"][6]
            assert abs((turn + math.pi) % (2 * math.pi) - math.pi) < 1e-3
            assert item["bbox"] == wanted["bbox2d"]
            assert item["difficulty"] == wanted["difficulty"]
            # The annotations' places have four decimals, so a point on a face may fall to either
            # side; and this one frame was cut wider than its picture.
            if frame["frame"] != "002155":
                assert abs(item["num_lidar_pts"] - wanted["num_points_fov"]) <= 1
            checked += 1
    assert checked == 225


def test_a_part_of_the_train_split_held_out(tree, tmp_path):
    names = [f"{number:06d}" for number in range(10)]
    (tree / "ImageSets/train.txt").write_text("\n".join(names))
    for _ in range(2):  # the second finds what the first has made
        part = kitti.hold_out(tree, tmp_path / "part")
    splits = [set((part / f"ImageSets/{s}.txt").read_text().split()) for s in ("train", "val")]
    assert splits[0] | splits[1] == set(names) and [len(split) for split in splits] == [8, 2]
    assert (part / "training/velodyne/000007.bin").samefile(tree / "training/velodyne/000007.bin")
    other = shutil.copytree(tree, tmp_path / "other")
    kitti.hold_out(other, part)  # of another set, in the same place
    assert (part / "training").samefile(other / "training")
    assert sorted(path.name for path in part.iterdir()) == ["ImageSets", "training"]
