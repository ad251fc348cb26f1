"""What a step costs from scratch, fine-tuned and on kept features, in turns in one process.

Each step has its own batch, the data loader's work included, so that the ratio is that of epochs.
The time is the processor's, of this process, which other processes do not change much.

    python benchmarks/freeze_bench.py DIR --steps 10
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from polyfocal.adapters import prepare
from polyfocal.experiments.request import Request
from polyfocal.mmdet.frozen import FrozenFeaturesHook, _Reader


def stepper(request: Request, kept: Path) -> Callable[[], float]:
    """A training, of which each call does a step and returns its seconds."""
    cfg = request.prepare().config
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
        model.init_weights()
        model.train()
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    reader = None
    if request.freeze:
        reader = _Reader(FrozenFeaturesHook(str(kept)).store, model, loader.dataset)
        start = time.process_time()
        reader.fill()
        print(f"features: {time.process_time() - start:.1f} s of the processor")

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    source = batches()

    def step() -> float:
        start = time.process_time()
        batch = next(source)
        if reader is not None:
            reader.give(batch["data_samples"])
        model.train_step(batch, optimizer)
        return time.process_time() - start

    return step


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a COCO-format folder")
    parser.add_argument("--config", default="configs/retinanet_poly1.py")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {name: {"profile": name} for name in ("tiny", "small")}
    whole = {"model.backbone.frozen_stages": -1}
    rows["small, all of it trained"] = {"profile": "small", "options": whole}
    rows["small --freeze"] = {"profile": "small", "freeze": True}
    with tempfile.TemporaryDirectory() as kept:
        requests = {
            name: Request(prepare, args.config, data=args.data, **settings)
            for name, settings in rows.items()
        }
        steps = {name: stepper(request, Path(kept)) for name, request in requests.items()}
        found: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(args.steps + 1):
            for name, step in steps.items():
                seconds = step()
                if number:  # the first warms up
                    found[name].append(seconds)
    middle = {name: median(seconds) for name, seconds in found.items()}
    for name, seconds in middle.items():
        print(
            f"{name:25} {seconds:.3f} s a step ({min(found[name]):.3f} to {max(found[name]):.3f}), "
            f"{seconds / middle['small --freeze']:.1f} times small --freeze"
        )


if __name__ == "__main__":
    main()
