"""The losses proven on a GPU in about eight minutes, by one command.

    python benchmarks/gpu_check.py --out gpu_check            # gpu_check.json and gpu_check.md
    python benchmarks/gpu_check.py --parts sync speed         # some parts
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py         # without a GPU: does the script run?

It needs torch, triton, pytest and hypothesis, and no detection framework. Each part runs in its own
process, with a time limit: a part that fails does not stop the next. The last lines say what missed
its goal. The exit status is 1 if something did.

Under Triton's interpreter the kernels run on a CPU, on a few rows: nothing is measured then, and
the goals of speed are not judged.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import polyfocal
from polyfocal.losses import ClassificationLoss, Poly1QualityFocalLoss, ScheduledLoss
from polyfocal.ops import PolyFocal, fused, use_path
from polyfocal.ops.poly_focal import composed_sigmoid

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# Rows, columns, activation, positive rows: those of docs/performance.md, and wider ones.
SHAPES: dict[str, tuple[int, int, bool, int]] = {
    "anchors, COCO": (200_000, 80, True, 300),
    "PointPillars": (321_408, 3, True, 200),
    "FCOS": (22_400, 80, True, 1_500),
    "DINO": (900, 80, True, 20),
    "RoI, COCO": (512, 81, False, 128),
    "RoI, LVIS": (512, 1_204, False, 128),
    "many RoIs, LVIS": (8_192, 1_204, False, 2_048),
    "65,536 classes": (2_048, 65_536, False, 512),
}
# Share of a copy's bytes per second, forward and backward, float32 and bfloat16.
GOALS = {"anchors, COCO": 0.9, "PointPillars": 0.9, "many RoIs, LVIS": 0.8, "65,536 classes": 0.8}
# Rows of the levels of RetinaNet (800 x 1,344, two pictures) and of the layers of DINO.
STEPS = {
    "RetinaNet, 5 levels": [2 * 9 * r for r in (16_800, 4_200, 1_050, 273, 77)],
    "DINO, 7 layers": [2 * 900] * 7,
}
Step = Callable[[], Any]


def data(rows: int, columns: int, sigmoid: bool, positives: int, dtype: torch.dtype) -> Any:
    """Logits that want a gradient, and labels."""
    if INTERPRETED:
        rows, columns = min(rows, 48), min(columns, 300)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * 2 - 3 * sigmoid
    y = torch.full((rows,), columns if sigmoid else columns - 1)
    chosen = torch.randperm(rows, generator=generator)[:positives]
    y[chosen] = torch.randint(columns, (len(chosen),), generator=generator)
    return x.to(DEVICE, dtype).requires_grad_(), y.to(DEVICE)


def eager_focal(x: Tensor, y: Tensor) -> Tensor:
    """The sigmoid focal loss as it is usually written."""
    z = F.one_hot(y, x.shape[1] + 1)[:, :-1].to(x.dtype)
    p = torch.sigmoid(x)
    p_t = p * z + (1 - p) * (1 - z)
    ce = F.binary_cross_entropy_with_logits(x, z, reduction="none")
    return ((0.25 * z + 0.75 * (1 - z)) * (1 - p_t) ** 2 * ce).sum()


def eager_poly1(x: Tensor, y: Tensor) -> Tensor:
    """Softmax Poly-1 with epsilon 1 as it is usually written."""
    ce = F.cross_entropy(x, y, reduction="none")
    return (ce + (1 - torch.exp(-ce))).sum()


def candidates(sigmoid: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Ways to a loss, ours first."""
    n = 100.0
    eager = eager_focal if sigmoid else eager_poly1
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    losses: dict[str, ClassificationLoss] = {
        "focal": polyfocal.FocalLoss(use_sigmoid=sigmoid),
        "Poly-1": polyfocal.Poly1FocalLoss(use_sigmoid=True, epsilon=1.0)
        if sigmoid
        else polyfocal.Poly1CrossEntropyLoss(epsilon=1.0),
        "cyclical": polyfocal.CyclicalFocalLoss(use_sigmoid=sigmoid),
    }
    for name, loss in losses.items():
        if isinstance(loss, ScheduledLoss):
            loss.set_progress(0.3)
        found[name] = partial(loss, avg_factor=n)
    if sigmoid:
        quality = Poly1QualityFocalLoss(epsilon=0.0, use_sigmoid=True)
        found["quality focal"] = lambda x, y: quality(
            x, (y, torch.full(y.shape, 0.7, device=y.device)), avg_factor=n
        )
    found["eager"] = eager
    if not INTERPRETED:
        found["eager, torch.compile"] = torch.compile(eager)
    try:
        sigmoid_focal_loss = importlib.import_module("torchvision.ops").sigmoid_focal_loss
    except (ImportError, RuntimeError):  # or one for another torch
        return found
    if sigmoid:
        found["torchvision"] = lambda x, y: sigmoid_focal_loss(
            x, F.one_hot(y, x.shape[1] + 1)[:, :-1].to(x.dtype), 0.25, 2.0, "sum"
        )
    return found


