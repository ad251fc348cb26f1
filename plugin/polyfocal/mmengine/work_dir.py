"""Reads back what a training left in its work directory: settings, log, evaluations, detections.

Whenever a training starts or continues, MMEngine makes a folder in the work directory, named by the
time. Together the logs of these folders describe the training, without the parts that a resume
repeated.
"""

import json
import re
from pathlib import Path
from typing import Any

from mmengine.config import Config

from polyfocal.errors import UserError
from polyfocal.experiments.trained import TrainedRun

_NOT_MEASURED = ("time", "data_time", "step", "memory")


def read_trained_run(folder: str | Path) -> TrainedRun:
    """Read a work directory.

    Raises:
        UserError: There is no such directory, the training has not finished, or nothing was
            evaluated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no work directory {folder}.")
    records: list[dict[str, Any]] = []
    config_file = None
    for log in sorted(folder.glob("*/vis_data/scalars.json")):
        part = _records(log)
        first = next((record["iter"] for record in part if _is_training(record)), None)
        if first is not None:
            config_file = log.with_name("config.py")
            # A new start leaves nothing of an earlier one. A resume trains again from here on.
            again = (n for n, r in enumerate(records) if _is_training(r) and r["iter"] >= first)
            del records[0 if _is_new(config_file) else next(again, len(records)) :]
        records += part
    if config_file is None:
        raise UserError(
            f"{folder} is not the work directory of a training: there is no log of one in "
            f"{folder / '*' / 'vis_data' / 'scalars.json'}."
        )
    try:
        config = Config.fromfile(config_file)
        train_cfg, _ = config.train_cfg, config.val_dataloader.dataset
    except Exception as error:  # a config is a program: it can fail in any way
        raise UserError(f"{config_file} cannot be read as a training's config: {error}.") from error
    training = [record for record in records if _is_training(record)]
    evaluations = [_evaluation(record) for record in records if _is_evaluation(record)]
    unit = "epoch" if train_cfg.get("max_epochs") is not None else "iteration"
    end = train_cfg.get("max_epochs") or train_cfg.get("max_iters")
    done = evaluations[-1]["step"] if evaluations else 0
    if done < end:
        last = (
            f"its last evaluation is of {unit} {done:g} of {end}" if done else "not evaluated yet"
        )
        raise UserError(
            f"{folder} has not finished: {last}; go on with polyfocal train --resume and the "
            "options it was started with."
        )
    return TrainedRun(folder, config.to_dict(), training, evaluations)


def short_names(measured: dict[str, Any]) -> dict[str, float]:
    """Numbers by the shortest ends of their names that tell them apart.

    ``coco/bbox_mAP`` becomes ``bbox_mAP``. ``Waymo metric/Vehicle/L1 mAP`` becomes
    ``Vehicle/L1 mAP`` if another class has the same number.
    """
    parts = {name: name.split("/") for name, value in measured.items() if _is_number(value)}

    def end(name: str, length: int) -> str:
        return "/".join(parts[name][-length:])

    short = {}
    for name in parts:
        length = 1
        others = [other for other in parts if other != name]
        while any(end(other, length) == end(name, length) for other in others):
            length += 1
        short[end(name, length)] = float(measured[name])
    return short


def _is_new(config_file: Path) -> bool:
    """Whether a start was no resume, as the config that MMEngine leaves of it says."""
    try:
        text = config_file.read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^resume = False$", text, re.MULTILINE) is not None


def _records(log: Path) -> list[dict[str, Any]]:
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a killed training may leave half a line
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _is_training(record: dict[str, Any]) -> bool:
    return "iter" in record and "loss" in record


def _is_evaluation(record: dict[str, Any]) -> bool:
    return "iter" not in record and any(
        "/" in name and not name.startswith("curvature/") for name in record
    )


def _evaluation(record: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in record.items() if name not in _NOT_MEASURED}
    return {**short_names(numbers), "step": record.get("step", 0)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
