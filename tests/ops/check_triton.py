"""Compares the Triton kernels with the composed operations, on a GPU or with TRITON_INTERPRET=1.

A file of its own, since Triton decides when it is imported whether it interprets.
"""

import itertools
import os

import torch

from polyfocal.ops import PolyFocal, triton_kernels
from polyfocal.ops.poly_focal import composed_sigmoid, composed_softmax

device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
bounds = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
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


def both(x, labels, poly, weight=None, upstream=None):
    """Loss and gradient of both forms by the kernels."""
    above = torch.ones((), device=device) if upstream is None else upstream
    reduce = above.dim() == 0
    column = None if weight is None else weight.unsqueeze(1)
    args = (x, labels, poly, 0.25, 0.75, column)
    sigmoid = triton_kernels.sigmoid(*args, reduce, True, upstream=above)
    loss, rest = triton_kernels.softmax_loss(x, labels, poly, weight, reduce)
    above = above if reduce else above[:, 0]
    softmax = loss, triton_kernels.softmax_gradient(above, rest, x, labels, poly, weight)
    return sigmoid, softmax


# Wider than a tile and than what one program walks over; rows that are not next to each other; and
# entries whose numbers need 64 bits, which is forced here.
poly = PolyFocal(2.0, (1.0,))
wide = (torch.randn(6, 2 * 4500, generator=generator) * 4).to(device)[::2, ::2]
labels = torch.randint(4500, (6,), generator=generator).to(device)[::2]
for large in (False, True):
    triton_kernels._LARGE = 1 if large else 2**31
    exact = wide.double().requires_grad_()
    weight = torch.rand(3, generator=generator).to(device)
    sigmoid, softmax = both(wide, labels, poly, weight)
    for each, got in (
        (composed_sigmoid(exact, labels, poly, 0.25, 0.75, weight.double().unsqueeze(1)), sigmoid),
        (composed_softmax(exact, labels, poly, weight.double()), softmax),
    ):
        close(got[0], each.sum(), 2e-5)
        close(got[1], torch.autograd.grad(each.sum(), exact)[0], 2e-5)
triton_kernels._LARGE = 2**31
again = both(wide, labels, poly, weight)
for first, second in zip((*sigmoid, *softmax), (*again[0], *again[1]), strict=True):
    assert torch.equal(first, second), "the same twice, bit for bit"

# A label out of range makes its row NaN, and the sum; the others stay as they are.
x = torch.randn(5, 4, generator=generator).to(device)
right = torch.tensor([0, 3, 4, 1, 2], device=device)  # 4 is background with a sigmoid
for place, wrong in ((0, -1), (3, 5), (4, 2**40)):
    bad = right.clone()
    bad[place] = wrong
    for form, label in ((0, right), (1, right % 4)):
        bad = label.clone()
        bad[place] = wrong
        rows = torch.ones(5, 4, device=device)
        for upstream in (None, rows):
            expected = both(x, label, poly, upstream=upstream)[form]
            found = both(x, bad, poly, upstream=upstream)[form]
            if upstream is None:
                assert found[0].isnan() and not expected[0].isnan()
            else:
                assert found[0].isnan().reshape(5, -1).all(1).tolist() == [
                    i == place for i in range(5)
                ]
            others = torch.arange(5, device=device) != place
            assert torch.equal(found[1][others], expected[1][others])
            assert found[1][place].isnan().all()
softmax_background = both(x, right, poly)[1][0]
assert softmax_background.isnan(), "with a softmax C is no label"
print(f"{count} cases on {device}")