def median_ms(step: Step) -> float:
    """Milliseconds of a step, the median; of one call where the kernels are interpreted."""
    if INTERPRETED:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    import triton

    return triton.testing.do_bench(step, warmup=10, rep=40, return_mode="median")


def kept_bytes(step: Callable[[], Tensor], beside: list[Tensor]) -> int:
    """What autograd keeps of a loss for its gradient, labels and the like not counted."""
    known = {one.untyped_storage().data_ptr() for one in beside}
    storages: dict[int, int] = {}

    def pack(one: Tensor) -> Tensor:
        storage = one.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        step()
    return sum(storages.values())


def kernels(step: Step) -> int | None:
    """How many kernels a step starts; None where there is no GPU."""
    if INTERPRETED:
        return None
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step()
        torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA
    return sum(one.device_type == kind and "mem" not in one.name[:3] for one in profiled.events())


def part_tests() -> dict[str, Any]:
    """Every loss on random input, and the kernels beside the composed operations in float64."""
    environment = {**os.environ, "POLYFOCAL_TEST_DEVICE": DEVICE}
    commands = {
        "kernels": [sys.executable, "tests/ops/check_triton.py"],
        "losses": [sys.executable, "-m", "pytest", "-q", "-x", "tests/losses/test_properties.py"],
    }
    if INTERPRETED:
        commands["losses"] += ["-k", "finite and Poly1FocalLoss"]
    found: dict[str, Any] = {"short": []}
    for name, command in commands.items():
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        found[name] = (done.stdout + done.stderr).strip().splitlines()[-1:]
        if done.returncode:
            found["short"].append(f"the tests of the {name} fail: {done.stdout[-1500:]}")
    return found


def part_large() -> dict[str, Any]:
    """More than 2^31 entries, whose last rows must have the gradient of those rows alone."""
    columns = 80
    rows = 100 if INTERPRETED else 2**31 // columns + 1_000
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    y = torch.full((rows,), columns, device=DEVICE)
    tail = torch.randn(50, columns, device=DEVICE).bfloat16()
    x[-50:], y[-50:] = tail, torch.arange(50, device=DEVICE)
    loss = polyfocal.Poly1FocalLoss(use_sigmoid=True, epsilon=1.0)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, y, avg_factor=1.0), x)
    small = tail.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(small, y[-50:], avg_factor=1.0), small)
    same = torch.equal(gradient[-50:], expected)
    return {
        "entries": x.numel(),
        "short": [] if same else ["beyond 2^31 entries the gradient is another one"],
    }


