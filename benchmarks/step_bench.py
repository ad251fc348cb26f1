"""Time of a whole training step of the demo with several losses, side by side.

    python benchmarks/step_bench.py

The demo's RetinaNet is built once for each loss, from the same weights, and trained on the same
batches in turns: a step of each, again and again, in another order each turn. Reading the pictures
is not part of a step. The figure is the median over the turns, and beside it the median of the
ratio to the first loss in the same turn.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from polyfocal.adapters import prepare
from polyfocal.experiments.request import Request

LOSSES = {
    "mmdet FocalLoss": {"type": "mmdet.FocalLoss", "use_sigmoid": True},
    "polyfocal FocalLoss": {"type": "polyfocal.FocalLoss", "use_sigmoid": True},
    "polyfocal Poly1FocalLoss": {
        "type": "polyfocal.Poly1FocalLoss",
        "use_sigmoid": True,
        "epsilon": 1.0,
    },
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=60, help="steps of each (default 60)")
    parser.add_argument("--config", default="configs/retinanet_poly1.py")
    arguments = parser.parse_args()
    register_all_modules()
    cfg = Request(prepare, arguments.config, demo=True).prepare().config
    torch.manual_seed(0)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    batches = [batch for batch, _ in zip(loader, range(8), strict=False)]
    models, optimizers = {}, {}
    weights = None
    for name, loss in LOSSES.items():
        model_cfg = copy.deepcopy(cfg.model)
        model_cfg.bbox_head.loss_cls = ConfigDict(loss)
        model = MODELS.build(model_cfg)
        if weights is None:
            model.init_weights()
            weights = copy.deepcopy(model.state_dict())
        model.load_state_dict(weights)
        models[name] = model.train()
        optimizers[name] = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.turns + 3):
        for name in order.sample(list(models), len(models)):
            batch = copy.deepcopy(batches[turn % len(batches)])
            start = time.perf_counter()
            models[name].train_step(batch, optimizers[name])
            if turn >= 3:  # the first ones compile and fill caches
                times[name].append(time.perf_counter() - start)
    first = times[next(iter(times))]
    print("| loss | ms per step | ratio |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, first, strict=True))
        print(f"| {name} | {statistics.median(values) * 1e3:.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
