"""LiDAR scenes: a detection set in KITTI's layout, made by a simulated scanner.

A spinning scanner with 64 beams, 1.73 m above a flat street, is ray-cast against cars, pedestrians
and cyclists, and against walls, poles, trees, bushes and crates, which are no objects. The nearest
surface hides what is behind. Points get sparse with the distance and at grazing angles, and are
noisy. Labels are exact, because the generator knows every box. The same seed, settings and
:data:`VERSION` give the same files. Frame ``i`` of a split does not depend on the number of frames.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyfocal.data.kitti import DONT_CARE, IMAGE_SIZE
from polyfocal.demo.folder import Scenes, whole_pair

VERSION = 1
"""Raised whenever the same settings would give other points or labels."""

CLASSES = ("Pedestrian", "Cyclist", "Car")

# Metres, degrees. The beams are a Velodyne HDL-64E's: two blocks, the upper one denser.
_SCANNER_HEIGHT = 1.73
_ELEVATIONS = np.radians(np.concatenate([2 - np.arange(32) / 3, -8.83 - 0.5 * np.arange(32)]))
_AZIMUTH_STEP = math.radians(0.175)
_AZIMUTH_LIMIT = math.radians(46)  # a little more than the camera sees
_MAX_RANGE = 100.0
_RANGE_NOISE = 0.02
# The echo of a surface is its reflectance * cos(incidence) / distance^2; at this strength half of
# the pulses come back.
_HALF_ECHO = 1e-5
_ALWAYS_LOST = 0.03

# Size (length, width, height) in metres: mean and deviation; sizes stay within two deviations. The
# means are those of the usual anchors.
_SIZES = {
    "Car": ((3.9, 1.6, 1.56), (0.35, 0.07, 0.09)),
    "Cyclist": ((1.76, 0.6, 1.73), (0.1, 0.06, 0.07)),
    "Pedestrian": ((0.8, 0.6, 1.73), (0.12, 0.05, 0.1)),
}
_NEAREST, _FARTHEST, _ASIDE = 6.0, 50.0, 18.0  # metres ahead and to a side
_PLACEMENT_TRIES = 30
_GAP = 0.3  # between any two things

# With fewer points, or less of it in sight, nobody would label an object.
_MIN_POINTS = 5
_MIN_VISIBLE = 0.1
# Visible parts from which on an object counts as fully and as partly visible.
_FULLY, _PARTLY = 0.85, 0.45

# The camera: 0.27 m ahead of the scanner and 0.08 m below it.
_HEIGHT, _WIDTH = IMAGE_SIZE
_P2 = np.array([[721.5, 0, 609.5, 45], [0, 721.5, 173, 0], [0, 0, 1, 0]])
_LIDAR_TO_CAMERA = np.array([[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]], dtype=float)

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class LidarScenes(Scenes):
    """The settings of a set of LiDAR scenes; checked when made.

    Attributes:
        num_train: Frames in the train split, ``>= 1``.
        num_val: Frames in the val split, ``>= 1``.
        cars: Fewest and most cars tried in a frame. A thing for which no place is found is left
            out, so crowded frames may hold fewer.
        pedestrians: The same for pedestrians.
        cyclists: The same for cyclists.
        clutter: The same for walls, poles, trees, bushes and crates.

    Raises:
        UserError: A value is out of its range.
    """

    what = "LiDAR scenes"
    settings_file = "lidar_scenes.json"
    version = VERSION

    num_train: int = 200
    num_val: int = 50
    cars: tuple[int, int] = (5, 12)
    pedestrians: tuple[int, int] = (0, 4)
    cyclists: tuple[int, int] = (0, 3)
    clutter: tuple[int, int] = (4, 12)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cars", "pedestrians", "cyclists", "clutter"):
            pair = getattr(self, name)
            self.check(
                name,
                whole_pair(pair) and 0 <= pair[0] <= pair[1] <= 50,
                "two whole numbers (fewest, most) with 0 <= fewest <= most <= 50",
            )
        self.check("cars", self.cars[0] >= 1, "at least one car, (1, 1) or more")

    @property
    def splits(self) -> dict[str, int]:
        return {"train": self.num_train, "val": self.num_val}

    def fill(self, folder: Path) -> None:
        _fill(folder, self)


@dataclass(frozen=True)
class Thing:
    """An object of a frame.

    Attributes:
        type: One of :data:`CLASSES`.
        box: x, y, z of the middle of its bottom, length, width, height, yaw, in metres and
            radians, in the scanner's coordinates.
        visible: Beams that hit it, as a part of those that would if it stood alone, in [0, 1].
        points: (N,) indices of the points measured on it.
    """

    type: str
    box: NDArray[np.float64]
    visible: float
    points: NDArray[np.int64]


class _Part(NamedTuple):
    """A solid that is a box, an ellipsoid or an upright elliptic cylinder."""

    shape: Literal["box", "ellipsoid", "cylinder"]
    centre: NDArray[np.float64]
    half: NDArray[np.float64]  # along its own axes
    yaw: float
    reflectance: float


def write(root: Path, scenes: LidarScenes = LidarScenes(), *, overwrite: bool = False) -> Path:
    """Write LiDAR scenes as a folder in KITTI's layout, see :meth:`LidarScenes.write`.

    There are no pictures; the points are those that a camera of KITTI's sees.
    """
    return scenes.write(root, overwrite=overwrite)


def scan(scenes: LidarScenes, split: str, index: int) -> tuple[NDArray[np.float32], list[Thing]]:
    """Simulate frame ``index`` (from 0) of a split.

    Returns:
        The points, float32 of shape (N, 4): x ahead, y left, z up in metres from the scanner,
        intensity in [0, 1]; and the objects, whether anything of them is seen or not.
    """
    key = (VERSION, _SPLITS.index(split), index)
    rng = np.random.default_rng(np.random.SeedSequence(entropy=scenes.seed, spawn_key=key))
    boxes, solids = _compose(scenes, rng)

    directions = _directions(rng)
    distance = np.full(directions.shape[:2], np.inf)
    cosine = np.zeros_like(distance)
    reflectance = np.full_like(distance, rng.uniform(0.15, 0.35))
    owner = np.full(distance.shape, -1)
    down = directions[..., 2] < 0
    distance[down] = _SCANNER_HEIGHT / -directions[..., 2][down]
    cosine[down] = -directions[..., 2][down]
    alone = np.zeros(len(solids), dtype=int)
    for number, parts in enumerate(solids):
        hit = np.zeros(distance.shape, dtype=bool)
        for part in parts:
            columns = _columns(part, directions)
            reach, slant = _cast(part, directions[:, columns])
            hit[:, columns] |= np.isfinite(reach)
            nearer = reach < distance[:, columns]
            distance[:, columns][nearer] = reach[nearer]
            cosine[:, columns][nearer] = slant[nearer]
            reflectance[:, columns][nearer] = part.reflectance
            owner[:, columns][nearer] = number
        alone[number] = hit.sum()

    echo = reflectance * cosine / distance**2
    back = (distance < _MAX_RANGE) & (
        rng.random(distance.shape) < (1 - _ALWAYS_LOST) * echo / (echo + _HALF_ECHO)
    )
    measured = distance[back] + rng.normal(0, _RANGE_NOISE, back.sum())
    places = np.round(directions[back] * measured[:, None], 3)  # millimetres, as KITTI's
    brightness = reflectance[back] * (0.4 + 0.6 * cosine[back]) + rng.normal(0, 0.03, back.sum())
    points = np.column_stack([places, np.round(np.clip(brightness, 0, 1), 2)]).astype(np.float32)
    pixels, depth = _project(places)
    seen = (
        (depth > 0)
        & (pixels >= 0).all(axis=1)
        & (pixels[:, 0] <= _WIDTH - 1)
        & (pixels[:, 1] <= _HEIGHT - 1)
    )
    hits = np.bincount(owner[owner >= 0], minlength=len(solids))
    owners = owner[back][seen]
    things = [
        Thing(kind, box, hits[number] / max(alone[number], 1), np.flatnonzero(owners == number))
        for number, (kind, box) in enumerate(boxes)
    ]
    return points[seen], things


def _fill(root: Path, scenes: LidarScenes) -> None:
    for folder in ("ImageSets", "training/velodyne", "training/label_2", "training/calib"):
        (root / folder).mkdir(parents=True)
    first = 0
    for split, count in scenes.splits.items():
        names = [f"{first + index:06d}" for index in range(count)]
        first += count
        (root / "ImageSets" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for index, name in enumerate(names):
            points, things = scan(scenes, split, index)
            points.astype("<f4").tofile(root / "training/velodyne" / f"{name}.bin")
            (root / "training/label_2" / f"{name}.txt").write_text(_labels(things))
            (root / "training/calib" / f"{name}.txt").write_text(_CALIB)


def _compose(
    scenes: LidarScenes, rng: np.random.Generator
) -> tuple[list[tuple[str, NDArray[np.float64]]], list[list[_Part]]]:
    """Type and box of the objects; and the solids of the objects, then of the clutter."""
    street = rng.normal(0, 0.12)  # its direction
    taken: list[NDArray[np.float64]] = []
    boxes: list[tuple[str, NDArray[np.float64]]] = []
    solids: list[list[_Part]] = []
    build = {"Car": _car, "Cyclist": _cyclist, "Pedestrian": _pedestrian}
    for kind, limits in (
        ("Car", scenes.cars),
        ("Cyclist", scenes.cyclists),
        ("Pedestrian", scenes.pedestrians),
    ):
        for _ in range(int(rng.integers(limits[0], limits[1] + 1))):
            mean, deviation = map(np.array, _SIZES[kind])
            length, width, height = mean + deviation * np.clip(rng.normal(size=3), -2, 2)
            box = _place(partial(_position, rng, kind, street), length, width, height, taken)
            if box is not None:
                boxes.append((kind, box))
                solids.append(build[kind](box, rng))
    for _ in range(int(rng.integers(scenes.clutter[0], scenes.clutter[1] + 1))):
        name = str(rng.choice(["wall", "pole", "tree", "bush", "crate"]))
        length, width, height = _clutter_size(name, rng)
        box = _place(partial(_position, rng, name, street), length, width, height, taken)
        if box is not None:
            solids.append(list(_clutter(name, box, rng)))
    return boxes, solids


def _position(rng: np.random.Generator, kind: str, street: float) -> tuple[float, float, float]:
    """A place, (x, y), and a direction to look into."""
    x = rng.uniform(_NEAREST, _FARTHEST)
    side = min(_ASIDE, 0.9 * x)
    y = rng.uniform(-side, side)
    if kind == "wall":
        y = math.copysign(rng.uniform(14, 24), y)
        return x, y, street
    if kind == "Pedestrian" or rng.random() < 0.1:
        return x, y, rng.uniform(-math.pi, math.pi)
    across = math.pi / 2 if rng.random() < 0.2 else 0.0
    turned = math.pi * rng.integers(2)
    return x, y, street + across + turned + rng.normal(0, 0.06)


def _place(
    position: Callable[[], tuple[float, float, float]],
    length: float,
    width: float,
    height: float,
    taken: list[NDArray[np.float64]],
) -> NDArray[np.float64] | None:
    """A box on the ground beside all others, whose outline joins ``taken``, or None."""
    for _ in range(_PLACEMENT_TRIES):
        x, y, yaw = position()
        outline = _outline(x, y, length + _GAP, width + _GAP, yaw)
        nearest = outline[:, 0].min()
        if nearest < _NEAREST / 2 or any(_overlap(outline, other) for other in taken):
            continue
        taken.append(outline)
        yaw = (yaw + math.pi) % (2 * math.pi) - math.pi
        return np.array([x, y, -_SCANNER_HEIGHT, length, width, height, yaw])
    return None


def _outline(x: float, y: float, length: float, width: float, yaw: float) -> NDArray[np.float64]:
    along = np.array([math.cos(yaw), math.sin(yaw)]) * length / 2
    across = np.array([-math.sin(yaw), math.cos(yaw)]) * width / 2
    corners = np.array([along + across, along - across, -along - across, across - along])
    return corners + np.array([x, y])


def _overlap(one: NDArray[np.float64], two: NDArray[np.float64]) -> bool:
    """Whether two rectangles overlap: no edge's direction separates them."""
    for outline in (one, two):
        edges = outline[1:3] - outline[:2]
        first, second = one @ edges.T, two @ edges.T
        apart = (first.max(0) < second.min(0)) | (second.max(0) < first.min(0))
        if apart.any():
            return False
    return True


