"""The configs that come with polyfocal: ``configs/`` of a clone, a folder of the installed package.

There is one copy of them: ``setup.py`` puts that folder into the wheel.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

CONFIGS = next(
    (found for found in (_HERE / "configs", _HERE.parents[1] / "configs") if found.is_dir()),
    _HERE / "configs",
)
"""The folder of the shipped configs; that of the studies is ``CONFIGS / "studies"``."""


def config_file(name: str) -> str:
    """The file that a person means by a config's name.

    Args:
        name: A file, which comes first, or a shipped config: ``retinanet_poly1``,
            ``classification/focal``, or as in a clone ``configs/retinanet_poly1.py``.

    Returns:
        Its path; the name as it is where there is no such config.
    """
    if Path(name).is_file():
        return name
    own = CONFIGS / name.removeprefix("configs/")
    return next(
        (str(file) for file in (own, own.with_name(f"{own.name}.py")) if file.is_file()), name
    )
