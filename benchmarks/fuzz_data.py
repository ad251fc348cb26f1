"""Feed damaged data sets to the tools and see that each case ends well.

A case is a copy of a small data set, in COCO's format or in KITTI's layout, with one to three
mutations of its files: keys dropped, values of another type, NaN and huge numbers, ids declared
twice, files cut, emptied, removed or in another encoding. Or the set as a whole is changed, as
exporters do: ids from 0, objects to be ignored, boxes of corners, pictures of other formats, boxes
in the scanner's axes. A separate process reads the set by the functions that the tools call; a few
cases train or test through the command line. A case passes with a success, or with one line that
names the file. What is accepted must be right: every picture loads in the size that its entry says,
and perfect detections have an average precision of 1. The exit status is 1 if a case ends with
anything else: a traceback, a warning, a crash, more than the time limit, or a half-written output.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from polyfocal import coco, kitti
from polyfocal.data.pictures import load_with_opencv
from polyfocal.demo import DigitScenes, lidar_scenes, write_digit_scenes
from polyfocal.errors import UserError

ROOT = Path(__file__).parents[1]

EXAMPLES = """\
examples:
  # the built-in data, a few minutes on one core
  python benchmarks/fuzz_data.py --cases 3000

  # real files, and 20 cases through tools/train.py and tools/test.py
  python benchmarks/fuzz_data.py --cases 3000 --coco ~/cells --kitti ~/kitti --trainings 20

  # one case again, its files kept
  python benchmarks/fuzz_data.py --only 1234 --keep /tmp/case
"""

PICTURES = {"train": 5, "val": 3}
FRAMES = {"train": 3, "val": 2}
LIMIT = 20  # seconds per case, and for one that trains:
TRAINING_LIMIT = 180
LONG_NUMBER = "@long number@"  # stands for one that json.dumps refuses to write

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e-300, 1e308, 10**30, 2**63, 2**31, 65_536),
    *(math.nan, math.inf, -math.inf, LONG_NUMBER),
    *("", " ", "7", "\n", "a\nb", "\0", "\ud800", "[/b]", "$\\x$", "../..", "/", ".", "é" * 300),
    *([], {}, [[]], [1], [0, 0, 0, 0], [[1, 2, 3, 4, 5, 6]], [[0, 0, 1e9, 0, 1e9, 1e9]]),
    *({"size": 5, "counts": "a"}, {"size": [8, 8], "counts": [64]}, {"counts": "PPPP"}),
)
WORDS = (
    *("", "nan", "inf", "-1", "0", "1e308", "1e400", "7" * 5000, "Car", "car", "DontCare", "é"),
    *("000001", "1", "999999", "../000000", "1 2", "1,5", "0x10", "P2:", ":", "#", "\x00", "\x1c"),
)
NOT_TEXT = (b"\xff\xfe", b"\x80", b"\xed\xa0\x80", "é".encode("latin-1"), b"\x00" * 8)


@dataclass
class Result:
    """How a case ended: ``kind`` is success, sentence, or what was wrong."""

    number: int
    kind: str
    mutations: list[str]
    output: str
    seconds: float


# --- mutations ---


def spoil_json(rng: random.Random, file: Path, text: str) -> str:
    """Change something in the file's JSON, where it still is JSON."""
    content = json.loads(text.replace("9" * 5000, f'"{LONG_NUMBER}"'))
    parent, key = _place(rng, content)
    if parent is None:
        content, what = rng.choice(STRANGE), "all of it is another value"
    else:
        what = f"{_spoil_entry(rng, parent, key)} {key!r}"
    written = json.dumps(content)
    file.write_text(written.replace(f'"{LONG_NUMBER}"', "9" * 5000), encoding="utf-8")
    return what


def _place(rng: random.Random, content: Any) -> tuple[Any, Any]:
    """A container somewhere within, and a key of it; none for the content itself."""
    parent, key, node = None, None, content
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.75):
        if parent is None and rng.random() < 0.02:
            break
        parent = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = parent[key]
    return parent, key


