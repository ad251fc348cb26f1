"""Folders in KITTI's layout: check once, read, describe as MMDetection3D does.

::

    ROOT/ImageSets/train.txt val.txt       names of frames, one per line
    ROOT/training/velodyne/NAME.bin        points, float32: x ahead, y left, z up, intensity
    ROOT/training/label_2/NAME.txt         objects, 15 fields per line
    ROOT/training/calib/NAME.txt           P2, R0_rect and Tr_velo_to_cam; the others if there
    ROOT/training/image_2/NAME.png         or .jpg; optional

The split ``test`` is in ``ROOT/testing`` and has no labels. :func:`load_infos` returns what
MMDetection3D 1.4 keeps in its info files, without writing or reading one: they are pickles, which
run whatever code their maker put there. The fields of labels and calibrations are those of the
development kit of Geiger et al., *Are we ready for Autonomous Driving? The KITTI Vision Benchmark
Suite*, CVPR 2012.
"""

import copy
import math
import os
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polyfocal.data.files import DatasetError, Kept, read_text, write_text, written_whole
from polyfocal.data.splits import held_out

CLASSES = (
    "Pedestrian",
    "Cyclist",
    "Car",
    "Van",
    "Truck",
    "Person_sitting",
    "Tram",
    "Misc",
)
"""Types of objects in the order of the labels that MMDetection3D gives them."""

SPLITS = ("train", "val", "trainval", "test")

DONT_CARE = "DontCare"
"""Type of the regions that nobody labelled; their label is -1."""

IMAGE_SIZE = (375, 1242)
"""Height and width in pixels of a frame without a picture: KITTI's usual size."""

# By difficulty (easy, moderate, hard): least height in pixels, most occlusion and most truncation.
MIN_HEIGHT = (40, 25, 25)
MAX_OCCLUSION = (0, 1, 2)
MAX_TRUNCATION = (0.15, 0.3, 0.5)

_FARTHEST = 1e6  # metres or pixels, of any measured value; computations with it stay finite
_NAME_DIGITS = 18  # of a frame's name: longer numbers do not fit into 64 bits
_POINT_BYTES = 16  # x, y, z, intensity, each float32
_PICTURES = (".png", ".jpg", ".jpeg")
_CALIB_LENGTHS = {
    "P0": 12,
    "P1": 12,
    "P2": 12,
    "P3": 12,
    "R0_rect": 9,
    "Tr_velo_to_cam": 12,
    "Tr_imu_to_velo": 12,
}
_CALIB_NEEDED = ("P2", "R0_rect", "Tr_velo_to_cam")
_FIELDS = (
    "type, truncated, occluded, alpha, left, top, right, bottom, height, width, length, x, y, z, "
    "rotation_y"
)
_THREADS = 4
# Real labels have a few boxes without a point, of objects that are far away.
_FEW_EMPTY = 0.1
_SUSPECTS = 8  # at most so many frames are read again
_NO_CAMERA = "docs/data.md says how to write those of scans without a camera"
_TRACKING_FIELDS = (17, 18)  # frame and track before the 15 or 16
_CUSTOM_FIELDS = 8  # x, y, z, length, width, height, yaw, type: MMDetection3D's own format


class KittiError(DatasetError):
    """A folder in KITTI's layout cannot be used as it is."""


@dataclass(frozen=True)
class _Object:
    type: str
    truncated: float
    occluded: int
    alpha: float
    box: tuple[float, float, float, float]  # left, top, right, bottom
    box_3d: tuple[float, float, float, float, float, float, float]  # x, y, z, l, h, w, ry
    score: float


@dataclass(frozen=True)
class _Frame:
    name: str
    points: NDArray[np.float32]
    calib: dict[str, NDArray[np.float64]]  # 4 x 4 each
    picture: str | None
    size: tuple[int, int]
    objects: list[_Object] | None