def _part(
    box: NDArray[np.float64],
    shape: Literal["box", "ellipsoid", "cylinder"],
    centre: tuple[float, float, float],
    half: tuple[float, float, float],
    reflectance: float,
) -> _Part:
    """A solid at a place that is given in the box's own axes, from the middle of its bottom."""
    cosine, sine = math.cos(box[6]), math.sin(box[6])
    x, y, z = centre
    offset = np.array([cosine * x - sine * y, sine * x + cosine * y, z])
    return _Part(shape, box[:3] + offset, np.array(half), float(box[6]), reflectance)


def _car(box: NDArray[np.float64], rng: np.random.Generator) -> list[_Part]:
    length, width, height = box[3:6] * 0.98  # boxes are drawn with a little room
    paint, glass = rng.uniform(0.1, 0.8), rng.uniform(0.05, 0.15)
    belt = rng.uniform(0.52, 0.62) * height
    cabin = rng.uniform(0.45, 0.6) * length
    back = -rng.uniform(0, 0.9) * (length - cabin) / 2
    axle = 0.32 * length
    return [
        _part(
            box, "box", (0, 0, (0.22 + belt) / 2), (length / 2, width / 2, (belt - 0.22) / 2), paint
        ),
        _part(
            box,
            "box",
            (back, 0, (belt + height) / 2),
            (cabin / 2, 0.43 * width, (height - belt) / 2),
            glass,
        ),
        *(
            _part(box, "box", (side * axle, 0, 0.3), (0.3, 0.48 * width, 0.3), 0.1)
            for side in (-1, 1)
        ),
    ]


