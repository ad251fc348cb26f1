"""The noised top-K losses against PyPI's pytopk, the definition and literal numbers."""

import copy
import math

import numpy as np
import pytest
import torch

import polyfocal
from polyfocal.losses import functional as L


def inputs(n=32, c=20, dtype=torch.float32, b=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, c, dtype=dtype, generator=generator)
    labels = torch.randint(0, c, (n,), generator=generator)
    noise = torch.randn(n, c, b, dtype=dtype, generator=generator)
    return logits, labels, noise


def by_definition(logits, labels, noise, k, epsilon, margins=1.0, scale=1.0):
    """(N,) losses and their (N, C) gradient in NumPy, one row and one copy at a time."""
    logits, noise = logits.double().numpy(), noise.double().numpy()
    n, _, b = noise.shape
    losses, gradient = np.zeros(n), np.zeros_like(logits)
    for i in range(n):
        y = int(labels[i])
        ranked = 0.0
        for j in range(b):
            copy_ = logits[i] + epsilon * noise[i, :, j]
            at = np.argsort(-copy_)[k]  # 0-based: rank k + 1
            ranked += copy_[at] / b
            gradient[i, at] += 1 / b
        gradient[i, y] -= 1
        margin = margins if np.isscalar(margins) else margins[y]
        losses[i] = max(0.0, scale * (margin + ranked - logits[i, y]))
        gradient[i] *= scale * (losses[i] > 0)
    return losses, gradient


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0])
def test_is_the_papers_formula_with_its_gradient(k, epsilon):
    logits, labels, noise = inputs(dtype=torch.float64)
    expected, slope = by_definition(logits, labels, noise, k, epsilon)
    logits.requires_grad_()
    loss = L.noised_topk_loss(
        logits, labels, k=k, epsilon=epsilon, noise=noise, num_samples=5, reduction="none"
    )
    assert loss.shape == (32,) and 0 < (loss > 0).sum() < 32
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12, atol=1e-12)
    upstream = torch.rand(32, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    np.testing.assert_allclose(gradient, slope * upstream[:, None].numpy(), atol=1e-12)


def test_imbalanced_is_the_papers_formula():
    logits, labels, noise = inputs(c=4, dtype=torch.float64)
    # m = C / n^(1/4): 16 and 81 are 2^4 and 3^4; the rarest, 1, has the largest margin.
    margins = L.topk_margins([1, 16, 81, 0], max_margin=0.6)
    torch.testing.assert_close(margins, torch.tensor([0.6, 0.3, 0.2, 0.6]))
    expected, slope = by_definition(logits, labels, noise, 2, 0.1, margins.numpy(), 60.0)
    logits.requires_grad_()
    args = dict(k=2, epsilon=0.1, margins=margins, scale=60.0, noise=noise)
    loss = L.imbalanced_noised_topk_loss(logits, labels, reduction="none", **args)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    np.testing.assert_allclose(gradient, slope, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 7), (32, 20), (8, 3000)])
def test_is_pytopk_on_the_same_noise(shape, monkeypatch):
    pytopk = pytest.importorskip("pytopk", reason="needs pytopk: pip install 'polyfocal[test]'")
    logits, labels, noise = inputs(*shape)
    counts = torch.arange(1, shape[1] + 1).tolist()
    monkeypatch.setattr(torch, "randn", lambda *size, **_: noise)
    balanced = pytopk.BalNoisedTopK(k=5, epsilon=0.2, n_sample=5)
    imbalanced = pytopk.ImbalNoisedTopK(5, 0.01, max_m=0.3, cls_num_list=counts, scale=50)
    ours = polyfocal.NoisedTopKLoss(5, 0.2)
    ours_imbalanced = polyfocal.ImbalancedNoisedTopKLoss(5, 0.01, counts, 0.3)
    for peer, loss in ((balanced, ours), (imbalanced, ours_imbalanced)):
        values, gradients = [], []
        for call in (lambda x, p=peer: p(x, labels), lambda x, m=loss: m(x, labels, noise=noise)):
            x = logits.clone().requires_grad_()
            value = call(x)
            value.backward()
            values.append(value.detach())
            gradients.append(x.grad)
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_values_worked_out_by_hand():
    # Two copies of the scores (3, 1, 0) with k = 1. Copy 1 adds (0, 1, 0): second is 2, class 1.
    # Copy 2 adds (-4, 0, 0.5): (-1, 1, 0.5), second is 0.5, class 2. top = 1.25.
    logits = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    noise = torch.tensor([[[0.0, -4.0], [1.0, 0.0], [0.0, 0.5]]])
    args = dict(k=1, epsilon=1.0, num_samples=2, noise=noise)
    assert L.noised_topk_loss(logits, torch.tensor([0]), **args).item() == 0
    loss = L.noised_topk_loss(logits, torch.tensor([2]), **args)
    assert loss.item() == pytest.approx(1 + 1.25 - 0)
    loss.backward()
    assert logits.grad.tolist() == [[0.0, 0.5, 0.5 - 1.0]]


