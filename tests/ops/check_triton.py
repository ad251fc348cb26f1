"""Compares the Triton kernels with the composed operations, on a GPU or with TRITON_INTERPRET=1.

A file of its own, since Triton decides when it is imported whether it interprets.
"""

import itertools
import os

import torch

from polyfocal.ops import PolyFocal, triton_kernels
from polyfocal.ops.poly_focal import composed_sigmoid, composed_softmax

device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
bounds = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
generator = torch.Generator().manual_seed(0)


def close(got, expected, bound):
    expected = expected.detach()
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound * 1e-2)


count = 0
for dtype, (gamma, epsilons, xi) in itertools.product(
    bounds, ((0.0, (), 0.0), (0.5, (1.0,), 0.3), (2.0, (-0.5, 0.2), 0.0), (2.0, (1.0,), 0.0))
):
    count += 1
    bound = bounds[dtype]
    poly = PolyFocal(gamma, epsilons, xi, 3.0)
    for rows, columns in ((1, 1), (30, 80), (0, 3)):
        x = (torch.randn(rows, columns, generator=generator) * 4).to(device, dtype)
        labels = torch.randint(columns + 1, (rows,), generator=generator).to(device)
        entry = torch.rand(rows, columns, generator=generator).to(device)
        by_class = torch.rand(columns, generator=generator).to(device)
        exact = x.double().requires_grad_()
        upstream = torch.tensor(0.3, device=device)
        for weight in (None, entry[:, :1], entry):
            double = None if weight is None else weight.double()
            each = composed_sigmoid(exact, labels, poly, by_class.double(), 0.7, double)
            args = (x, labels, poly, by_class, 0.7, weight)
            close(triton_kernels.sigmoid(*args, False, True)[0], each, bound)
            total, got = triton_kernels.sigmoid(*args, True, True, upstream=upstream)
            close(total, each.sum(), bound)
            (slope,) = torch.autograd.grad(each.sum(), exact, retain_graph=True)
            assert got.dtype == dtype
            close(got, slope * 0.3, bound)
            (slope,) = torch.autograd.grad(each, exact, entry.double())
            got = triton_kernels.sigmoid(*args, False, True, want_loss=False, upstream=entry)
            assert got[0] is None
            close(got[1], slope, bound)
        labels = labels % columns
        row = entry[:, 0]
        for weight in (None, row):
            double = None if weight is None else weight.double()
            each = composed_softmax(exact, labels, poly, double)
            loss, margin = triton_kernels.softmax_loss(x, labels, poly, weight, False)
            close(loss, each, bound)
            (slope,) = torch.autograd.grad(each.sum(), exact, retain_graph=True)
            args = (margin, x, labels, poly, weight)
            close(triton_kernels.softmax_gradient(upstream, *args), slope * 0.3, bound)
            (slope,) = torch.autograd.grad(each, exact, row.double())
            close(triton_kernels.softmax_gradient(row, *args), slope, bound)
print(f"{count} cases on {device}")
