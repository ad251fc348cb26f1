"""Built-in data: generated in seconds, so that everything can be tried without a download."""

from polyfocal.demo.digit_scenes import DigitScenes, write_digit_scenes

__all__ = ["DigitScenes", "write_digit_scenes"]