def every_loss() -> dict[str, tuple[ClassificationLoss, bool]]:
    """Losses that take logits and labels alone, and whether each is sigmoid."""
    found: dict[str, tuple[ClassificationLoss, bool]] = {}
    more: dict[str, dict[str, Any]] = {
        "NoisedTopKLoss": {"k": 2, "epsilon": 0.2},
        "ImbalancedNoisedTopKLoss": {
            "k": 2,
            "epsilon": 0.01,
            "max_margin": 0.2,
            "class_counts": [5] * 20,
        },
        "LDAMLoss": {"class_counts": [5] * 20},
        "DualFocalLoss": {"gamma": 2.0},
        "PolyNLoss": {"epsilons": (1.0, 0.5)},
        "Poly1FocalLoss": {"epsilon": 1.0},
        "Poly1CrossEntropyLoss": {"epsilon": 1.0},
    }
    names = [*more, "FocalLoss", "CyclicalFocalLoss", "SampleDependentFocalLoss"]
    softmax_only = ("NoisedTopKLoss", "ImbalancedNoisedTopKLoss", "LDAMLoss", "DualFocalLoss")
    for name in names:
        for sigmoid in (False,) if name in softmax_only else (False, True):
            make = getattr(polyfocal.losses, name)
            loss = make(use_sigmoid=sigmoid, **more.get(name, {})).to(DEVICE)
            if isinstance(loss, ScheduledLoss):
                loss.set_progress(0.3)
            found[f"{name}, {'sigmoid' if sigmoid else 'softmax'}"] = loss, sigmoid
    return found