def _spoil_entry(rng: random.Random, parent: Any, key: Any) -> str:
    value = parent[key]
    ways = ["replaced", "replaced", "dropped", "emptied", "doubled", "taken from elsewhere"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        ways += ["shifted", "shifted"]
    way = rng.choice(ways)
    if way == "replaced":
        parent[key] = rng.choice(STRANGE)
    elif way == "dropped":
        del parent[key]
    elif way == "emptied":
        parent[key] = type(value)()
    elif way == "shifted":
        parent[key] = rng.choice([-value, value + 1, value * 10**6, float(value), str(value)])
    elif way == "doubled" and isinstance(parent, list):
        parent.insert(key, value)
    else:
        other = rng.choice(list(parent.values()) if isinstance(parent, dict) else parent)
        parent[key] = other
    return way


def spoil_lines(rng: random.Random, file: Path, text: str) -> str:
    """Change a line or a word of a text file of KITTI's."""
    lines = text.splitlines() or [""]
    at = rng.randrange(len(lines))
    words = lines[at].split(" ")
    word = rng.randrange(len(words))
    way = rng.choice(["word", "word", "word", "drop word", "more words", "no line", "twice", "new"])
    if way == "word":
        words[word] = rng.choice(WORDS)
    elif way == "drop word":
        del words[word]
    elif way == "more words":
        words[word:word] = [rng.choice(WORDS)] * rng.choice([1, 2, 1000])
    lines[at : at + 1] = {"no line": [], "twice": [lines[at]] * 2, "new": [rng.choice(WORDS)]}.get(
        way, [" ".join(words)]
    )
    file.write_text("\n".join(lines) + rng.choice(["\n", ""]), encoding="utf-8")
    return f"line {at}: {way}"


def spoil_points(rng: random.Random, file: Path, content: bytes) -> str:
    """Change values of a scan, or its length."""
    value = rng.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0])
    way = rng.choice(["values", "length", "one point"])
    if way == "values":
        points = torch.frombuffer(bytearray(content[: len(content) // 4 * 4]), dtype=torch.float32)
        points[rng.randrange(len(points)) :: rng.choice([1, 4, 1000])] = value
        file.write_bytes(points.numpy().tobytes())
    else:
        file.write_bytes(content[: rng.randrange(len(content)) if way == "length" else 16])
    return f"{way}, {value}"


def spoil_bytes(rng: random.Random, file: Path, content: bytes) -> str:
    """What disks, editors and people do to any file."""
    at = rng.randrange(len(content)) if content else 0
    way = rng.choice(
        ["cut", "empty", "gone", "folder", "flipped", "not text", "mark", "link to nowhere", "junk"]
    )
    if way in ("gone", "folder", "link to nowhere"):
        file.unlink()
    if way == "folder":
        file.mkdir()
    elif way == "link to nowhere":
        file.symlink_to("nowhere")
    elif way != "gone":
        file.write_bytes(
            {
                "cut": content[:at],
                "empty": b"",
                "flipped": content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
                "not text": content[:at] + rng.choice(NOT_TEXT) + content[at:],
                "mark": b"\xef\xbb\xbf" + content,
                "junk": rng.randbytes(200),
            }[way]
        )
    return way


def spoil_annotations(rng: random.Random, folder: Path) -> str:
    """Change a whole annotation file as exporters do."""
    file = folder / "annotations" / rng.choice(["train.json", "val.json"])
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    images, annotations = content["images"], content["annotations"]
    some = [one for one in annotations if rng.random() < rng.choice([0.3, 1])]
    way = rng.choice(
        [
            *("numbered", "pictures numbered", "ignore", "outside", "corners", "tiny", "crowds"),
            *("no area", "no iscrowd", "no masks", "backslashes", "panoptic", "roboflow", "marked"),
        ]
    )
    first = rng.choice([0, -1, -5, 2**62])
    if way == "numbered":
        for number, one in enumerate(annotations, start=first):
            one["id"] = number
    elif way == "pictures numbered":
        new = {image["id"]: number for number, image in enumerate(images, start=first)}
        for image in images:
            image["id"] = new[image["id"]]
        for one in annotations:
            one["image_id"] = new[one["image_id"]]
    elif way == "backslashes":
        for image in images:
            image["file_name"] = "images\\" + image["file_name"]
    elif way == "roboflow":
        (folder / "train").mkdir()
        file.rename(folder / "train" / "_annotations.coco.json")
        return way
    for one in some:
        x, y, width, height = one["bbox"]
        if way in ("no area", "no iscrowd"):
            del one[way.removeprefix("no ")]
        elif way == "crowds":
            one.update(iscrowd=1, segmentation=rng.choice([[], None, one["segmentation"]]))
        elif way == "no masks":
            one["segmentation"] = rng.choice([[], None, [[]]])
        else:
            one.update(
                {
                    "ignore": {"ignore": 1},
                    "outside": {"bbox": [x + 10**4, y, width, height]},
                    "corners": {"bbox": [x, y, x + width, y + height]},
                    "tiny": {"bbox": [x, y, 0.5, height]},
                    "panoptic": {"segments_info": []},
                }.get(way, {})
            )
    mark = b"\xef\xbb\xbf" if way == "marked" else b""
    file.unlink()
    file.write_bytes(mark + json.dumps(content).encode())
    return f"{way}, {len(some)}"


def spoil_pictures(rng: random.Random, folder: Path) -> str:
    """Write pictures again, in another format or mode, under the names that they had."""
    file = rng.choice(sorted((folder / "images").iterdir()))
    picture = Image.open(file).convert("RGB")
    grey = np.asarray(picture.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(10)
    rare = {"format": rng.choice(["TGA", "PCX", "ICO", "SGI", "BMP", "GIF", "PPM", "JPEG2000"])}
    ways: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("turned", picture, {"format": rng.choice(["JPEG", "PNG", "WEBP"]), "exif": exif}),
        ("rare", picture, rare),
        ("rare", picture, rare),
        ("real numbers", Image.fromarray(grey.astype(np.float32)), {"format": "TIFF"}),
        ("16 bits", Image.fromarray(grey.astype(np.uint16) * 16), {"format": "PNG"}),
        ("inks", picture.convert("CMYK"), {"format": rng.choice(["JPEG", "TIFF"])}),
        ("palette", picture.convert("P"), {"format": "PNG", "transparency": 0}),
        (
            "moving",
            picture,
            {"format": rng.choice(["GIF", "WEBP", "PNG"]), "save_all": True}
            | {"append_images": [picture.rotate(180)]},
        ),
    ]
    way, written, options = rng.choice(ways)
    file.unlink()
    written.save(file, **options)
    return f"{file.name}: {way} {options['format']}"


def spoil_frames(rng: random.Random, folder: Path) -> str:
    """Change all labels or calibrations of a tree as converters do."""
    way = rng.choice(["scanner", "centimetres", "identity", "tracking", "custom", "marked"])
    scale = rng.choice([100, 1000, 0.01])
    place = "calib" if way == "identity" else "label_2"
    for file in sorted((folder / "training" / place).iterdir()):
        lines = []
        for line in file.read_text(encoding="utf-8-sig").splitlines():
            words = line.split()
            if way == "identity" and words and words[0] == "Tr_velo_to_cam:":
                words[1:] = [str(int(n % 5 == 0)) for n in range(11)] + ["0"]
            elif way == "scanner":
                x, y, z = words[11:14]
                words[11:14] = [z, f"-{x}".replace("--", ""), f"-{y}".replace("--", "")]
            elif way == "centimetres":
                words[8:14] = [str(float(word) * scale) for word in words[8:14]]
            elif way == "tracking":
                words = ["0", "1", *words]
            elif way == "custom":
                words = [*words[8:15], words[0]]
            lines.append(" ".join(words))
        file.unlink()
        mark = "\ufeff" if way == "marked" else ""
        file.write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    return f"{way} {scale}" if way == "centimetres" else way


def mutate(rng: random.Random, folder: Path) -> str:
    """Change a data set: one of its files, or what all of them have in common."""
    if rng.random() < 0.3:
        coco = (folder / "annotations").is_dir()
        spoil = rng.choice([spoil_annotations, spoil_pictures]) if coco else spoil_frames
        # What an earlier mutation has left may not be what these expect.
        with contextlib.suppress(ValueError, LookupError, TypeError, OSError, AttributeError):
            return spoil(rng, folder)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if not files:
        return "nothing is left to change"
    # Annotations are few and hold most of what can be wrong.
    kinds = sorted({file.suffix for file in files})
    kind = rng.choice([*kinds, *[ending for ending in (".json", ".txt") if ending in kinds] * 2])
    file = rng.choice([file for file in files if file.suffix == kind])
    content = file.read_bytes()
    file.unlink()  # it may be a link to the original
    file.write_bytes(content)
    what = ""
    if content and rng.random() < 0.8:
        # What an earlier mutation has left may not be what these expect.
        with contextlib.suppress(ValueError, IndexError, TypeError, OverflowError, RecursionError):
            if kind == ".json":
                what = spoil_json(rng, file, content.decode())
            elif kind == ".txt":
                what = spoil_lines(rng, file, content.decode())
            elif kind == ".bin":
                what = spoil_points(rng, file, content)
    return f"{file.relative_to(folder)}: {what or spoil_bytes(rng, file, content)}"


# --- the data ---


def small_coco(source: Path | None, folder: Path) -> Path:
    """A few pictures of a COCO-format folder, with detections and a calibrator for them."""
    if source is None:
        settings = DigitScenes(num_train=5, num_val=3, size=64, digits=(1, 3), digit_size=(20, 40))
        source = write_digit_scenes(folder.with_name("digits"), settings)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, count in PICTURES.items():
        found = coco.load_split(source, split)
        content = json.loads(found.annotation_file.read_text(encoding="utf-8"))
        images = content["images"][:count]
        chosen = {image["id"] for image in images}
        annotations = [one for one in content["annotations"] if one["image_id"] in chosen]
        for image in images:
            name = f"{split}_{Path(image['file_name']).name}"
            shutil.copyfile(found.image_dir / image["file_name"], folder / "images" / name)
            image["file_name"] = name
        if split == "val":
            _add_crowd(images[0], annotations)
        content.update(images=images, annotations=annotations)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    detections = [
        {
            **{key: one[key] for key in ("image_id", "category_id", "bbox")},
            "segmentation": _rle(one, images),
            "score": 0.05 + 0.9 * number / len(annotations),
        }
        for number, one in enumerate(annotations)
        for _ in range(3)
    ]
    (folder / "results.json").write_text(json.dumps(detections))
    tool("calibration").main(
        [
            *(str(folder / "results.json"), str(folder / "annotations" / "val.json")),
            *("--fit", "platt", "--save", str(folder / "calibrator.json")),
        ]
    )
    return folder


def _rle(annotation: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """A mask in the format of results."""
    from pycocotools import mask

    shape = annotation["segmentation"]
    if isinstance(shape, list):
        (image,) = (image for image in images if image["id"] == annotation["image_id"])
        shape = mask.merge(mask.frPyObjects(shape, image["height"], image["width"]))
    elif isinstance(shape["counts"], list):
        shape = mask.frPyObjects(shape, *shape["size"])
    counts = shape["counts"]
    return {**shape, "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _add_crowd(image: dict[str, Any], annotations: list[dict[str, Any]]) -> None:
    """A crowd region, whose mask is a list of runs as in COCO's own files."""
    height, width = image["height"], image["width"]
    annotations.append(
        {
            **annotations[0],
            "id": max(one["id"] for one in annotations) + 1,
            "image_id": image["id"],
            "bbox": [0, 0, 2, height],
            "area": 2 * height,
            "iscrowd": 1,
            "segmentation": {
                "size": [height, width],
                "counts": [0, 2 * height, height * (width - 2)],
            },
        }
    )


def small_kitti(source: Path | None, folder: Path) -> Path:
    """A few frames of a folder in KITTI's layout."""
    if source is None:
        source = lidar_scenes.write(
            folder.with_name("scans"), lidar_scenes.LidarScenes(num_train=3, num_val=2, cars=(2, 4))
        )
    (folder / "ImageSets").mkdir(parents=True)
    for split, count in FRAMES.items():
        names = (source / "ImageSets" / f"{split}.txt").read_text().split()[:count]
        (folder / "ImageSets" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for place in ("velodyne", "label_2", "calib", "image_2"):
            target = folder / "training" / place
            target.mkdir(parents=True, exist_ok=True)
            for name in names:
                for file in (source / "training" / place).glob(f"{name}.*"):
                    shutil.copyfile(file, target / file.name)
    return folder


def linked_copy(source: Path, folder: Path) -> None:
    """A copy whose files are links, to be replaced where they are changed."""
    for place, _, files in os.walk(source):
        target = folder / Path(place).relative_to(source)
        target.mkdir(parents=True)
        for file in files:
            (target / file).symlink_to(Path(place, file))


# --- the cases ---


_tools: dict[str, ModuleType] = {}


def tool(name: str) -> ModuleType:
    """A command line of tools/, as a module."""
    if name not in _tools:
        spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        _tools[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_tools[name])
    return _tools[name]


def read_coco(data: Path, _: Path) -> int:
    """What tools/train.py does to a folder given as ``--data``; what it accepts must be right."""
    try:
        for split in PICTURES:
            _check_accepted(coco.load_split(data, split, load_with_opencv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_accepted(split: coco.CocoSplit) -> None:
    found = split.annotations
    for image in found.images:
        path = split.image_dir / image["file_name"]
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError):
            continue  # damaged in the middle, where the check does not look
        loaded = load_with_opencv(path)
        assert loaded.shape == (image["height"], image["width"], 3), image
    if all(min(one["bbox"][2:]) > 0 for one in found.objects):
        keys = ("image_id", "category_id", "bbox")
        perfect = [{**{key: one[key] for key in keys}, "score": 0.5} for one in found.objects]
        mean = coco.evaluate(found, perfect).stats["mAP"]
        assert abs(mean - 1) < 1e-9, f"mAP {mean} of perfect detections"


def hold_out_coco(data: Path, out: Path) -> int:
    """What tools/tune.py does."""
    try:
        coco.hold_out(data / "annotations" / "train.json", out)
        coco.class_counts(data / "annotations" / "train.json")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def calibrate(data: Path, out: Path, *options: str) -> int:
    """The calibration tool."""
    files = [str(data / "results.json"), str(data / "annotations" / "val.json")]
    return tool("calibration").main([*files, *options])


def read_kitti(data: Path, _: Path) -> int:
    """What tools/train.py does to a folder given as ``--data``."""
    try:
        for split in FRAMES:
            kitti.load_split(data, split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def create_infos(data: Path, out: Path) -> int:
    """The tool that writes MMDetection3D's info files."""
    return tool("create_kitti_infos").main([str(data), "--out", str(out)])


Way = Callable[[Path, Path], int]
COCO_WAYS: tuple[Way, ...] = (
    read_coco,
    read_coco,
    hold_out_coco,
    calibrate,
    lambda data, out: calibrate(data, out, "--masks"),
    lambda data, out: calibrate(data, out, "--fit", "platt", "--save", str(out / "new.json")),
    lambda data, out: calibrate(
        *(data, out, "--apply", str(data / "calibrator.json"), "--out", str(out / "new.json"))
    ),
)
DIAGRAMS: Way = lambda data, out: calibrate(data, out, "--diagrams", str(out))  # noqa: E731
KITTI_WAYS: tuple[Way, ...] = (read_kitti, create_infos)


def in_process(job: Callable[[], int], log: Path, limit: float) -> int | None:
    """The exit status of a function in a forked process, None where it ran out of time."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            status = job()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def verdict(status: int | None, output: str, data: Path, out: Path) -> str:
    """What kind of end that is."""
    if status is None:
        return "hang"
    if status < 0:
        return f"killed by signal {-status}"
    if "Traceback" in output or status == 1:
        return "traceback"
    if "Warning" in output:
        return "warning"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if status == 0 and errors:
        return "error with status 0"
    if status not in (0, 2):
        return f"status {status}"
    if status == 2:
        # Nothing may come after the sentence, such as the rest of a sentence of two lines.
        if len(errors) != 1 or not output.endswith(f"{errors[0]}\n"):
            return "not one sentence"
        if str(data) not in errors[0]:
            return "a sentence that names no file"
    return _left(status, out) or ("sentence" if status else "success")


def _left(status: int, out: Path) -> str:
    """What is wrong with the files that were written."""
    files = sorted(file for file in out.rglob("*") if file.is_file())
    if any(".part" in file.name or file.name.startswith(".") for file in files):
        return "half-written output"
    if status == 2 and files:
        return "output beside an error"
    try:
        for file in files:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".pkl":
                pickle.loads(file.read_bytes())  # written by the process before
    except Exception as error:
        return f"unreadable output: {error!r}"
    return ""


def run_case(number: int, seed: int, sources: dict[str, Path], folder: Path) -> Result:
    """Make a data set, damage it, have it read."""
    rng = random.Random(f"{seed} {number}")
    kind = "coco" if number % 2 else "kitti"
    data, out, log = folder / "data", folder / "out", folder / "log"
    linked_copy(sources[kind], data)
    out.mkdir()
    mutations = [mutate(rng, data) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    way = rng.choice(COCO_WAYS if kind == "coco" else KITTI_WAYS)
    if kind == "coco" and rng.random() < 0.02:  # they are slow
        way = DIAGRAMS
    began = time.monotonic()
    status = in_process(partial(way, data, out), log, LIMIT)
    seconds = time.monotonic() - began
    output = log.read_text(encoding="utf-8", errors="replace")
    return Result(number, verdict(status, output, data, out), mutations, output, seconds)


CONFIGS = {"coco": "retinanet_poly1.py", "kitti": "pointpillars_poly1_kitti.py"}


def command(kind: str, data: Path, out: Path, checkpoint: Path | None) -> list[str]:
    """Train for an epoch, or test a checkpoint."""
    name = "train" if checkpoint is None else "test"
    arguments = [sys.executable, str(ROOT / "tools" / f"{name}.py"), f"configs/{CONFIGS[kind]}"]
    if checkpoint is not None:
        arguments.append(str(checkpoint))
    return [
        *(*arguments, "--data", str(data), "--profile", "tiny", "--work-dir", str(out)),
        *("--cfg-options", "train_cfg.max_epochs=1"),
    ]


def run_training(
    number: int, seed: int, sources: dict[str, Path], folder: Path, checkpoints: dict[str, Path]
) -> Result:
    """The same through the command line: even pairs train, odd ones test."""
    rng = random.Random(f"{seed} training {number}")
    kind = "coco" if number % 2 else "kitti"
    data, out = folder / "data", folder / "out"
    linked_copy(sources[kind], data)
    out.mkdir()
    pristine = kind not in checkpoints
    mutations = [] if pristine else [mutate(rng, data) for _ in range(rng.choice([1, 1, 2]))]
    checkpoint = None if pristine or number // 2 % 2 else checkpoints[kind]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command(kind, data, out, checkpoint),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TRAINING_LIMIT,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = None, str(error.output)
    found = verdict(status, output, data, folder / "nothing")
    if pristine and found == "success":
        checkpoints[kind] = shutil.copyfile(out / "epoch_1.pth", folder.with_name(f"{kind}.pth"))
    return Result(number, found, mutations, output, time.monotonic() - began)


def main(argv: list[str] | None = None) -> int:
    """Run the cases; returns 1 where one did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--trainings", type=int, default=0, help="more, through the command line")
    parser.add_argument("--seed", type=int, default=0, help="of all mutations")
    parser.add_argument("--coco", type=Path, metavar="DIR", help="default: digit scenes")
    parser.add_argument("--kitti", type=Path, metavar="DIR", help="default: simulated scans")
    parser.add_argument("--only", type=int, metavar="N", help="this case alone, with its output")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files of --only there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the processes fork
    began = time.monotonic()
    results = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(args.keep or name)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            sources = {
                "coco": small_coco(args.coco, place / "sources" / "coco"),
                "kitti": small_kitti(args.kitti, place / "sources" / "kitti"),
            }
        for kind, ways in (("coco", (*COCO_WAYS, DIAGRAMS)), ("kitti", KITTI_WAYS)):
            for number, way in enumerate(ways):
                out = place / f"{kind}_{number}"
                out.mkdir()
                log = out.with_suffix(".log")
                if in_process(partial(way, sources[kind], out), log, LIMIT) != 0:
                    print(f"{kind}: what is undamaged fails: {log.read_text()}")
                    return 1
        for number in range(args.cases) if args.only is None else [args.only]:
            folder = place / str(number)
            results.append(run_case(number, args.seed, sources, folder))
            _say(results[-1], folder, everything=args.only is not None)
            if args.keep is None:
                shutil.rmtree(folder)
        checkpoints: dict[str, Path] = {}
        for number in range(args.trainings):
            folder = place / f"training_{number}"
            results.append(run_training(number, args.seed, sources, folder, checkpoints))
            _say(results[-1], folder, everything=False)
            shutil.rmtree(folder)
    counts = Counter(result.kind for result in results)
    slowest = max(result.seconds for result in results)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    minutes = (time.monotonic() - began) / 60
    print(f"{len(results)} cases in {minutes:.1f} minutes, the slowest {slowest:.1f} s")
    return 0 if counts.keys() <= {"success", "sentence"} else 1


def _say(result: Result, folder: Path, *, everything: bool) -> None:
    if everything or result.kind not in ("success", "sentence"):
        print(f"case {result.number}: {result.kind}; {'; '.join(result.mutations)}")
        print("  " + result.output[-2000:].replace("\n", "\n  "), flush=True)


if __name__ == "__main__":
    sys.exit(main())