def _pedestrian(box: NDArray[np.float64], rng: np.random.Generator) -> list[_Part]:
    length, width, height = box[3:6] * 0.98
    cloth = rng.uniform(0.15, 0.6)
    step = rng.uniform(0, 1) * (length / 2 - 0.1)
    head = 0.12
    return [
        _part(
            box, "cylinder", (step, 0.2 * width, 0.24 * height), (0.09, 0.09, 0.24 * height), cloth
        ),
        _part(
            box,
            "cylinder",
            (-step, -0.2 * width, 0.24 * height),
            (0.09, 0.09, 0.24 * height),
            cloth,
        ),
        _part(box, "cylinder", (0, 0, 0.65 * height), (0.17, width / 2, 0.2 * height), cloth),
        _part(box, "ellipsoid", (0, 0, height - head), (head, head, head), 0.4),
    ]


def _cyclist(box: NDArray[np.float64], rng: np.random.Generator) -> list[_Part]:
    length, width, height = box[3:6] * 0.98
    cloth = rng.uniform(0.15, 0.6)
    head = 0.13
    return [
        _part(box, "box", (0, 0, 0.35), (length / 2, 0.04, 0.33), 0.3),
        _part(box, "box", (0.25 * length, 0, 1.0), (0.05, width / 2, 0.04), 0.3),
        _part(box, "box", (0, 0, 0.6), (0.16, 0.3 * width, 0.3), cloth),
        _part(
            box,
            "cylinder",
            (-0.03 * length, 0, 0.7 * height),
            (0.2, 0.42 * width, 0.17 * height),
            cloth,
        ),
        _part(box, "ellipsoid", (0.05 * length, 0, height - head), (head, head, head), 0.4),
    ]


