"""Time and memory of the noised top-K loss beside pytopk, smooth top-K and cross-entropy.

    python benchmarks/topk_bench.py                    # C = 100, 1,000 and 10,000
    python benchmarks/topk_bench.py --classes 10000 --batch 128 --k 5

A step is forward and backward to the logits, which are a leaf; noise is drawn inside it. All the
candidates of a size run in one process in turns, and the figure is the median over the turns. Peak
is the most that was allocated at one time during a step beyond what was there before it, the
gradient included. The rules, and how memory is measured, are those of loss_bench.py.

Smooth top-K (Berrada et al., Smooth Loss Functions for Deep Top-k Classification, 2018) has no
release on PyPI; the candidate here is written from its definition,

    tau log [sum over subsets of k classes of e^(their mean score / tau + margin)]
      - tau log [the same over subsets with the label],

with the sums over subsets as elementary symmetric polynomials of e^(s / (k tau)), taken by divide
and conquer over the classes, k + 1 coefficients per node, in log space.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from loss_bench import Candidate, Loss, _import, peak_bytes, run

from polyfocal.losses import ImbalancedNoisedTopKLoss, NoisedTopKLoss


def _log_symmetric(x: Tensor, degree: int) -> Tensor:
    """Logarithms of the elementary symmetric polynomials 0 ... degree of e^x, (N, degree + 1)."""
    classes = x.shape[1]
    low = torch.finfo(x.dtype).min / 4
    width = 1 << (classes - 1).bit_length()
    # Each leaf is the polynomial 1 + e^x t.
    nodes = F.pad(x, (0, width - classes), value=low).unsqueeze(2)
    nodes = torch.cat([torch.zeros_like(nodes), nodes], dim=2)
    while nodes.shape[1] > 1:
        left, right = nodes[:, ::2], nodes[:, 1::2]
        terms = nodes.shape[2]
        columns = []
        for j in range(min(2 * terms - 1, degree + 1)):
            pairs = [
                left[..., i] + right[..., j - i]
                for i in range(max(0, j - terms + 1), min(j, terms - 1) + 1)
            ]
            columns.append(torch.logsumexp(torch.stack(pairs), dim=0))
        nodes = torch.stack(columns, dim=2)
    return nodes[:, 0]


def smooth_topk(logits: Tensor, target: Tensor, k: int, tau: float = 1.0) -> Tensor:
    """Smooth top-K SVM loss, mean over the batch; see the module."""
    column = target.unsqueeze(1)
    label = logits.gather(1, column).squeeze(1) / (k * tau)
    others = logits.scatter(1, column, torch.finfo(logits.dtype).min / 4) / (k * tau)
    both = _log_symmetric(others, k)
    with_label = both[:, k - 1] + label
    # A subset without the label has the margin 1.
    everything = torch.logaddexp(both[:, k] + 1 / tau, with_label)
    return (tau * (everything - with_label)).mean()


def candidates(classes: int, k: int, samples: int) -> dict[str, Loss]:
    """Every loss that is compared, ours first."""
    counts = list(range(1, classes + 1))
    ours = NoisedTopKLoss(k, epsilon=0.2, num_samples=samples)
    tail = ImbalancedNoisedTopKLoss(k, 0.01, counts, 0.2, scale=60.0, num_samples=samples)
    found: dict[str, Loss] = {
        "polyfocal noised top-K": lambda x, y: ours(x, y),
        "polyfocal noised top-K, imbalanced": lambda x, y: tail(x, y),
    }
    if pytopk := _import("pytopk"):
        theirs = pytopk.BalNoisedTopK(k=k, epsilon=0.2, n_sample=samples)
        their_tail = pytopk.ImbalNoisedTopK(k, 0.01, 0.2, counts, 60, samples)
        found["pytopk balanced"] = theirs
        found["pytopk imbalanced"] = their_tail
    found["smooth top-K"] = lambda x, y: smooth_topk(x, y, k)
    found["cross-entropy"] = lambda x, y: F.cross_entropy(x, y)
    return found


def measure(classes: int, batch: int, k: int, samples: int, turns: int, device: str) -> str:
    """A table in Markdown."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=generator).to(device).requires_grad_()
    target = torch.randint(classes, (batch,), generator=generator).to(device)
    steps = candidates(classes, k, samples)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for turn in range(turns + 2):
        for name in order.sample(list(steps), len(steps)):
            seconds = run(Candidate(steps[name]), logits, target)
            if turn >= 2:  # the first ones fill caches
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peaks = {
        name: peak_bytes(Candidate(step), logits, target) / 2**20 for name, step in steps.items()
    }
    first = next(iter(steps))
    lines = [
        f"**C = {classes:,}**, K = {k}, B = {samples}, batch {batch}",
        "",
        "| | ms | x ours | x cross-entropy | peak MiB | x ours |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {ms * 1e3:.2f} | {ms / medians[first]:.2f}"
        f" | {ms / medians['cross-entropy']:.1f} | {peaks[name]:.2f}"
        f" | {peaks[name] / peaks[first]:.2f} |"
        for name, ms in medians.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive: Callable[[str], int] = int
    parser.add_argument("--classes", nargs="+", type=positive, default=[100, 1000, 10_000])
    parser.add_argument("--batch", type=positive, default=128, help="rows (default 128)")
    parser.add_argument("--k", type=positive, default=5, help="K (default 5)")
    parser.add_argument("--samples", type=positive, default=5, help="B (default 5)")
    parser.add_argument("--turns", type=positive, default=15, help="steps (default 15)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}\n")
    for classes in arguments.classes:
        settings = (arguments.batch, arguments.k, arguments.samples, arguments.turns)
        print(measure(classes, *settings, arguments.device) + "\n", flush=True)


if __name__ == "__main__":
    main()
