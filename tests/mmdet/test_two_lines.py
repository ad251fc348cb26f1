"""The README's configs: a stock config of MMDetection with two lines added trains."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from prepared import prepare_experiment

from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.mmengine.runs import train

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
CONFIGS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", README, flags=re.DOTALL))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_digit_scenes(
        tmp_path_factory.mktemp("data") / "set", DigitScenes(num_train=8, num_val=2)
    )


def test_the_readme_shows_three_of_them():
    assert sorted(CONFIGS) == ["fcos", "mask_rcnn", "retinanet"]
    # a base, and two lines
    assert all(len(text.strip().splitlines()) == 3 for text in CONFIGS.values())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_two_lines_train(name, pictures, tmp_path):
    config = tmp_path / f"{name}.py"
    config.write_text(CONFIGS[name], encoding="utf-8")
    options = {"train_cfg.max_epochs": 1, "work_dir": str(tmp_path / "work")}
    for loader in ("train", "val", "test"):
        options |= {
            f"{loader}_dataloader.{key}": value
            for key, value in (("num_workers", 0), ("persistent_workers", False))
        }
    experiment = prepare_experiment(config, data=pictures, profile="tiny", options=options)
    train(experiment)
    assert (tmp_path / "work" / "epoch_1.pth").is_file()