def _clutter_size(name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    if name == "wall":
        return rng.uniform(6, 25), 0.4, rng.uniform(2, 8)
    if name == "pole":
        thick = rng.uniform(0.15, 0.35)
        return thick, thick, rng.uniform(2.5, 6)
    if name == "tree":
        thick = rng.uniform(0.25, 0.6)
        return thick, thick, rng.uniform(4, 8)
    if name == "bush":
        return rng.uniform(0.8, 3), rng.uniform(0.8, 2), rng.uniform(0.6, 2)
    return rng.uniform(0.6, 2.5), rng.uniform(0.5, 1.8), rng.uniform(0.5, 2)


def _clutter(name: str, box: NDArray[np.float64], rng: np.random.Generator) -> Iterator[_Part]:
    length, width, height = box[3:6]
    half = (length / 2, width / 2, height / 2)
    shade = rng.uniform(0.1, 0.6)
    if name in ("wall", "crate"):
        yield _part(box, "box", (0, 0, height / 2), half, shade)
    elif name == "bush":
        yield _part(box, "ellipsoid", (0, 0, height / 2), half, shade)
    else:
        yield _part(box, "cylinder", (0, 0, height / 2), half, shade)
    if name == "tree":
        crown = rng.uniform(1, 2)
        yield _part(box, "ellipsoid", (0, 0, height), (crown, crown, 0.4 * height), shade)


def _directions(rng: np.random.Generator) -> NDArray[np.float64]:
    """Unit vectors of the beams, (64, columns, 3), the azimuth rising along the columns."""
    columns = np.arange(-_AZIMUTH_LIMIT, _AZIMUTH_LIMIT, _AZIMUTH_STEP)
    azimuth = columns + rng.uniform(0, _AZIMUTH_STEP, (len(_ELEVATIONS), 1))
    elevation = _ELEVATIONS[:, None]
    flat = np.cos(elevation)
    return np.stack(
        [
            flat * np.cos(azimuth),
            flat * np.sin(azimuth),
            np.broadcast_to(np.sin(elevation), azimuth.shape),
        ],
        axis=-1,
    )


def _columns(part: _Part, directions: NDArray[np.float64]) -> slice:
    """The columns of beams that can hit a solid."""
    distance = math.hypot(*part.centre[:2])
    radius = math.hypot(*part.half[:2])
    if distance <= radius:
        return slice(None)
    middle = math.atan2(part.centre[1], part.centre[0])
    reach = math.asin(radius / distance) + 2 * _AZIMUTH_STEP
    first = math.floor((middle - reach + _AZIMUTH_LIMIT) / _AZIMUTH_STEP)
    last = math.ceil((middle + reach + _AZIMUTH_LIMIT) / _AZIMUTH_STEP)
    return slice(max(first, 0), max(last, 0))


def _cast(
    part: _Part, directions: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance at which beams from the origin enter a solid (infinite: never), and |cos| there.

    In the solid's own axes, scaled by its half sizes, the box is the cube [-1, 1]^3, the ellipsoid
    the unit ball and the cylinder a unit disc by [-1, 1].
    """
    cosine, sine = math.cos(part.yaw), math.sin(part.yaw)
    turn = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    ray = directions @ turn.T
    start = (turn @ -part.centre) / part.half
    step = ray / part.half
    flat = {"box": 3, "cylinder": 1, "ellipsoid": 0}[part.shape]  # axes, the last ones, with faces
    enter = np.full(ray.shape[:2], -np.inf)
    leave = np.full(ray.shape[:2], np.inf)
    normal = np.zeros_like(ray)
    for axis in range(3 - flat, 3):
        with np.errstate(divide="ignore"):
            one, two = (-1 - start[axis]) / step[..., axis], (1 - start[axis]) / step[..., axis]
        near = np.minimum(one, two)
        later = near > enter
        enter[later] = near[later]
        normal[later] = np.eye(3)[axis]
        leave = np.minimum(leave, np.maximum(one, two))
    if flat < 3:
        round_ = slice(0, 3 - flat)
        a = (step[..., round_] ** 2).sum(-1)
        b = (step[..., round_] * start[round_]).sum(-1)
        c = (start[round_] ** 2).sum() - 1
        inside = b * b - a * c
        root = np.sqrt(np.maximum(inside, 0))
        near, far = (-b - root) / a, (-b + root) / a
        later = near > enter
        enter[later] = near[later]
        leave = np.where(inside > 0, np.minimum(leave, far), -np.inf)
        outward = np.zeros_like(ray)
        outward[..., round_] = (start + near[..., None] * step)[..., round_] / part.half[round_]
        length = np.linalg.norm(outward, axis=-1, keepdims=True)
        normal[later] = (outward / np.maximum(length, 1e-12))[later]
    hit = (enter > 0) & (enter < leave)
    return np.where(hit, enter, np.inf), np.abs((normal * ray).sum(-1))


def _project(places: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixels (N, 2) and depth (N,) of places in the scanner's coordinates."""
    camera = places @ _LIDAR_TO_CAMERA[:, :3].T + _LIDAR_TO_CAMERA[:, 3]
    image = camera @ _P2[:, :3].T + _P2[:, 3]
    depth = np.where(image[:, 2] == 0, 1e-9, image[:, 2])
    return image[:, :2] / depth[:, None], image[:, 2]


def _labels(things: list[Thing]) -> str:
    """The label file: objects that one would label, then the others as regions."""
    lines: list[str] = []
    regions: list[str] = []
    for thing in things:
        x, y, z, length, width, height, yaw = thing.box
        outline = _outline(x, y, length, width, yaw)
        corners = np.concatenate(
            [np.column_stack([outline, np.full(4, level)]) for level in (z, z + height)]
        )
        pixels, _ = _project(corners)
        low, high = pixels.min(0), pixels.max(0)
        limits = np.array([_WIDTH - 1, _HEIGHT - 1])
        left, top = np.clip(low, 0, limits)
        right, bottom = np.clip(high, 0, limits)
        if right - left < 1 or bottom - top < 1:
            continue  # beside the picture
        area = f"{left:.2f} {top:.2f} {right:.2f} {bottom:.2f}"
        if len(thing.points) < _MIN_POINTS or thing.visible < _MIN_VISIBLE:
            regions.append(f"{DONT_CARE} -1 -1 -10 {area} -1 -1 -1 -1000 -1000 -1000 -10\n")
            continue
        truncated = max(1 - (right - left) * (bottom - top) / np.prod(high - low), 0.0)
        occluded = 0 if thing.visible >= _FULLY else 1 if thing.visible >= _PARTLY else 2
        place = _LIDAR_TO_CAMERA @ [x, y, z, 1]
        turn = _wrapped(-yaw - math.pi / 2)
        alpha = _wrapped(turn - math.atan2(place[0], place[2]))
        lines.append(
            f"{thing.type} {truncated:.2f} {occluded} {alpha:.2f} {area} {height:.2f} {width:.2f} "
            f"{length:.2f} {place[0]:.2f} {place[1]:.2f} {place[2]:.2f} {turn:.2f}\n"
        )
    return "".join(lines + regions)


def _wrapped(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _line(key: str, matrix: NDArray[np.float64]) -> str:
    return f"{key}: {' '.join(f'{value:.12e}' for value in matrix.ravel())}\n"


# The four cameras are 0.06 m beside the first one and 0.54 m apart, the coloured ones last.
_CALIB = "".join(
    [
        *(
            _line(f"P{camera}", np.column_stack([_P2[:, :3], [offset, 0, 0]]))
            for camera, offset in enumerate((0.0, -0.54 * _P2[0, 0], 45.0, -0.48 * _P2[0, 0]))
        ),
        _line("R0_rect", np.eye(3)),
        _line("Tr_velo_to_cam", _LIDAR_TO_CAMERA),
        _line("Tr_imu_to_velo", np.eye(3, 4)),
    ]
)
