"""What pyproject.toml cannot say: configs/ goes into the wheel, from where it is, as package data.

An editable installation needs no copy: polyfocal.shipped finds the clone's own folder.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).resolve().parent / "configs"


class BuildPy(build_py):
    """The package's modules and data, then the configs."""

    def run(self) -> None:
        """Build, and copy the configs where they are not read in place."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "polyfocal" / "configs"
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
            hidden = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(CONFIGS, target, ignore=hidden)


setup(cmdclass={"build_py": BuildPy})
