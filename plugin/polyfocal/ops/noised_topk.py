"""The noised top-k operator, drawn for one block of rows at a time."""

import torch
from torch import Tensor

# Noised scores in one block: 1 MB in float32 stays in a core's cache; a GPU needs larger blocks.
_BLOCK_CPU = 2**18
_BLOCK_DEVICE = 2**24


def noised_gap(
    scores: Tensor,
    target: Tensor,
    rank: int,
    epsilon: float,
    num_samples: int,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """top_{rank, epsilon}(s) - s_y of every row, top being the mean over noised copies.

    Of each copy only the index of the class at that rank is kept. The gradient of the perturbed
    optimizer is the mean of the one-hot vectors of these classes. That is the gradient of the
    scores gathered at those indices; the noise is a constant.

    Args:
        scores: (N, C), float32 or float64, C >= rank.
        target: (N,) int64 in [0, C - 1].
        rank: 1 for the largest score, 2 for the next, and so on.
        epsilon: strength of the noise, >= 0.
        num_samples: B, noised copies of each row.
        generator: draws the noise, on the scores' device; None for torch's own.
        noise: (N, C, B), instead of drawn noise.

    Returns:
        (N,)
    """
    rows, columns = scores.shape
    index = target.new_empty(rows, num_samples + 1)
    index[:, -1] = target
    largest = scores.new_empty(rows, num_samples)
    with torch.no_grad():
        block = _BLOCK_CPU if scores.device.type == "cpu" else _BLOCK_DEVICE
        block = min(rows, max(1, block // (columns * num_samples)))
        noised = scores.new_empty(block, num_samples, columns)
        for start in range(0, rows, max(block, 1)):
            part = scores[start : start + block].unsqueeze(1)
            copies = noised[: len(part)]
            if noise is None:
                copies.normal_(generator=generator)
            else:
                copies.copy_(noise[start : start + block].transpose(1, 2))
            copies.mul_(epsilon).add_(part)
            # A partial sort: faster than kthvalue's selection up to large ranks.
            values, where = copies.topk(rank, dim=2)
            largest[start : start + block] = values[..., -1]
            index[start : start + block, :-1] = where[..., -1]
    # One gather, so that backward makes one tensor of the scores' size.
    picked = scores.gather(1, index)
    shift = (largest - picked.detach()[:, :-1]).mean(dim=1)
    return picked[:, :-1].mean(dim=1) + shift - picked[:, -1]