def test_gradcheck_at_fixed_noise():
    logits, labels, noise = inputs(n=6, c=5, dtype=torch.float64)
    weight = torch.rand(6, dtype=torch.float64)
    logits.requires_grad_()

    def loss(x):
        return L.imbalanced_noised_topk_loss(
            x, labels, weight, k=2, epsilon=0.3, margins=[1.0, 0.5, 0.5, 0.2, 0.1], scale=2.0,
            noise=noise, class_weight=[1.0, 2.0, 0.5, 1.0, 3.0], reduction="sum",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, logits)


def test_seed_and_generator_make_the_noise():
    logits, labels, _ = inputs()
    draw = dict(k=3, epsilon=1.0, reduction="none")
    one, again, other = (
        L.noised_topk_loss(logits, labels, generator=torch.Generator().manual_seed(seed), **draw)
        for seed in (1, 1, 2)
    )
    assert one.equal(again) and not one.equal(other)
    first, second = (polyfocal.NoisedTopKLoss(3, 1.0, seed=7) for _ in range(2))
    values = [first(logits, labels) for _ in range(3)]
    torch.manual_seed(5)  # torch's own generator plays no part
    copied = copy.deepcopy(second)
    assert [second(logits, labels) for _ in range(3)] == values
    assert copied(logits, labels) == values[0] != values[1]
    state = torch.get_rng_state()
    first(logits, labels)
    assert torch.get_rng_state().equal(state)


def test_noise_is_normal_and_its_own_in_every_block():
    # The mean over many copies of the largest of 2 standard normals is 1 / sqrt(pi).
    logits, labels = torch.zeros(40, 2), torch.zeros(40, dtype=torch.long)
    gap = L.noised_topk_loss(
        logits, labels, k=1, epsilon=1.0, num_samples=20_000, reduction="none",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert gap.unique().numel() == 40  # more than one block of rows
    assert gap.mean().item() == pytest.approx(1 - 1 / math.sqrt(math.pi), abs=3e-3)


def test_contract_of_reductions_and_weights():
    logits, labels, noise = inputs()
    call = dict(k=3, epsilon=0.5, noise=noise)
    each = L.noised_topk_loss(logits, labels, reduction="none", **call)
    weight = torch.rand(32)
    classes = torch.rand(20)
    weighted = each * weight * classes[labels]
    common = dict(class_weight=classes, **call)
    got = L.noised_topk_loss(logits, labels, weight, reduction="none", **common)
    torch.testing.assert_close(got, weighted)
    got = L.noised_topk_loss(logits, labels, weight, avg_factor=4.0, **common)
    torch.testing.assert_close(got, weighted.sum() / 4)
    kept = labels != labels[0]
    got = L.noised_topk_loss(logits, labels, weight, ignore_index=int(labels[0]), **common)
    torch.testing.assert_close(got, weighted[kept].mean())
    half = L.noised_topk_loss(logits.bfloat16(), labels, reduction="none", **call)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, each, rtol=0.02, atol=0.1)
    empty = L.noised_topk_loss(logits[:0].requires_grad_(), labels[:0], k=3, epsilon=0.5)
    empty.backward()
    assert empty == 0


