"""Where the runs were; they move to polyfocal.mmengine.runs."""

from polyfocal.mmengine.runs import curvature, join_processes, test, train

__all__ = ["curvature", "join_processes", "test", "train"]
