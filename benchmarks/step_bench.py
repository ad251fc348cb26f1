"""Time of a whole training step of the demo with several losses, side by side.

    python benchmarks/step_bench.py
    python benchmarks/step_bench.py --whole mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py

The demo's RetinaNet is built once for each loss, from the same weights, and trained on the same
batches in turns: a step of each, again and again, in another order each turn. Reading the pictures
is not part of a step. The figure is the median over the turns, and beside it the median of the
ratio to the first loss in the same turn.

With ``--whole`` a stock config is measured as it is and with its classification losses swapped for
their Poly-1 forms, on random pictures with random objects. A step is forward, backward and the
update. Then the calls that the losses got in it are made once more on their own, with the gradient
of the logits: that is the part of the step that a faster loss could save.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from polyfocal.adapters import prepare
from polyfocal.experiments.request import Request
from polyfocal.swapping import find_losses, swap

LOSSES = {
    "mmdet FocalLoss": {"type": "mmdet.FocalLoss", "use_sigmoid": True},
    "polyfocal FocalLoss": {"type": "polyfocal.FocalLoss", "use_sigmoid": True},
    "polyfocal Poly1FocalLoss": {
        "type": "polyfocal.Poly1FocalLoss",
        "use_sigmoid": True,
        "epsilon": 1.0,
    },
}


def whole(config: str, size: tuple[int, int], depth: int, turns: int) -> None:
    """A step of a stock detector, and what its classification losses take of it."""
    MMLogger.get_current_instance().setLevel("ERROR")
    stock = get_config(config)
    models: dict[str, Any] = {}
    calls: dict[str, list[Any]] = {}
    for name, cfg in (("stock", stock), ("poly-1", swap(stock))):
        model_cfg = copy.deepcopy(cfg.model)
        if depth != model_cfg.backbone.depth:
            model_cfg.backbone.update(depth=depth, style="pytorch")
            model_cfg.neck.in_channels = [c // 4 for c in model_cfg.neck.in_channels]
        model_cfg.backbone.init_cfg = None
        torch.manual_seed(0)
        model = models[name] = MODELS.build(model_cfg).train()
        model.init_weights()
        calls[name] = []
        for found in find_losses(model_cfg):
            head = model
            for key in found.path:
                head = head[key] if isinstance(key, int) else getattr(head, key)
            getattr(head, found.name).register_forward_pre_hook(
                lambda loss, args, kwargs, seen=calls[name]: seen.append((loss, args, kwargs)),
                with_kwargs=True,
            )
    torch.manual_seed(1)
    data = demo_mm_inputs(1, [[3, *size]], num_items=[7], num_classes=80, with_mask=True)
    steps: dict[str, list[float]] = {name: [] for name in models}
    alone: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    for turn in range(turns + 1):
        for name in order.sample(list(models), len(models)):
            model = models[name]
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
            calls[name].clear()
            start = time.perf_counter()
            total, _ = model.parse_losses(
                model(**model.data_preprocessor(copy.deepcopy(data), True), mode="loss")
            )
            total.backward()
            optimizer.step()
            seconds = time.perf_counter() - start
            spent = 0.0
            for loss, args, kwargs in list(calls[name]):
                logits = args[0].detach().requires_grad_()
                start = time.perf_counter()
                value = loss(logits, *args[1:], **kwargs)
                torch.autograd.grad(value.sum(), logits)
                spent += time.perf_counter() - start
            if turn >= 1:  # the first one compiles and fills caches
                steps[name].append(seconds)
                alone[name].append(spent)
    pixels = f"{size[0]} x {size[1]}"
    print(f"{config}, ResNet-{depth}, one picture of {pixels}, {torch.get_num_threads()} threads\n")
    print("| losses | ms per step | ms in the losses | part of the step |\n|---|---|---|---|")
    for name in models:
        step, spent = statistics.median(steps[name]), statistics.median(alone[name])
        print(f"| {name} | {step * 1e3:.0f} | {spent * 1e3:.2f} | {100 * spent / step:.2f} % |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=60, help="steps of each (default 60)")
    parser.add_argument("--config", default="configs/retinanet_poly1.py")
    parser.add_argument("--whole", metavar="CONFIG", help="a stock config, measured as it is")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), help="of its picture")
    parser.add_argument("--depth", type=int, default=50, help="of its ResNet (18 or 50)")
    arguments = parser.parse_args()
    register_all_modules()
    if arguments.whole:
        whole(arguments.whole, arguments.size, arguments.depth, arguments.turns)
        return
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
