"""Time and memory of the losses beside every peer that is installed.

    python benchmarks/loss_bench.py                       # every shape, a table on the terminal
    python benchmarks/loss_bench.py --out docs/performance --shapes many few

Rules of measuring:

- A step is forward, sum over a fixed normaliser, and the gradient of the logits, taken as a layer
  before them would be given it (``torch.autograd.grad``): a leaf's ``backward()`` copies a gradient
  that somebody else still holds.
- All the candidates of a shape run in one process, in turns: one step of each, again and again. The
  figure is the median over the turns, so that what else the machine does hits all alike. Each turn
  has another order, so that none always runs after the same neighbour.
- A peer that wants one-hot targets makes them inside the step: a head has labels.
- The floors are taken in the same turns: one sigmoid and one softplus of the logits, each into
  memory of its own; one copy of the logits into memory that is there; the same into new memory,
  which every gradient needs.
- Saved is what autograd keeps for backward; peak is the most that was allocated at one time during
  the step beyond what was there before it, the gradient included. Both are given as multiples of
  the logits.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import polyfocal
from polyfocal.losses import (
    FocalLoss,
    Poly1CrossEntropyLoss,
    Poly1FocalLoss,
    Poly1QualityFocalLoss,
    Poly1VarifocalLoss,
    functional,
)
from polyfocal.ops import use_path


class Shape(NamedTuple):
    """A classification loss as a head calls it."""

    rows: int
    columns: int
    sigmoid: bool
    positives: int
    what: str
    quality: bool = False  # positives with the overlap of their box


SHAPES = {
    "many": Shape(200_000, 80, True, 300, "200,000 anchors, COCO"),
    "few": Shape(20_000, 80, True, 100, "20,000 anchors, COCO"),
    "retinanet": Shape(201_600, 80, True, 300, "RetinaNet, one picture of 800x1344"),
    "fcos": Shape(22_400, 80, True, 1_500, "FCOS, one picture of 800x1344"),
    "pointpillars": Shape(321_408, 3, True, 200, "PointPillars on KITTI, one scan"),
    "gfl": Shape(22_400, 80, True, 300, "GFL or VFNet, one picture of 800x1344", quality=True),
    "dino": Shape(900, 80, True, 20, "DINO, 900 queries"),
    "roi": Shape(512, 81, False, 128, "Faster R-CNN, COCO"),
    "lvis": Shape(512, 1_204, False, 128, "Faster R-CNN, LVIS"),
}

Loss = Callable[[Tensor, Tensor], Tensor]


class Candidate(NamedTuple):
    """A loss, and what ``polyfocal.ops`` is told while it runs."""

    loss: Loss
    path: str = "auto"


def _one_hot(target: Tensor, columns: int) -> Tensor:
    return F.one_hot(target, columns + 1)[:, :columns].float()


def sigmoid_candidates(shape: Shape) -> dict[str, Candidate]:
    """Every way to the sigmoid focal loss that is installed here, ours first."""
    n = float(shape.positives)
    focal = FocalLoss(use_sigmoid=True)
    poly1 = Poly1FocalLoss(epsilon=1.0, use_sigmoid=True)
    cyclical: dict[str, Any] = {
        "use_sigmoid": True,
        "alpha": 0.25,
        "gamma_hc": 3.0,
        "gamma_lc": 2.0,
    }
    found: dict[str, Loss] = {
        "polyfocal focal": lambda x, y: focal(x, y, avg_factor=n),
        "polyfocal poly-1": lambda x, y: poly1(x, y, avg_factor=n),
        "polyfocal cyclical": lambda x, y: functional.cyclical_focal_loss(
            x, y, progress=0.1, avg_factor=n, **cyclical
        ),
    }
    if mmdet := _import("mmdet.models.losses"):
        loss = mmdet.FocalLoss(use_sigmoid=True)
        found["mmdet FocalLoss"] = lambda x, y: loss(x, y, avg_factor=n)
    if fvcore := _import("fvcore.nn"):
        found["fvcore sigmoid_focal_loss"] = lambda x, y: (
            fvcore.sigmoid_focal_loss(x, _one_hot(y, x.shape[1]), 0.25, 2.0, "sum") / n
        )
    if torchvision := _import("torchvision.ops"):
        found["torchvision sigmoid_focal_loss"] = lambda x, y: (
            torchvision.sigmoid_focal_loss(x, _one_hot(y, x.shape[1]), 0.25, 2.0, "sum") / n
        )
    if kornia := _import("kornia.losses"):
        found["kornia binary_focal_loss"] = lambda x, y: (
            kornia.binary_focal_loss_with_logits(
                x, _one_hot(y, x.shape[1]), alpha=0.25, gamma=2.0, reduction="sum"
            )
            / n
        )
    if monai := _import("monai.losses"):
        monai_loss = monai.FocalLoss(
            gamma=2.0, alpha=0.25, use_softmax=False, include_background=True, reduction="sum"
        )
        found["monai FocalLoss"] = lambda x, y: monai_loss(x, _one_hot(y, x.shape[1])) / n
    candidates = {name: Candidate(loss) for name, loss in found.items()}
    for path in ("blocked", "composed"):
        for kind in ("focal", "poly-1"):
            candidates[f"polyfocal {kind}, {path}"] = Candidate(found[f"polyfocal {kind}"], path)
    return candidates


def quality_candidates(shape: Shape, device: str) -> dict[str, Candidate]:
    """Quality focal and varifocal, of labels with the overlaps of the boxes, ours first."""
    n = float(shape.positives)
    overlaps = torch.rand(shape.rows, generator=torch.Generator().manual_seed(1)).to(device)
    quality = Poly1QualityFocalLoss(epsilon=0.0, use_sigmoid=True)
    poly1 = Poly1QualityFocalLoss(epsilon=1.0, use_sigmoid=True)
    varifocal = Poly1VarifocalLoss(epsilon=0.0, use_sigmoid=True)
    found: dict[str, Loss] = {
        "polyfocal quality focal": lambda x, y: quality(x, (y, overlaps), avg_factor=n),
        "polyfocal poly-1 quality focal": lambda x, y: poly1(x, (y, overlaps), avg_factor=n),
        "polyfocal varifocal": lambda x, y: varifocal(x, (y, overlaps), avg_factor=n),
        # VFNet's head makes the matrix.
        "polyfocal varifocal, of a matrix": lambda x, y: varifocal(
            x, _one_hot(y, x.shape[1]) * overlaps[:, None], avg_factor=n
        ),
    }
    if mmdet := _import("mmdet.models.losses"):
        peer, vfl = mmdet.QualityFocalLoss(use_sigmoid=True), mmdet.VarifocalLoss(use_sigmoid=True)
        found["mmdet QualityFocalLoss"] = lambda x, y: peer(x, (y, overlaps), avg_factor=n)
        found["mmdet VarifocalLoss"] = lambda x, y: vfl(
            x, _one_hot(y, x.shape[1]) * overlaps[:, None], avg_factor=n
        )
    candidates = {name: Candidate(loss) for name, loss in found.items()}
    for kind in ("quality focal", "varifocal"):
        candidates[f"polyfocal {kind}, composed"] = Candidate(
            found[f"polyfocal {kind}"], "composed"
        )
    return candidates


def softmax_candidates(shape: Shape) -> dict[str, Candidate]:
    """Every way to cross-entropy, Poly-1 and softmax focal that is installed here, ours first."""
    n = float(shape.rows)
    poly1 = Poly1CrossEntropyLoss(epsilon=-1.0)
    focal = FocalLoss(use_sigmoid=False)
    found: dict[str, Loss] = {
        "polyfocal poly-1": lambda x, y: poly1(x, y, avg_factor=n),
        "polyfocal focal": lambda x, y: focal(x, y, avg_factor=n),
        "polyfocal cyclical": lambda x, y: functional.cyclical_focal_loss(
            x, y, progress=0.1, use_sigmoid=False, avg_factor=n
        ),
    }
    found["torch cross_entropy"] = lambda x, y: F.cross_entropy(x, y, reduction="sum") / n
    if mmdet := _import("mmdet.models.losses"):
        loss = mmdet.CrossEntropyLoss(use_sigmoid=False)
        found["mmdet CrossEntropyLoss"] = lambda x, y: loss(x, y, avg_factor=n)
    if kornia := _import("kornia.losses"):
        found["kornia focal_loss"] = lambda x, y: (
            kornia.focal_loss(x, y, alpha=0.25, gamma=2.0, reduction="sum") / n
        )
    if monai := _import("monai.losses"):
        monai_loss = monai.FocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True, reduction="sum")
        found["monai FocalLoss"] = lambda x, y: monai_loss(x, y[:, None]) / n
    candidates = {name: Candidate(loss) for name, loss in found.items()}
    poly_1 = found["polyfocal poly-1"]
    candidates["polyfocal poly-1, composed"] = Candidate(poly_1, "composed")
    return candidates


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # torchvision beside another build of torch fails with a RuntimeError
        return None


@contextmanager
def _told(candidate: Candidate) -> Iterator[None]:
    before = use_path(candidate.path)
    try:
        yield
    finally:
        use_path(before)


def run(candidate: Candidate, logits: Tensor, target: Tensor) -> float:
    """Seconds of one step."""
    with _told(candidate):
        _wait(logits)
        start = time.perf_counter()
        (gradient,) = torch.autograd.grad(candidate.loss(logits, target), logits)
        _wait(logits)
        seconds = time.perf_counter() - start
    del gradient
    return seconds


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def saved_bytes(candidate: Candidate, logits: Tensor, target: Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _told(candidate), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        candidate.loss(logits, target)
    return sum(kept.values())


def peak_bytes(candidate: Candidate, logits: Tensor, target: Tensor) -> int:
    """Most bytes allocated at one time during a step, beyond what was there before."""
    if logits.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(candidate, logits, target)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run(candidate, logits, target)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def floors(logits: Tensor) -> dict[str, Callable[[], object]]:
    """What any loss must do, at the least; see the rules above."""
    x = logits.detach()
    there = torch.empty_like(x)
    return {
        "sigmoid + softplus": lambda: (torch.sigmoid(x), F.softplus(x)),
        "copy": lambda: there.copy_(x),
        "copy into new memory": lambda: x.clone(),
    }


def measure(shape: Shape, turns: int, device: str, dtype: torch.dtype) -> list[dict[str, object]]:
    """A row for each candidate and floor of a shape."""
    generator = torch.Generator().manual_seed(0)
    # Most entries of a detector are confident negatives.
    logits = torch.randn(shape.rows, shape.columns, generator=generator) * 1.5 - 5.0
    background = shape.columns if shape.sigmoid else shape.columns - 1
    target = torch.full((shape.rows,), background)
    chosen = torch.randperm(shape.rows, generator=generator)[: shape.positives]
    target[chosen] = torch.randint(background, (len(chosen),), generator=generator)
    logits = logits.to(device, dtype).requires_grad_()
    target = target.to(device)
    if shape.quality:
        candidates = quality_candidates(shape, device)
    else:
        candidates = sigmoid_candidates(shape) if shape.sigmoid else softmax_candidates(shape)
    floor = floors(logits)
    times: dict[str, list[float]] = {name: [] for name in (*candidates, *floor)}
    order = random.Random(0)
    for turn in range(turns + 2):
        for name in order.sample(list(times), len(times)):
            if name in candidates:
                seconds = run(candidates[name], logits, target)
            else:
                start = time.perf_counter()
                floor[name]()
                _wait(logits)
                seconds = time.perf_counter() - start
            if turn >= 2:  # the first ones compile and fill caches
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    size = logits.numel() * logits.element_size()
    ours = medians[next(iter(candidates))]
    rows = []
    for name, seconds in medians.items():
        row: dict[str, object] = {
            "candidate": name,
            "ms": seconds * 1e3,
            "to_ours": seconds / ours,
            "to_sigmoid_softplus": seconds / medians["sigmoid + softplus"],
            "to_copy": seconds / medians["copy"],
        }
        if name in candidates:
            row["saved"] = saved_bytes(candidates[name], logits, target) / size
            row["peak"] = peak_bytes(candidates[name], logits, target) / size
        rows.append(row)
    return rows


def plot(results: dict[str, list[dict[str, object]]], path: Path) -> None:
    """Bars of the time of each candidate as a multiple of one copy of the logits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 2
    lines = -(-len(results) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(13, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, (name, rows) in zip(axes.flat, results.items(), strict=False):
        shown = [row for row in rows if row["candidate"] != "copy"]
        names = [str(row["candidate"]) for row in shown]
        values = [float(row["ms"]) for row in shown]  # type: ignore[arg-type]
        colors = [
            "#1f77b4"
            if n.startswith("polyfocal")
            else "#999999"
            if "Loss" in n or "_" in n
            else "#2ca02c"
            for n in names
        ]
        axis.barh(names, values, color=colors)
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_title(f"{SHAPES[name].what}: {SHAPES[name].rows:,} x {SHAPES[name].columns}")
        axis.set_xlabel("ms, forward and backward")
        axis.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "polyfocal", "svg.fonttype": "none"}):  # text as text
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def table(name: str, rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    shape = SHAPES[name]
    lines = [
        f"**{name}**: {shape.what}, {shape.rows:,} x {shape.columns},"
        f" {'sigmoid' if shape.sigmoid else 'softmax'}",
        "",
        "| | ms | x ours | x (sigmoid + softplus) | x copy | saved | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = [f"{row[k]:.2f}" if k in row else "" for k in ("saved", "peak")]
        lines.append(
            f"| {row['candidate']} | {row['ms']:.2f} | {row['to_ours']:.2f}"
            f" | {row['to_sigmoid_softplus']:.2f} | {row['to_copy']:.1f}"
            f" | {memory[0]} | {memory[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--turns", type=int, default=15, help="steps of each candidate (default 15)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the logits",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="STEM",
        help="write STEM.csv and STEM.svg, for example docs/performance",
    )
    arguments = parser.parse_args()
    print(
        f"polyfocal {polyfocal.__version__}, torch {torch.__version__}, Python"
        f" {platform.python_version()}, {torch.get_num_threads()} threads, {arguments.device},"
        f" {arguments.dtype}\n"
    )
    results = {}
    for name in arguments.shapes:
        dtype = getattr(torch, arguments.dtype)
        results[name] = measure(SHAPES[name], arguments.turns, arguments.device, dtype)
        print(table(name, results[name]) + "\n", flush=True)
    if arguments.out:
        with arguments.out.with_suffix(".csv").open("w", newline="") as file:
            fields = ("shape", "rows", "columns", *results[arguments.shapes[0]][0])
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            for name, rows in results.items():
                for row in rows:
                    values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                    shape = {"rows": SHAPES[name].rows, "columns": SHAPES[name].columns}
                    writer.writerow({"shape": name, **shape, **values})
        plot(results, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
