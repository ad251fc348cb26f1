"""An import goes downwards only, also a lazy one or by ``import_module``; there is no circle."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "plugin" / "polyfocal"

# From the top. Rooms of one floor do not import each other.
FLOORS = (
    ("__main__",),
    ("commands",),
    ("registry", "adapters", "doctor"),  # the doors of MMEngine and of the tools; what looks at all
    ("mmdet3d", "swapping"),
    ("mmdet", "classification", "detectron2"),
    ("mmengine",),
    ("experiments",),
    ("coco", "kitti", "calibration", "curvature"),
    ("demo", "features"),
    ("data",),
    ("heads",),
    ("losses",),
    ("ops", "folders", "tables", "distributions", "efficientnet"),
    ("errors", "_torch", "shipped"),
)
FLOOR = {room: len(FLOORS) - height for height, rooms in enumerate(FLOORS) for room in rooms}
# They import what a config names: the registries of frameworks, the module of a class; or what a
# command line does.
ASKS_FOR_ANY = ("swapping.py", "configs.py", "__main__.py")
FRAMEWORKS = ("mmcv", "mmdet", "mmdet3d", "mmengine", "detectron2")


def imports(file):
    """The modules that a file imports anywhere in it, absolute."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports by dots"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                (argument, *_) = node.args
                if file.name in ASKS_FOR_ANY:
                    continue
                assert isinstance(argument, ast.Constant), (
                    f"{file}, line {node.lineno}: {name} of a name that is not written out"
                )
                yield argument.value


def rooms_used(file):
    found = {name.split(".")[1] for name in imports(file) if name.startswith("polyfocal.")}
    return found & FLOOR.keys()


def room_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [file for file in PACKAGE.rglob("*.py") if room_of(file) != "__init__"]


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} == FLOOR.keys()


def test_imports_go_downwards():
    upwards = [
        f"{file.relative_to(PACKAGE)} imports polyfocal.{room}"
        for file in FILES
        for room in sorted(rooms_used(file) - {room_of(file)})
        if FLOOR[room] >= FLOOR[room_of(file)]
    ]
    assert not upwards, "\n".join(upwards)


def test_frameworks_are_imported_by_their_adapters_only():
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in FILES
        if FLOOR[room_of(file)] < FLOOR["mmengine"]
        for name in imports(file)
        if name.split(".")[0] in FRAMEWORKS
    ]
    assert not wrong, "\n".join(wrong)
