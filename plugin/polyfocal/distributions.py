"""Which distributions bring a framework's modules: MMDetection has two lines of the same names."""

from importlib.metadata import PackageNotFoundError, version

from polyfocal.errors import PackageError

# By import name. Distributions of one line overwrite each other's files.
DISTRIBUTIONS = {
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine", "onedl-mmengine-lite"),
    "mmcv": ("mmcv", "mmcv-lite", "mmcv-full", "onedl-mmcv", "onedl-mmcv-lite"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
}


def installed(module: str) -> dict[str, str]:
    """Versions of the installed distributions that bring a module of `DISTRIBUTIONS`, by name."""
    found = {}
    for name in DISTRIBUTIONS[module]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def rivals() -> str | None:
    """A sentence on two distributions of one module, or None where there is one of each.

    Their files are then a mixture of both, in which anything may fail, or silently be the other's.
    """
    for module in DISTRIBUTIONS:
        found = installed(module)
        if len(found) > 1:
            names = " and ".join(f"{name} {number}" for name, number in found.items())
            return (
                f"{names} are both installed, and both bring {module!r}: their files are mixed."
                f" Remove them all, pip uninstall -y {' '.join(found)}, and install one line anew:"
                " docs/install.md"
            )
    return None


def refuse_rivals() -> None:
    """Raises PackageError where two distributions bring one module."""
    sentence = rivals()
    if sentence:
        raise PackageError(sentence)