def test_background_column_has_the_smallest_margin():
    logits, _, noise = inputs(n=3, c=3)
    labels = torch.tensor([2, 2, 2])
    args = dict(k=1, epsilon=0.0, scale=1.0, noise=noise, reduction="none")
    with_background = L.imbalanced_noised_topk_loss(logits, labels, margins=[0.5, 0.1], **args)
    expected = L.imbalanced_noised_topk_loss(logits, labels, margins=[0.5, 0.1, 0.1], **args)
    torch.testing.assert_close(with_background, expected)


@pytest.mark.parametrize("columns", [4, 1204])
def test_activation_gives_a_row_at_its_margin_one_half(columns):
    rows = torch.zeros(2, columns)
    rows[0, 1] = 1.0  # just meets the margin
    rows[1] = rows[0] + 100.0  # a shift of a row means nothing to the loss
    scores = polyfocal.NoisedTopKLoss(1, 1.0).activation(rows)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-6)
    assert scores[0, 1].item() == pytest.approx(columns / (2 * columns - 1), rel=1e-4)
    long_tail = polyfocal.ImbalancedNoisedTopKLoss(1, 0.01, [10] * columns, max_margin=0.2)
    torch.testing.assert_close(long_tail.activation(0.2 * rows[:1]), scores[:1])


def test_large_inputs_keep_no_tensor_of_all_copies():
    logits = torch.randn(64, 4000, requires_grad=True)
    labels = torch.randint(0, 4000, (64,))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = L.noised_topk_loss(logits, labels, k=5, epsilon=0.1, num_samples=50)
    loss.backward()
    kept.pop(logits.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < 0.1 * 4 * logits.numel()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: polyfocal.NoisedTopKLoss(0, 1.0), "k=0: expected a whole number"),
        (lambda: polyfocal.NoisedTopKLoss(2.5, 1.0), "k=2.5: expected a whole number"),
        (lambda: polyfocal.NoisedTopKLoss(1, -1.0), "epsilon=-1.0: expected"),
        (lambda: polyfocal.NoisedTopKLoss(1, 1.0, num_samples=0), "num_samples=0: expected"),
        (lambda: polyfocal.NoisedTopKLoss(1, 1.0, seed="x"), "seed=x: expected"),
        (
            lambda: polyfocal.NoisedTopKLoss(1, 1.0, use_sigmoid=True),
            "use_sigmoid=True: the noised top-K loss is defined for use_sigmoid=False",
        ),
        (lambda: polyfocal.ImbalancedNoisedTopKLoss(1, 1.0, [0, 0], 0.3), "one of them above 0"),
        (lambda: polyfocal.ImbalancedNoisedTopKLoss(1, 1.0, [1, -2], 0.3), "class_counts holds -2"),
        (lambda: polyfocal.ImbalancedNoisedTopKLoss(1, 1.0, [1, 2], 0), "max_margin=0: expected"),
        (lambda: polyfocal.ImbalancedNoisedTopKLoss(1, 1.0, [1, 2], 1, 0), "scale=0: expected"),
        (
            lambda: polyfocal.NoisedTopKLoss(5, 1.0)(torch.zeros(2, 5), torch.tensor([0, 1])),
            "k=5 with logits of 5 columns: the noised top-K loss needs at least 6",
        ),
        (
            lambda: polyfocal.NoisedTopKLoss(1, 1.0)(torch.zeros(2, 5), torch.full((2, 5), 0.2)),
            "the noised top-K loss takes integer labels",
        ),
        (
            lambda: polyfocal.ImbalancedNoisedTopKLoss(1, 1.0, [1, 2], 0.3)(
                torch.zeros(1, 5), torch.tensor([0])
            ),
            r"2 class counts \(margins\) for logits of 5 columns: expected 5, or 4 if the last",
        ),
        (
            lambda: polyfocal.NoisedTopKLoss(1, 1.0)(
                torch.zeros(1, 5), torch.tensor([0]), noise=torch.zeros(1, 5, 4)
            ),
            r"noise has shape \(1, 5, 4\): expected \(1, 5, 5\)",
        ),
    ],
)
def test_bad_settings_and_inputs_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
