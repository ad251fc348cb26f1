"""Built-in data: generated in seconds, so that everything can be tried without a download."""

from polyfocal.demo.digit_scenes import DEMO_FOLDER, DigitScenes, write_digit_scenes

__all__ = ["DEMO_FOLDER", "DigitScenes", "write_digit_scenes"]