def part_sync() -> dict[str, Any]:
    """No loss waits for the device; forward and backward in a graph; a wrong label is NaN."""
    found: dict[str, Any] = {"short": [], "losses": []}
    for name, (loss, sigmoid) in every_loss().items():
        x, y = data(2_000, 20, sigmoid, 500, torch.float32)

        def step(x: Tensor = x, y: Tensor = y, loss: Any = loss) -> Tensor:
            return torch.autograd.grad(loss(x, y, avg_factor=10.0), x)[0]

        for _ in range(3):
            step()
        found["losses"].append(name)
        bad = y.clone()
        bad[3] = 99
        if name.startswith(("FocalLoss", "Poly", "Cyclical")):
            fine = not loss(x, bad, avg_factor=1.0).isnan() if not INTERPRETED else False
            if fine:
                found["short"].append(f"{name}: a label out of range is not NaN")
        if INTERPRETED:
            continue
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            found["short"].append(f"{name} waits for the device: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if "TopK" in name:
            continue  # draws numbers
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            expected = step()
            graph.replay()
            torch.cuda.synchronize()
            if not torch.equal(captured, expected):
                found["short"].append(f"{name}: a captured graph gives another gradient")
        except RuntimeError as error:
            found["short"].append(f"{name} cannot be captured: {str(error).splitlines()[0]}")
            break  # a failed capture leaves the device unusable in this process
    return found


def part_speed() -> dict[str, Any]:
    """Time, bytes per second as a share of a copy's, memory and kernels, each shape and loss."""
    found: dict[str, Any] = {"short": [], "rows": []}
    for what, (rows, columns, sigmoid, positives) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            x, y = data(rows, columns, sigmoid, positives, dtype)
            size, labels = x.numel() * x.element_size(), y.numel() * y.element_size()
            target = torch.empty_like(x)
            copy = median_ms(partial(target.copy_, x.detach()))
            for name, loss in candidates(sigmoid).items():
                row: dict[str, Any] = {"shape": what, "dtype": str(dtype)[6:], "loss": name}
                found["rows"].append(row)
                try:
                    forward = partial(loss, x, y)
                    backward = partial(torch.autograd.grad, forward(), x, retain_graph=True)
                    row |= {"copy_ms": copy, "forward_ms": median_ms(forward)}
                    row |= {"backward_ms": median_ms(backward)}
                    row["kept"] = kept_bytes(forward, [y]) / size
                    row |= {"forward_kernels": kernels(forward)}
                    row |= {"backward_kernels": kernels(backward)}
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    row["error"] = str(error).splitlines()[0][:200]
                    continue
                row["forward_share"] = (size + labels) / row["forward_ms"] / (2 * size / copy)
                row["backward_share"] = (2 * size + labels) / row["backward_ms"] / (2 * size / copy)
                _judge(row, found["short"])
    return found


def _judge(row: dict[str, Any], short: list[str]) -> None:
    if row["loss"] not in ("focal", "Poly-1", "cyclical") or INTERPRETED:
        return
    where = f"{row['shape']}, {row['dtype']}, {row['loss']}"
    goal = GOALS.get(row["shape"], 0.0)
    for way in ("forward", "backward"):
        if row[f"{way}_share"] < goal:
            short.append(f"{where}: {way} at {row[f'{way}_share']:.2f} of the copy, not {goal}")
        if row[f"{way}_kernels"] > 1:
            short.append(f"{where}: {row[f'{way}_kernels']} kernels {way}, not 1")
    if row["kept"] > 1.05:
        short.append(f"{where}: {row['kept']:.2f} times the logits are kept, not 1")


def part_repeat() -> dict[str, Any]:
    """The same result twice, bit for bit."""
    short = []
    for name, (loss, sigmoid) in every_loss().items():
        if "TopK" in name:
            continue  # draws numbers
        for dtype in (torch.float32, torch.bfloat16):
            x, y = data(50_000, 20, sigmoid, 500, dtype)
            values = [loss(x, y, avg_factor=3.0) for _ in range(2)]
            gradients = [torch.autograd.grad(value, x)[0] for value in values]
            if not (torch.equal(*values) and torch.equal(*gradients)):
                short.append(f"{name}, {str(dtype)[6:]}: two results of the same input differ")
    return {"short": short}


def part_steps() -> dict[str, Any]:
    """Microseconds of a step's losses as a framework calls them, and in a captured graph."""
    found: dict[str, Any] = {"short": [], "rows": []}
    for what, levels in STEPS.items():
        inputs = [data(rows, 80, True, 20, torch.float32) for rows in levels]
        for name in ("focal", "Poly-1", "cyclical", "eager"):
            loss = candidates(True)[name]

            def step(inputs: list[Any] = inputs, loss: Any = loss) -> Any:
                total = sum(loss(x, y) for x, y in inputs)
                return torch.autograd.grad(total, [x for x, _ in inputs])

            for _ in range(1 if INTERPRETED else 5):
                step()
            row: dict[str, Any] = {"step": what, "loss": name}
            found["rows"].append(row)
            count = 1 if INTERPRETED else 50
            start = time.perf_counter()
            for _ in range(count):
                step()
            row["python_us"] = 1e6 * (time.perf_counter() - start) / count
            row["device_us"] = 1e3 * median_ms(step)
            if INTERPRETED:
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            row["graph_us"] = 1e3 * median_ms(graph.replay)
    return found


def part_tiles() -> dict[str, Any]:
    """Other sizes of a tile and numbers of warps than those that are shipped."""
    from polyfocal.ops import triton_kernels

    found: dict[str, Any] = {"short": [], "rows": []}
    shipped = triton_kernels.ENTRIES, triton_kernels.WARPS
    choices = [(e, w) for e in (512, 1024, 2048, 4096) for w in (2, 4, 8)]
    for what in ("anchors, COCO", "PointPillars", "many RoIs, LVIS"):
        rows, columns, sigmoid, positives = SHAPES[what]
        for dtype in (torch.float32, torch.bfloat16):
            x, y = data(rows, columns, sigmoid, positives, dtype)
            loss = candidates(sigmoid)["Poly-1"]
            times = {}
            for choice in choices[:2] if INTERPRETED else choices:
                triton_kernels.ENTRIES, triton_kernels.WARPS = choice
                backward = partial(torch.autograd.grad, loss(x, y), x, retain_graph=True)
                times[choice] = median_ms(partial(loss, x, y)) + median_ms(backward)
            triton_kernels.ENTRIES, triton_kernels.WARPS = shipped
            best = min(times, key=lambda choice: times[choice])
            row: dict[str, Any] = {"shape": what, "dtype": str(dtype)[6:], "best": list(best)}
            row |= {"best_ms": times[best], "shipped_ms": times.get(shipped)}
            found["rows"].append(row)
            if not INTERPRETED and times[shipped] > 1.05 * times[best]:
                found["short"].append(f"tiles of {what}, {row['dtype']}: {best} is faster")
    return found


# By name: what it does, and its limit in seconds.
PARTS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "tests": (part_tests, 150),
    "sync": (part_sync, 60),
    "repeat": (part_repeat, 40),
    "large": (part_large, 60),
    "speed": (part_speed, 150),
    "steps": (part_steps, 60),
    "tiles": (part_tiles, 60),
}


