"""LiDAR scenes: what is written agrees with the points, the boxes and the camera."""

import math
from dataclasses import replace

import numpy as np
import pytest

from polyfocal import kitti
from polyfocal.demo import lidar_scenes
from polyfocal.demo.lidar_scenes import LidarScenes, scan, write
from polyfocal.errors import UserError

SMALL = LidarScenes(num_train=6, num_val=3)


def files(root):
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


def middle(box):
    """The box as :mod:`polyfocal.kitti` has it: from its middle and not from its bottom's."""
    return box + np.array([0, 0, box[5] / 2, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write(tmp_path_factory.mktemp("lidar") / "small", SMALL)


def test_layout(small):
    names = [f"{number:06d}" for number in range(9)]
    assert set(files(small)) == (
        {"lidar_scenes.json", "ImageSets/train.txt", "ImageSets/val.txt"}
        | {f"training/velodyne/{name}.bin" for name in names}
        | {f"training/label_2/{name}.txt" for name in names}
        | {f"training/calib/{name}.txt" for name in names}
    )
    assert (small / "ImageSets/val.txt").read_text().split() == names[6:]
    assert list(small.parent.iterdir()) == [small]


def test_deterministic_and_independent_of_the_count(small, tmp_path):
    again, more = files(write(tmp_path / "again", SMALL)), replace(SMALL, num_train=7)
    assert again == files(small)
    more = files(write(tmp_path / "more", more))
    for index in range(6):
        for folder, ending in (("velodyne", "bin"), ("label_2", "txt")):
            name = f"training/{folder}/{index:06d}.{ending}"
            assert more[name] == again[name]
    # The val split starts one number later and is the same.
    assert more["training/velodyne/000007.bin"] == again["training/velodyne/000006.bin"]
    clouds = [content for name, content in again.items() if name.endswith(".bin")]
    assert len(set(clouds)) == 9
    assert (scan(replace(SMALL, seed=1), "train", 0)[0]).tobytes() != clouds[0]


def test_labels_are_what_was_put_there(small):
    infos = kitti.load_infos(small, "train")["data_list"]
    objects = 0
    for index, info in enumerate(infos):
        points, things = scan(SMALL, "train", index)
        np.testing.assert_array_equal(
            np.fromfile(small / f"training/velodyne/{index:06d}.bin", np.float32).reshape(-1, 4),
            points,
        )
        camera = info["images"]["CAM2"]
        lidar2img = np.array(camera["lidar2img"])
        for item in info["instances"]:
            if item["bbox_label"] < 0:
                continue
            objects += 1
            box = kitti.boxes_in_lidar(np.array([item["bbox_3d"]]), np.array(camera["lidar2cam"]))[
                0
            ]
            thing = min(things, key=lambda thing: math.dist(thing.box[:2], box[:2]))
            assert kitti.CLASSES[item["bbox_label"]] == thing.type
            turn = (box[6] - thing.box[6] + math.pi) % (2 * math.pi) - math.pi
            np.testing.assert_allclose(box[:6], middle(thing.box)[:6], atol=0.0076)
            assert abs(turn) < 0.0051
            # alpha is what the camera sees of the turn: the ray to the object taken off.
            x, _, z, *_, ry = item["bbox_3d"]
            seen = (item["alpha"] - (ry - math.atan2(x, z)) + math.pi) % (2 * math.pi) - math.pi
            assert abs(seen) < 0.011

            # The 2D box holds the object's points as the camera sees them.
            of_it = np.column_stack([points[thing.points, :3], np.ones(len(thing.points))])
            u, v, depth, _ = lidar2img @ of_it.T
            left, top, right, bottom = item["bbox"]
            assert left - 3 <= (u / depth).min() and (u / depth).max() <= right + 3
            assert top - 3 <= (v / depth).min() and (v / depth).max() <= bottom + 3
            # Of a box that is all in the picture, so is the middle, about half-way.
            if item["truncated"] == 0:
                u, v = item["center_2d"]
                assert 0.3 < (u - left) / (right - left) < 0.7
                assert 0.3 < (v - top) / (bottom - top) < 0.7
            assert 0 <= item["truncated"] <= 1
            assert len(thing.points) >= 5
    assert objects > 30


def test_points_of_an_object_lie_in_its_box_and_no_others():
    checked = 0
    for index in range(6):
        points, things = scan(SMALL, "train", index)
        for thing in things:
            if not len(thing.points):
                continue
            # Three deviations of the range's noise.
            loose = middle(thing.box) + np.array([0, 0, 0, 0.12, 0.12, 0.12, 0])
            of_it = points[thing.points]
            assert kitti.points_in_boxes(of_it, loose[None]).mean() > 0.99
            # What else is in the box is ground under it, within the noise.
            others = np.delete(points, thing.points, axis=0)
            within = others[kitti.points_in_boxes(others, middle(thing.box)[None])[:, 0]]
            assert (within[:, 2] < thing.box[2] + 0.06).all()
            checked += len(of_it)
    assert checked > 3000


def test_what_is_behind_has_fewer_points():
    visible, share = [], []
    for index in range(20):
        _, things = scan(SMALL, "train", index)
        for thing in things:
            if thing.type == "Car":
                distance = math.hypot(*thing.box[:2])
                # As many beams hit a car as its size in the scanner's view.
                visible.append(thing.visible)
                share.append(len(thing.points) * distance**2)
    visible, share = np.array(visible), np.array(share)
    assert ((visible >= 0) & (visible <= 1)).all()
    free, half = share[visible > 0.95], share[(visible > 0.2) & (visible < 0.6)]
    hidden = share[visible < 0.05]
    assert min(len(free), len(half), len(hidden)) >= 5
    assert np.median(hidden) < 0.1 * np.median(free)
    assert np.median(half) < 0.75 * np.median(free)


def test_returns_thin_out_with_the_distance():
    scenes = LidarScenes(num_train=1, num_val=1, cars=(1, 1), clutter=(0, 0))
    rings = []
    for index in range(5):
        points, _ = scan(scenes, "train", index)
        distance = np.hypot(points[:, 0], points[:, 1])
        rings.append([((distance > low) & (distance < low + 5)).sum() for low in (10, 20, 30, 40)])
        assert 8_000 < len(points) < 35_000  # KITTI's, cut to the camera's view: 15 to 20 thousand
        assert points.dtype == np.float32 and points[:, 3].min() >= 0 and points[:, 3].max() <= 1
        ground = points[np.abs(points[:, 2] + 1.73) < 0.1]
        assert len(ground) > 0.5 * len(points)
    near, middle, far, farthest = np.mean(rings, axis=0)
    assert near > 2 * middle and middle > 2 * far and far > 1.5 * farthest > 0


def test_everything_is_in_the_picture(small):
    for info in kitti.load_infos(small, "val")["data_list"]:
        name = f"{info['sample_idx']:06d}"
        points = np.fromfile(small / f"training/velodyne/{name}.bin", np.float32).reshape(-1, 4)
        points[:, 3] = 1
        u, v, depth, _ = np.array(info["images"]["CAM2"]["lidar2img"]) @ points.T
        assert depth.min() > 0
        assert (u / depth).min() >= -0.01 and (u / depth).max() <= 1241.01
        assert (v / depth).min() >= -0.01 and (v / depth).max() <= 374.01


def test_the_same_settings_are_left_alone_and_others_refused(small, tmp_path):
    before = (small / "training/velodyne/000000.bin").stat().st_mtime_ns
    assert write(small, SMALL) == small
    assert (small / "training/velodyne/000000.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"\(seed 0 there, 3 wanted\): remove it, .* overw"):
        write(small, replace(SMALL, seed=3))
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="exists and holds no LiDAR scenes; give a new or empt"):
        write(tmp_path, SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    one = LidarScenes(num_train=1, num_val=1)
    write(tmp_path / "set", one)
    write(tmp_path / "set", replace(one, seed=1), overwrite=True)
    assert '"seed": 1' in (tmp_path / "set/lidar_scenes.json").read_text()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"seed": -1}, "seed of LiDAR scenes must be a whole number of 0 or more, got -1."),
        ({"num_val": 0}, "num_val of LiDAR scenes must be a whole number of 1 or more, got 0."),
        ({"cars": (3, 2)}, r"cars of LiDAR scenes must be two whole numbers .*, got \(3, 2\)."),
        ({"cars": (0, 2)}, "cars of LiDAR scenes must be at least one car"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        LidarScenes(**settings)


def ray(part, direction):
    direction = np.array(direction, float) / np.linalg.norm(direction)
    distance, cosine = lidar_scenes._cast(part, direction[None, None])
    return distance.item(), cosine.item()


def test_beams_meet_solids_where_geometry_says():
    centre = np.array([10.0, 0, 0])
    box = lidar_scenes._Part("box", centre, np.array([2.0, 1, 1]), 0.0, 1.0)
    assert ray(box, (1, 0, 0)) == pytest.approx((8, 1))
    # Turned by a quarter it is 1 m deep; by an eighth its corner points here: a square's diagonal.
    assert ray(box._replace(yaw=math.pi / 2), (1, 0, 0)) == pytest.approx((9, 1))
    square = box._replace(half=np.array([1.0, 1, 1]), yaw=math.pi / 4)
    assert ray(square, (1, 1e-9, 0)) == pytest.approx((10 - math.sqrt(2), math.sqrt(0.5)))
    assert ray(box, (1, 0.2, 0))[0] == math.inf
    assert ray(box, (-1, 0, 0))[0] == math.inf

    ball = lidar_scenes._Part("ellipsoid", centre, np.array([3.0, 3, 3]), 0.3, 1.0)
    assert ray(ball, (1, 0, 0)) == pytest.approx((7, 1))
    # A beam that passes the middle at 10 sin(a): it enters at 10 cos(a) - sqrt(9 - 100 sin(a)^2),
    # and meets the surface at an angle whose sine is 10 sin(a) / 3.
    angle = 0.2
    distance = 10 * math.cos(angle) - math.sqrt(9 - 100 * math.sin(angle) ** 2)
    slant = math.sqrt(1 - (10 * math.sin(angle) / 3) ** 2)
    direction = (math.cos(angle), 0, math.sin(angle))
    assert ray(ball, direction) == pytest.approx((distance, slant))
    assert ray(ball._replace(half=np.array([3.0, 3, 1])), direction)[0] == math.inf

    pole = ball._replace(shape="cylinder")
    assert ray(pole, (math.cos(angle), math.sin(angle), 0)) == pytest.approx((distance, slant))
    # From below its flat end: it is 3 m below the middle, and a beam sinks by 0.4 a metre.
    low = pole._replace(centre=np.array([10.0, 0, -7]))
    assert ray(low, (1, 0, -0.4)) == pytest.approx(
        (10 * math.hypot(1, 0.4), 0.4 / math.hypot(1, 0.4))
    )
