"""The check of a picture against the code that loads it: MMDetection's, Detectron2's rule."""

import io
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from polyfocal.data import pictures
from polyfocal.data.pictures import check_pictures, load_with_opencv, load_with_pillow

WIDTH, HEIGHT = 80, 60
RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
TWELVE_BITS = Image.fromarray(RNG.integers(0, 4096, (HEIGHT, WIDTH)).astype(np.uint16))
REALS = Image.fromarray(RNG.random((HEIGHT, WIDTH)).astype(np.float32))


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def late_exif(png: bytes) -> bytes:
    """A PNG whose orientation stands behind its pixels."""
    end = png.index(b"IEND") - 4
    return png[:end] + chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")) + png[end:]


def text_exif(png: bytes, late: bool) -> bytes:
    """A PNG whose orientation stands in a text, as ImageMagick wrote it."""
    content = exif(8).tobytes()
    text = f"\nexif\n{len(content):8}\n{content.hex()}\n".encode()
    at = png.index(b"IEND") - 4 if late else png.index(b"IDAT") - 4
    made = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    return png[:at] + made + png[at:]


def sixteen_bit_colour() -> bytes:
    """A PNG of 16 bits a sample in colour, which Pillow reads and does not write."""
    rows = RNG.integers(0, 4096, (HEIGHT, WIDTH, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


PNG = encoded(COLOURS, "PNG")
PICTURES = {
    "plain.jpg": encoded(COLOURS, "JPEG"),
    "grey.jpg": encoded(COLOURS.convert("L"), "JPEG"),
    "cmyk.jpg": encoded(COLOURS.convert("CMYK"), "JPEG"),
    **{f"turned_{i}.jpg": encoded(COLOURS, "JPEG", exif=exif(i)) for i in range(10)},
    "plain.png": PNG,
    "palette.png": encoded(COLOURS.convert("P"), "PNG"),
    "palette_alpha.png": encoded(COLOURS.convert("P"), "PNG", transparency=3),
    "grey_alpha.png": encoded(COLOURS.convert("LA"), "PNG"),
    "alpha.png": encoded(COLOURS.convert("RGBA"), "PNG"),
    "bit.png": encoded(COLOURS.convert("1"), "PNG"),
    "animated.png": encoded(COLOURS, "PNG", save_all=True, append_images=[COLOURS.rotate(180)]),
    "twelve_bits.png": encoded(TWELVE_BITS, "PNG"),
    "sixteen_bit_colour.png": sixteen_bit_colour(),
    **{f"turned_{i}.png": encoded(COLOURS, "PNG", exif=exif(i)) for i in (1, 3, 6, 8)},
    "late.png": late_exif(PNG),
    "text.png": text_exif(PNG, late=False),
    "late_text.png": text_exif(PNG, late=True),
    "plain.webp": encoded(COLOURS, "WEBP"),
    "turned.webp": encoded(COLOURS, "WEBP", exif=exif(6)),
    "animated.webp": encoded(COLOURS, "WEBP", save_all=True, append_images=[COLOURS.rotate(9)]),
    "plain.gif": encoded(COLOURS, "GIF"),
    "animated.gif": encoded(COLOURS, "GIF", save_all=True, append_images=[COLOURS.rotate(180)]),
    "plain.bmp": encoded(COLOURS, "BMP"),
    "plain.tga": encoded(COLOURS, "TGA"),
    "plain.pcx": encoded(COLOURS, "PCX"),
    "plain.ico": encoded(COLOURS, "ICO", sizes=[(WIDTH, HEIGHT)]),
    "plain.tif": encoded(COLOURS, "TIFF"),
    "turned.tif": encoded(COLOURS, "TIFF", exif=exif(6)),
    "cmyk.tif": encoded(COLOURS.convert("CMYK"), "TIFF"),
    "twelve_bits.tif": encoded(TWELVE_BITS, "TIFF"),
    "reals.tif": encoded(REALS, "TIFF"),
    "plain.ppm": encoded(COLOURS, "PPM"),
    "reals.pfm": encoded(REALS, "PPM"),
    "plain.jp2": encoded(COLOURS, "JPEG2000"),
    "plain.sgi": encoded(COLOURS, "SGI"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    for name, content in PICTURES.items():
        (place / name).write_bytes(content)
    return place


def mmdet_loads(path: Path) -> np.ndarray | None:
    """What MMDetection's transform makes of a picture, None where a training would stop."""
    transforms = pytest.importorskip("mmcv.transforms")
    try:
        found = transforms.LoadImageFromFile()({"img_path": str(path)})["img"]
    except Exception:  # the transform's assertion, OpenCV's error
        return None
    return found if found.ndim == 3 else None


def detectron2_loads(path: Path) -> np.ndarray:
    """Pillow, turned upright, in Detectron2's order of the channels."""
    with Image.open(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[:, :, ::-1]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_passes_where_mmdetection_loads_it_in_that_size(folder: Path, name: str) -> None:
    path, sizes = folder / name, [(WIDTH, HEIGHT), (HEIGHT, WIDTH), (WIDTH, HEIGHT + 1)]
    loaded = mmdet_loads(path)
    found = check_pictures([path] * 3, sizes, load_with_opencv)
    passed = [size for size, one in zip(sizes, found, strict=True) if not one.problem]
    if loaded is None:
        assert passed == [] and all(str(path) in one.problem for one in found)
        return
    assert passed == [loaded.shape[1::-1]]
    np.testing.assert_array_equal(load_with_opencv(path), loaded)
    dark = [one.remark for one in found if not one.problem and one.remark]
    assert bool(dark) == (loaded.max() < 16)


# Pillow turns a TIFF when it loads it, and Detectron2 once more: see test_the_rule_is_detectron2s.
@pytest.mark.parametrize("name", sorted(PICTURES.keys() - {"turned.tif"}))
def test_a_picture_passes_where_detectron2_loads_it_in_that_size(folder: Path, name: str) -> None:
    path, sizes = folder / name, [(WIDTH, HEIGHT), (HEIGHT, WIDTH), (WIDTH, HEIGHT + 1)]
    loaded = detectron2_loads(path)
    found = check_pictures([path] * 3, sizes, load_with_pillow)
    passed = [size for size, one in zip(sizes, found, strict=True) if not one.problem]
    assert passed == [loaded.shape[1::-1]]
    np.testing.assert_array_equal(load_with_pillow(path), loaded)


@pytest.mark.parametrize("name", PICTURES)
def test_the_rule_is_detectron2s(folder: Path, name: str) -> None:
    utils = pytest.importorskip("detectron2.data.detection_utils")
    path = folder / name
    np.testing.assert_array_equal(load_with_pillow(path), utils.read_image(str(path), "BGR"))


def test_the_sentences(folder: Path) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV, which comes with mmcv")

    def problem(name: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
        (found,) = check_pictures([folder / name], [size], load_with_opencv)
        assert "\n" not in found.problem
        return found.problem.removeprefix(f"picture {folder / name} ")

    assert problem("turned_6.png") == (
        "has 60x80 pixels as it is loaded, with its EXIF orientation 6, but its entry says 80x60"
    )
    assert problem("plain.tga") == (
        "cannot be read: OpenCV does not read it (a TGA file of mode RGB), convert it to PNG or "
        "JPEG of 8 bits"
    )
    assert problem("reals.pfm").startswith("is loaded as an array of shape (60, 80), not")
    (found,) = check_pictures([folder / "twelve_bits.png"], [(80, 60)], load_with_opencv)
    assert found.remark.endswith("its brightest value is 15 of 255")
    (folder / "other").mkdir(exist_ok=True)
    assert problem("other") == "cannot be read: it is a folder"
    assert problem("a\\b.png") == (
        "is missing: its file_name has backslashes, write / in their place"
    )


@pytest.mark.parametrize("where", ["OpenCV 4", "OpenCV 5"])
def test_opencv_is_silent_meanwhile(where: str, tmp_path: Path, monkeypatch) -> None:
    def set_level(level: int) -> int:
        levels.append(level)
        return levels[-2]

    def load(path: Path) -> np.ndarray:
        during.append(levels[-1])
        raise OSError

    levels, during = [3], []
    log = SimpleNamespace(setLogLevel=set_level)
    if where == "OpenCV 4":
        cv2 = SimpleNamespace(utils=SimpleNamespace(), setLogLevel=set_level)
    else:
        cv2 = SimpleNamespace(utils=SimpleNamespace(logging=log))
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    (tmp_path / "bytes").write_bytes(b"no picture")
    check_pictures([tmp_path / "bytes"], [(WIDTH, HEIGHT)], load)
    assert during == [0] and levels == [3, 0, 3]


def test_plain_pictures_are_not_decoded(folder: Path) -> None:
    def load(path: Path) -> np.ndarray:
        asked.append(path.name)
        return load_with_opencv(path)

    asked: list[str] = []
    names = [name for name in PICTURES if "turned" not in name]
    check_pictures([folder / name for name in names], [(WIDTH, HEIGHT)] * len(names), load)
    plain = {"plain.jpg", "grey.jpg", "plain.png", "palette.png", "palette_alpha.png", "bit.png"}
    assert set(names) - set(asked) == plain | {"grey_alpha.png", "alpha.png"}


def test_a_picture_too_large_for_pillow_is_read(tmp_path: Path, monkeypatch, recwarn) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV, which comes with mmcv")
    path = tmp_path / "large.png"
    path.write_bytes(PNG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 3)  # it refuses twice as many
    (found,) = check_pictures([path], [(WIDTH, HEIGHT)], load_with_opencv)
    assert found == pictures.Finding(size=(WIDTH, HEIGHT))
    (found,) = check_pictures([path], [(WIDTH, HEIGHT)], load_with_pillow)
    assert "cannot be read: Image size" in found.problem
    assert "exceeds limit" in found.problem and found.problem.endswith("attack; make it smaller")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)  # it warns
    found = check_pictures([path], [(WIDTH, HEIGHT)], load_with_pillow)
    assert found == [pictures.Finding(size=(WIDTH, HEIGHT))]
    assert not recwarn.list