def use_interpreted_kernels() -> None:
    """Have the losses take the Triton kernels on the CPU."""
    from polyfocal.ops import triton_kernels

    chosen = fused._backend

    def backend(logits: Tensor, *others: object) -> ModuleType | None:
        return None if chosen(logits, *others) is None else triton_kernels

    fused._backend = backend
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    kept = PolyFocal(2.0)
    found = fused.sigmoid_poly_focal(x, y, kept)
    torch.testing.assert_close(found, composed_sigmoid(x, y, kept, 1.0, 1.0, None))


def run_part(name: str) -> dict[str, Any]:
    """One part in a process of its own."""
    _, limit = PARTS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--child", name, str(file)]
        start = time.perf_counter()
        try:
            limit *= 4 if INTERPRETED else 1
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"short": [f"the part {name} did not end within {limit} s"]}
        found = json.loads(file.read_text()) if file.is_file() else {}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            found = {"short": [f"the part {name} failed: {lines[-1]}"], "stderr": lines[-30:]}
        return {**found, "seconds": round(time.perf_counter() - start, 1)}


def markdown(parts: dict[str, dict[str, Any]], device: str) -> str:
    """The tables, and what fell short."""
    lines = [f"# Losses on {device}", ""]
    if INTERPRETED:
        lines += ["Triton's interpreter on a CPU: the numbers below measure nothing.", ""]
    for name, found in parts.items():
        about = PARTS[name][0].__doc__ or ""
        lines += [f"## {name}", "", f"{about.splitlines()[0]} {found.get('seconds', '?')} s.", ""]
        rows = found.get("rows", [])
        if rows:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
            lines += [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in rows]
            lines.append("")
    short = [sentence for found in parts.values() for sentence in found["short"]]
    lines += ["## What fell short", "", *(f"- {one}" for one in short or ["nothing"])]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run the parts, write both files, and say what fell short."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="gpu_check", help="name of the files (default gpu_check)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--child", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_path("auto")
    if not INTERPRETED and not torch.cuda.is_available():
        print("error: torch finds no GPU; TRITON_INTERPRET=1 tries the script", file=sys.stderr)
        return 2
    if args.child:
        if INTERPRETED:
            use_interpreted_kernels()
        found = PARTS[args.child[0]][0]()
        Path(args.child[1]).write_text(json.dumps(found))
        return 0
    device = "an interpreter" if INTERPRETED else torch.cuda.get_device_name()
    parts = {}
    for name in args.parts:
        parts[name] = run_part(name)
        print(f"{name}: {parts[name].get('seconds', '?')} s, {len(parts[name]['short'])} short")
    about = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    Path(f"{args.out}.json").write_text(json.dumps({**about, "parts": parts}, indent=1) + "\n")
    text = markdown(parts, device)
    Path(f"{args.out}.md").write_text(text)
    print(f"written: {args.out}.json, {args.out}.md\n\n{text[text.index('## What fell short') :]}")
    return int(any(found["short"] for found in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