@dataclass(frozen=True, eq=False)
class KittiSplit:
    """One checked split of a folder in KITTI's layout.

    Attributes:
        infos: See :func:`load_infos`. Shared by all readers of the split, so nobody may change it.
        notes: What a person should know before training on it, a sentence each.
    """

    infos: dict[str, Any]
    notes: tuple[str, ...]


_kept = Kept[KittiSplit](2)  # train and val


def load_split(root: str | Path, split: str) -> KittiSplit:
    """Read and check every file of a split, or return what was read if none has changed since.

    Args:
        root: The folder that holds ``ImageSets`` and ``training``.
        split: Name of a file in ``ImageSets``.

    Raises:
        KittiError: A file is missing or malformed, or no box holds a point. The message names the
            file, what is in it and what would be right.
    """
    root = Path(root)
    names = _names(root, split)
    folder = _folder(root, split)
    endings = {"velodyne": ".bin", "calib": ".txt"}
    if split != "test":
        endings["label_2"] = ".txt"
    files = [
        folder / place / f"{name}{ending}" for name in names for place, ending in endings.items()
    ]
    listed = root / "ImageSets" / f"{split}.txt"
    return _kept.get(
        (os.path.realpath(root), split), [listed, *files], lambda: _read(root, split, names)
    )


def load_infos(root: str | Path, split: str) -> dict[str, Any]:
    """Describe a split as MMDetection3D 1.4 does in its info files (version 2), after checking it.

    Args:
        root: The folder that holds ``ImageSets`` and ``training``.
        split: Name of a file in ``ImageSets``.

    Returns:
        ``metainfo`` and ``data_list``, one entry per frame. Paths are names within ``velodyne`` and
        ``image_2``. The 3D boxes, (x, y, z, length, height, width, rotation_y), are in metres and
        radians in the rectified camera's coordinates, x right, y down, z ahead, (x, y, z) being
        the middle of the bottom. ``difficulty`` is 0, 1 or 2 for KITTI's easy, moderate and hard,
        and -1 for none of them. ``num_lidar_pts`` counts the points within a box that the camera
        sees, -1 for DontCare. Without a picture there is no ``img_path``; the split ``test`` has no
        ``instances``.

    Raises:
        KittiError: As :func:`load_split`.
    """
    return copy.deepcopy(load_split(root, split).infos)


def write_infos(root: str | Path, out: str | Path) -> list[str]:
    """Write MMDetection3D's info files of the splits of a folder, all or, where one is bad, none.

    Args:
        root: The folder that holds ``ImageSets`` and ``training``.
        out: Folder for ``kitti_infos_train.pkl`` and the like; made as needed.

    Returns:
        What a person should know, a sentence each.

    Raises:
        UserError: A split is not usable, there is none, or ``out`` cannot be written.
    """
    root, out = Path(root), Path(out)
    splits = [split for split in SPLITS if (root / "ImageSets" / f"{split}.txt").is_file()]
    if not splits:
        raise KittiError(
            f"{root} has none of ImageSets/{', '.join(f'{split}.txt' for split in SPLITS)}: they "
            "name the frames of a split, one per line."
        )
    found = {out / f"kitti_infos_{split}.pkl": load_split(root, split) for split in splits}
    said = []
    for file, split in found.items():
        with written_whole(file) as part:
            part.write_bytes(pickle.dumps(split.infos))
        frames = split.infos["data_list"]
        objects = [one for frame in frames for one in frame.get("instances", ())]
        points = [one["num_lidar_pts"] for one in objects if one["bbox_label"] >= 0]
        said.append(
            f"{file}: {len(frames)} frames, {len(points)} objects that are no {DONT_CARE}, "
            f"{sum(points)} points in them"
        )
        said += [f"note: {note}" for note in split.notes]
    return said


def hold_out(root: str | Path, folder: str | Path) -> Path:
    """Divide the train split in two, see :func:`polyfocal.data.splits.held_out`.

    Args:
        root: The folder that holds ``ImageSets`` and ``training``.
        folder: It is made if needed, and gets a link to ``training`` and an ``ImageSets``, whose
            ``train`` has four fifths of the frames and whose ``val`` has the others.

    Returns:
        ``folder``, which is a KITTI tree itself.

    Raises:
        KittiError: There is no such split.
        UserError: The split has fewer than five frames, or the folder cannot be written.
    """
    names = _names(Path(root), "train")
    chosen = held_out(names)
    folder = Path(folder)
    (folder / "ImageSets").mkdir(parents=True, exist_ok=True)
    for split, out in (("train", False), ("val", True)):
        part = [name for name, held in zip(names, chosen, strict=True) if held == out]
        file = folder / "ImageSets" / f"{split}.txt"
        write_text(file, "\n".join(part) + "\n")
    link, wanted = folder / "training", (Path(root) / "training").resolve()
    if link.resolve() != wanted:  # there is none, or it is that of another root
        with written_whole(link) as new:
            new.symlink_to(wanted, target_is_directory=True)
    return folder


def boxes_in_lidar(
    boxes: NDArray[np.floating], lidar2cam: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Turn boxes in a camera's coordinates into boxes in a scanner's.

    The two coordinate systems are up to a degree askew. The middle of a box stays where it is, and
    a box that is upright in one system is taken as upright in the other. (MMDetection3D keeps the
    middle of the bottom; the difference is up to 3 cm.)

    Args:
        boxes: (N, 7): x, y, z of the middle of the bottom, length, height, width, rotation_y.
        lidar2cam: (4, 4).

    Returns:
        (N, 7): x, y, z of the middle, length, width, height, yaw; the yaw counts from x, towards
        y, in [-pi, pi).
    """
    rows = np.asarray(boxes, np.float64).reshape(-1, 7)
    middles = _transform(np.linalg.inv(lidar2cam), _middles(rows))
    yaw = (-rows[:, 6] - math.pi / 2 + math.pi) % (2 * math.pi) - math.pi
    return np.concatenate([middles, rows[:, [3, 5, 4]], yaw[:, None]], axis=1)


def points_in_boxes(points: NDArray[np.floating], boxes: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which points lie in which boxes.

    Args:
        points: (P, 3 or more): x, y, z.
        boxes: (N, 7) of :func:`boxes_in_lidar`.

    Returns:
        (P, N).
    """
    inside = np.zeros((len(points), len(boxes)), dtype=bool)
    x, y, z = np.asarray(points, np.float64)[:, :3].T
    for column, (middle_x, middle_y, middle_z, length, width, height, yaw) in enumerate(boxes):
        cosine, sine = math.cos(yaw), math.sin(yaw)
        along = (x - middle_x) * cosine + (y - middle_y) * sine
        across = (y - middle_y) * cosine - (x - middle_x) * sine
        inside[:, column] = (
            (np.abs(along) <= length / 2)
            & (np.abs(across) <= width / 2)
            & (np.abs(z - middle_z) <= height / 2)
        )
    return inside


def check_scan(file: Path) -> None:
    """Check the length of a file of points, which a training reads again in each epoch.

    Raises:
        KittiError: The file is missing, empty or cut off.
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise KittiError(f"{file} cannot be read: {error.strerror}.") from None
    if size == 0:
        raise KittiError(f"{file} holds no points; a frame needs at least one.")
    if size % _POINT_BYTES:
        raise KittiError(
            f"{file} has {size} bytes, which is no multiple of {_POINT_BYTES}: a point is 4 "
            "float32, x, y, z and intensity."
        )


def _read(root: Path, split: str, names: list[str]) -> KittiSplit:
    folder, labelled = _folder(root, split), split != "test"
    data_list: list[dict[str, Any]] = []
    objects, empty = Counter[str](), Counter[str]()
    doubtful: list[_Frame] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        # A few frames at a time: the points of a whole split would not fit into memory.
        for start in range(0, len(names), 4 * _THREADS):
            chunk = names[start : start + 4 * _THREADS]
            for frame in pool.map(lambda name: _frame(folder, name, labelled), chunk):
                info = _info(frame)
                data_list.append(info)
                cared = [found.type for found in frame.objects or () if found.type != DONT_CARE]
                without = _without_points(frame, info)
                objects.update(cared)
                empty.update(without)
                if without and len(doubtful) < _SUSPECTS:
                    doubtful.append(frame)
    total, missed = sum(objects.values()), sum(empty.values())
    if labelled and not total:
        raise KittiError(
            f"{root} has no object in the {len(names)} frames of the {split} split, at most "
            f"{DONT_CARE}; it needs at least one."
        )
    notes = []
    if missed > _FEW_EMPTY * total:
        why = _why_empty(doubtful)
        if missed == total:
            raise KittiError(
                f"{root} has {total} objects in the {split} split, and no point of the scans lies "
                f"in any of their boxes{why}."
            )
        listed = ", ".join(f"{count} of {objects[name]} {name}" for name, count in empty.items())
        notes.append(
            f"{missed} of {total} boxes of the {split} split of {root} hold no point of their scan "
            f"({listed}){why}."
        )
    categories = {name: label for label, name in enumerate(CLASSES)}
    metainfo = {
        "categories": {**categories, DONT_CARE: -1},
        "dataset": "kitti",
        "info_version": "1.1",
    }
    return KittiSplit({"metainfo": metainfo, "data_list": data_list}, tuple(notes))


def _without_points(frame: _Frame, info: dict[str, Any]) -> list[str]:
    """Types of the objects whose boxes hold no point, seen by the camera or not."""
    unseen = [
        found
        for found, one in zip(frame.objects or (), info.get("instances", ()), strict=True)
        if one["num_lidar_pts"] == 0
    ]
    held = _held(frame, [found.box_3d for found in unseen])
    return [found.type for found, some in zip(unseen, held, strict=True) if not some]


def _held(frame: _Frame, boxes: Any) -> list[bool]:
    """Which boxes of a label file hold a point."""
    lidar = boxes_in_lidar(np.array(boxes, np.float64), _lidar2cam(frame.calib))
    return [bool(column.any()) for column in points_in_boxes(frame.points, lidar).T]


def _why_empty(frames: list[_Frame]) -> str:
    """What is probably wrong with boxes that hold no point, for the end of a message."""
    boxes = [
        np.array([found.box_3d for found in frame.objects or () if found.type != DONT_CARE])
        for frame in frames
    ]
    most = sum(map(len, boxes)) / 2

    for unit, factor in (("centimetres", 0.01), ("millimetres", 0.001)):
        for whose, scale in (("labels", factor), ("scans", 1 / factor)):
            scaled = [own * ([scale] * 6 + [1]) for own in boxes]
            if sum(sum(_held(*pair)) for pair in zip(frames, scaled, strict=True)) > most:
                return f": the {whose} look like {unit}, and must be in metres"
    if sum(_held_in_scanner_axes(*pair) for pair in zip(frames, boxes, strict=True)) > most:
        return (
            ": the boxes look like those of the scanner's axes (x ahead, y left, z up), and must "
            "be in the camera's (x right, y down, z ahead)"
        )
    return "; see whether calib belongs to the labels"


def _held_in_scanner_axes(frame: _Frame, boxes: NDArray[np.float64]) -> int:
    """How many boxes hold a point if their place is in the scanner's axes."""
    x, y, z, length, height, width, turn = boxes.T
    held = np.zeros(len(boxes), dtype=bool)
    for up in (np.zeros_like(z), height / 2):  # z is that of the middle, or of the bottom
        lidar = np.stack([x, y, z + up, length, width, height, turn], axis=1)
        held |= points_in_boxes(frame.points, lidar).any(axis=0)
    return int(held.sum())


def _folder(root: Path, split: str) -> Path:
    folder = root / ("testing" if split == "test" else "training")
    if not folder.is_dir():
        raise KittiError(f"{root} has no folder {folder.name}; KITTI keeps its frames there.")
    return folder


def _names(root: Path, split: str) -> list[str]:
    if not root.is_dir():
        raise KittiError(f"{root} is not a folder; give the one that holds ImageSets and training.")
    file = root / "ImageSets" / f"{split}.txt"
    present = sorted(path.name for path in (root / "ImageSets").glob("*.txt"))
    if not file.is_file():
        there = f"there is {', '.join(present)}" if present else "there is no ImageSets/*.txt"
        raise KittiError(
            f"{file} is missing: the names of the {split} split's frames, one per line; {there}."
        )
    frames: dict[int, str] = {}
    for number, line in enumerate(_text(file).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if not (name.isascii() and name.isdigit() and len(name) <= _NAME_DIGITS):
            raise KittiError(
                f"{file} names {name!r} in line {number}; a frame's name is digits such as 000123."
            )
        if int(name) in frames:
            raise KittiError(
                f"{file} names frame {int(name)} twice, {frames[int(name)]} and, in line {number}, "
                f"{name}."
            )
        frames[int(name)] = name
    if not frames:
        raise KittiError(f"{file} names no frames; the {split} split needs at least one.")
    return list(frames.values())


def _frame(folder: Path, name: str, labelled: bool) -> _Frame:
    picture = next(
        (
            file
            for ending in _PICTURES
            if (file := folder / "image_2" / f"{name}{ending}").is_file()
        ),
        None,
    )
    return _Frame(
        name=name,
        points=_read_points(folder / "velodyne" / f"{name}.bin", folder.parent),
        calib=_read_calib(folder / "calib" / f"{name}.txt", folder.parent),
        picture=picture.name if picture else None,
        size=_picture_size(picture) if picture else IMAGE_SIZE,
        objects=_read_labels(folder / "label_2" / f"{name}.txt", folder.parent)
        if labelled
        else None,
    )


def _existing(file: Path, root: Path, what: str) -> Path:
    if not file.is_file():
        raise KittiError(
            f"{file} is missing, {what}; {root / 'ImageSets'} names the frame {file.stem}."
        )
    return file


def _read_points(file: Path, root: Path) -> NDArray[np.float32]:
    check_scan(_existing(file, root, "the points of a frame"))
    try:
        points = np.fromfile(file, "<f4").reshape(-1, 4)
    except OSError as error:
        raise KittiError(f"{file} cannot be read: {error.strerror}.") from None
    usable = np.abs(points) <= _FARTHEST  # NaN is not
    if not usable.all():
        row, column = divmod(int(np.argmin(usable)), 4)
        raise KittiError(
            f"{file} has {points[row, column]:g} in point {row} of {len(points)}; every value must "
            f"be a number from {-_FARTHEST:g} to {_FARTHEST:g}."
        )
    return points


def _read_calib(file: Path, root: Path) -> dict[str, NDArray[np.float64]]:
    text = _text(_existing(file, root, f"the calibration of a frame ({_NO_CAMERA})"))
    calib: dict[str, NDArray[np.float64]] = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if key not in _CALIB_LENGTHS:
            continue
        length = _CALIB_LENGTHS[key]
        values = _numbers(rest.split(), f"{file}, {key}")
        if len(values) != length:
            raise KittiError(f"{file} has {len(values)} numbers in {key}; it must have {length}.")
        calib[key] = _square(values)
    for key in _CALIB_NEEDED:
        if key not in calib:
            tracking = "R_rect" in text and "Tr_velo_cam" in text
            of = " of the object benchmark, and not of the tracking benchmark" if tracking else ""
            raise KittiError(
                f"{file} has no line {key}; it needs {', '.join(_CALIB_NEEDED[:-1])} and "
                f"{_CALIB_NEEDED[-1]}{of}."
            )
    for key in ("R0_rect", "Tr_velo_to_cam"):
        rotation = calib[key][:3, :3]
        turned = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2)
        if not turned or np.linalg.det(rotation) < 0:
            raise KittiError(
                f"{file} has a {key} that is no rotation: its rows must be unit "
                "vectors at right angles, right-handed."
            )
    camera = calib["P2"][:3, :3]
    if not np.allclose(camera[2], [0, 0, 1], atol=1e-2) or min(camera[0, 0], camera[1, 1]) <= 0:
        raise KittiError(
            f"{file} has a P2 that is no camera's: its first and sixth number must be above 0, its "
            "last row must begin with 0 0 1."
        )
    if np.allclose(_lidar2cam(calib)[:3, :3], np.eye(3), atol=1e-2):
        raise KittiError(
            f"{file} has a Tr_velo_to_cam that turns nothing: it must turn the scanner's axes (x "
            f"ahead, y left, z up) into the camera's (x right, y down, z ahead); {_NO_CAMERA}."
        )
    return calib


def _lidar2cam(calib: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    return calib["R0_rect"] @ calib["Tr_velo_to_cam"]


def _square(values: list[float]) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, : len(values) // 3] = np.reshape(values, (3, -1))
    return matrix


def _read_labels(file: Path, root: Path) -> list[_Object]:
    text = _text(_existing(file, root, "the labels of a frame"))
    return [
        _object(f"{file}, line {number},", line.split())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]


def _object(where: str, fields: list[str]) -> _Object:
    if len(fields) not in (15, 16):
        form = ""
        if len(fields) in _TRACKING_FIELDS and fields[0].isdigit():
            form = ", as the tracking benchmark has them, a file per sequence"
        elif len(fields) == _CUSTOM_FIELDS:
            form = f", as boxes without a camera have ({_NO_CAMERA})"
        raise KittiError(
            f"{where} has {len(fields)} fields{form}; an object has 15: {_FIELDS} (and perhaps a "
            "score)."
        )
    kind = fields[0]
    if kind not in CLASSES and kind != DONT_CARE:
        raise KittiError(
            f"{where} has the type {kind!r}; KITTI's are {', '.join(CLASSES)} and {DONT_CARE}."
        )
    values = _numbers(fields[1:], where)
    truncated, occluded, alpha = values[:3]
    left, top, right, bottom = values[3:7]
    height, width, length = values[7:10]
    if occluded not in (-1, 0, 1, 2, 3):
        raise KittiError(f"{where} has occluded {fields[2]}; it must be 0, 1, 2 or 3, or -1.")
    if kind != DONT_CARE and min(height, width, length) <= 0:
        raise KittiError(
            f"{where} has a box of height {height:g}, width {width:g} and length {length:g}; each "
            "must be above 0 metres."
        )
    if right <= left or bottom <= top:
        raise KittiError(
            f"{where} has a 2D box from {left:g}, {top:g} to {right:g}, {bottom:g}; its right and "
            "bottom must be beyond its left and top, since its height says how difficult it is; "
            f"{_NO_CAMERA}."
        )
    return _Object(
        type=kind,
        truncated=truncated,
        occluded=int(occluded),
        alpha=alpha,
        box=(left, top, right, bottom),
        box_3d=(values[10], values[11], values[12], length, height, width, values[13]),
        score=values[14] if len(values) > 14 else 0.0,
    )


def _numbers(fields: list[str], where: str) -> list[float]:
    values = []
    for field in fields:
        try:
            value = float(field)
        except ValueError:
            value = math.nan
        if not abs(value) <= _FARTHEST:  # NaN is not
            raise KittiError(
                f"{where} has {field!r}; it must be a number from {-_FARTHEST:g} to {_FARTHEST:g}."
            )
        values.append(value)
    return values


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except DatasetError as error:
        raise KittiError(str(error)) from None


def _picture_size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise KittiError(f"{file} is no picture that can be read.") from None


def _info(frame: _Frame) -> dict[str, Any]:
    calib = frame.calib
    lidar2cam = _lidar2cam(calib)
    height, width = frame.size
    images: dict[str, Any] = {
        f"CAM{camera}": {
            "cam2img": calib[f"P{camera}"].tolist(),
            "lidar2img": (calib[f"P{camera}"] @ lidar2cam).tolist(),
        }
        for camera in range(4)
        if f"P{camera}" in calib
    }
    images["CAM2"].update(height=height, width=width, lidar2cam=lidar2cam.tolist())
    if frame.picture:
        images["CAM2"]["img_path"] = frame.picture
    images["R0_rect"] = calib["R0_rect"].tolist()
    points: dict[str, Any] = {
        "num_pts_feats": 4,
        "lidar_path": f"{frame.name}.bin",
        "Tr_velo_to_cam": calib["Tr_velo_to_cam"].tolist(),
    }
    if "Tr_imu_to_velo" in calib:
        points["Tr_imu_to_velo"] = calib["Tr_imu_to_velo"].tolist()
    info = {"sample_idx": int(frame.name), "images": images, "lidar_points": points}
    if frame.objects is not None:
        info["instances"] = _instances(frame, frame.objects, lidar2cam)
    return info


def _instances(
    frame: _Frame, objects: list[_Object], lidar2cam: NDArray[np.float64]
) -> list[dict[str, Any]]:
    projection = frame.calib["P2"]
    boxes = np.array([found.box_3d for found in objects]).reshape(-1, 7)
    projected = _transform(projection, _middles(boxes))
    with np.errstate(divide="ignore", invalid="ignore"):  # a middle in the camera's own plane
        centers = projected[:, :2] / projected[:, 2:]
    counts = points_in_boxes(
        frame.points[_seen(frame.points, projection @ lidar2cam, frame.size)],
        boxes_in_lidar(boxes, lidar2cam),
    ).sum(axis=0)
    instances = []
    next_index = 0
    for number, found in enumerate(objects):
        cared = found.type != DONT_CARE
        label = CLASSES.index(found.type) if cared else -1
        instances.append(
            {
                "bbox": list(found.box),
                "bbox_label": label,
                "bbox_3d": list(found.box_3d),
                "bbox_label_3d": label,
                "depth": float(projected[number, 2]),
                "center_2d": centers[number].tolist(),
                "num_lidar_pts": int(counts[number]) if cared else -1,
                "difficulty": _difficulty(found),
                "truncated": found.truncated,
                "occluded": found.occluded,
                "alpha": found.alpha,
                "score": found.score,
                "index": next_index if cared else -1,
                "group_id": number,
            }
        )
        next_index += cared
    return instances


def _difficulty(found: _Object) -> int:
    height = found.box[3] - found.box[1]
    for level in range(3):
        if (
            height > MIN_HEIGHT[level]
            and found.occluded <= MAX_OCCLUSION[level]
            and found.truncated <= MAX_TRUNCATION[level]
        ):
            return level
    return -1


def _seen(
    points: NDArray[np.float32], lidar2img: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Which points are in the picture."""
    u, v, depth = _transform(lidar2img, points[:, :3]).T
    height, width = size
    return (depth > 0) & (u >= 0) & (u < width * depth) & (v >= 0) & (v < height * depth)


def _middles(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return boxes[:, :3] - boxes[:, 4:5] * [0, 0.5, 0]  # y points down


def _transform(matrix: NDArray[np.float64], points: NDArray[np.floating]) -> NDArray[np.float64]:
    return points @ matrix[:3, :3].T + matrix[:3, 3]
