"""The fused passes against the papers' formulas, finite differences and the composed operations."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch._dynamo.config
from torch.autograd import forward_ad

from polyfocal._torch import SEES_ATTRIBUTES
from polyfocal.errors import UserError
from polyfocal.losses import (
    CyclicalFocalLoss,
    FocalLoss,
    Poly1CrossEntropyLoss,
    Poly1FocalLoss,
    PolyNLoss,
    functional,
)
from polyfocal.ops import (
    PolyFocal,
    cpu,
    fused,
    sigmoid_poly_focal,
    softmax_poly_focal,
    use_path,
)

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
EPSILONS = ((), (-1.0,), (-0.5,), (0.0,), (2.0,), (0.5, -0.25))
SHAPES = {
    "empty": (0, 4),
    "one row": (1, 7),
    "one column": (9, 1),
    "odd": (13, 37),
    "wide": (6, 300),
    "blocks": (3000, 81),
}


@pytest.fixture
def composed():
    before = use_path("composed")
    yield
    use_path(before)


@pytest.fixture
def always_compiled(monkeypatch):
    """Small shapes are compiled too, in as many forms as the tests of this process ask for."""
    monkeypatch.setattr(cpu, "_COMPILE_FROM", 0)
    monkeypatch.setattr(cpu, "_KEEP", 0)  # as of an input that is large enough to be compiled
    if not cpu.has_compiler():
        pytest.skip("needs a C++ compiler")
    with torch._dynamo.config.patch(cache_size_limit=64):
        yield


def sigmoid_case(rows, columns, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(columns + 1, (rows,), generator=generator)
    weight = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    by_class = torch.rand(columns, generator=generator, dtype=torch.float64)
    return logits, target, weight, by_class


def truth(logits, target, poly, positive, negative, weight):
    """Loss and, by composed operations in float64, its gradient."""
    logits = logits.detach().double().requires_grad_()
    before = use_path("composed")
    loss = sigmoid_poly_focal(logits, target, poly, positive, negative, weight)
    use_path(before)
    return loss


def relative(got, expected):
    return (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilons", EPSILONS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sigmoid_loss_equals_the_papers_formula(gamma, epsilons, shape):
    logits, target, weight, _ = sigmoid_case(*SHAPES[shape])
    poly = PolyFocal(gamma, epsilons, 0.3, 3.0)
    expected = reference.sigmoid_loss(
        logits, target, alpha=0.25, gamma=gamma, epsilons=epsilons, xi=0.3, gamma_hc=3.0
    )
    expected = torch.from_numpy(expected) * weight
    for dtype in (torch.float32, torch.float64):
        args = (logits.to(dtype), target, poly, 0.25, 0.75, weight.to(dtype))
        each = sigmoid_poly_focal(*args)
        total = sigmoid_poly_focal(*args, reduce=True)
        torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(total.double(), expected.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradients_in_every_dtype_against_float64(gamma, shape, dtype):
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    case = sigmoid_case(*SHAPES[shape])
    logits, target, weight, by_class = case[0].to(dtype), *case[1:]
    poly = PolyFocal(gamma, (0.7,), 0.2, 2.5)
    exact = logits.double().requires_grad_()
    expected = truth(logits, target, poly, by_class, 0.7, weight[:, :1])
    exact_loss = sigmoid_poly_focal(exact, target, poly, by_class, 0.7, weight[:, :1], True)
    leaf = logits.clone().requires_grad_()
    loss = sigmoid_poly_focal(
        leaf, target, poly, by_class.float(), 0.7, weight[:, :1].float(), reduce=True
    )
    (loss * 0.37).backward()
    (exact_loss * 0.37).backward()
    assert loss.dtype == torch.float32 and leaf.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected.sum().detach(), rtol=bound, atol=0)
    if len(logits):
        assert relative(leaf.grad, exact.grad) < bound


@pytest.mark.parametrize("reduce", [False, True], ids=["none", "sum"])
@pytest.mark.parametrize("weights", ["no weights", "row", "entry", "class"])
@pytest.mark.parametrize("epsilons", [(-1.0,), (-0.5,), (0.0,), (2.0,), (0.5, -0.25)])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_first_and_second_derivatives_by_finite_differences(gamma, epsilons, weights, reduce):
    logits, target, entry, by_class = sigmoid_case(4, 3, scale=2.0)
    weight = {"row": entry[:, :1], "entry": entry}.get(weights)
    positive, negative = (by_class, 1 - by_class) if weights == "class" else (0.25, 0.75)
    logits.requires_grad_()
    for xi in (0.0, 0.4):
        poly = PolyFocal(gamma, epsilons, xi, 3.0)

        def sigmoid(x, poly=poly):
            return sigmoid_poly_focal(x, target, poly, positive, negative, weight, reduce)

        def softmax(x, poly=poly):
            row = None if weight is None else weight[:, 0]
            return softmax_poly_focal(x, target % 3, poly, row, reduce=reduce)

        for loss in (sigmoid, softmax):
            assert torch.autograd.gradcheck(loss, logits, fast_mode=True)
            assert torch.autograd.gradgradcheck(loss, logits, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 6), (33, 81), (500, 1204)])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_against_the_papers_formula(gamma, shape, dtype):
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    rows, columns = shape
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(rows, columns, generator=generator) * 3).to(dtype)
    target = torch.randint(columns, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator)
    poly = PolyFocal(gamma, (-0.5,), 0.3, 3.0)
    leaf = logits.clone().requires_grad_()
    each = softmax_poly_focal(leaf, target, poly, weight)
    expected = reference.softmax_loss(
        logits.double(), target, gamma=gamma, epsilons=(-0.5,), xi=0.3, gamma_hc=3.0
    )
    expected = torch.from_numpy(expected) * weight.double()
    assert relative(each, expected) < bound or expected.abs().max() == 0
    total = softmax_poly_focal(leaf, target, poly, weight, reduce=True)
    torch.testing.assert_close(total.double(), expected.sum(), rtol=bound, atol=1e-30)
    (total * 0.37).backward()
    exact = logits.double().requires_grad_()
    before = use_path("composed")
    (softmax_poly_focal(exact, target, poly, weight.double(), reduce=True) * 0.37).backward()
    use_path(before)
    if columns > 1:
        assert relative(leaf.grad, exact.grad) < bound
    else:
        assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize("keep", [0, 2**20], ids=["in blocks", "at once"])
@pytest.mark.parametrize("reduce", [False, True], ids=["none", "sum"])
def test_softmax_of_labels_far_above_and_below(monkeypatch, keep, reduce):
    """By hand, for two columns: z = x_y - x_other, q = 1 / (1 + e^z), CE = log(1 + e^-z)."""
    monkeypatch.setattr(cpu, "_KEEP", keep)
    z = [40.0, 18.0, -88.0, -90.0, -95.0, -103.0, -1e4, 0.0]
    logits = torch.tensor([[value, 0.0] for value in z], requires_grad=True)
    target = torch.zeros(len(z), dtype=torch.int64)
    weight = torch.tensor([1.0] * (len(z) - 1) + [0.0])
    loss = softmax_poly_focal(logits, target, PolyFocal(0.0, (2.0,)), weight, reduce=reduce)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    q = [1 / (1 + math.exp(min(value, 700))) for value in z]
    ce = [math.log1p(math.exp(-value)) if value > -700 else -value for value in z]
    each = torch.tensor([a + 2 * b for a, b in zip(ce, q, strict=True)]) * weight
    torch.testing.assert_close(loss, each.sum() if reduce else each, rtol=1e-6, atol=0)
    # d loss / d z = -q - 2 q p
    slope = torch.tensor([-b - 2 * b * (1 - b) for b in q]) * weight
    expected = torch.stack([slope, -slope], dim=1)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_softmax_in_blocks_equals_softmax_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(300, 21, generator=generator).requires_grad_()
    target = torch.randint(21, (300,), generator=generator)
    weight = torch.rand(300, generator=generator)
    monkeypatch.setattr(cpu, "_BLOCK", 1000)
    monkeypatch.setattr(cpu, "_GRAIN", 100)
    for poly in (PolyFocal(2.0), PolyFocal(0.5, (0.5, -0.2, 0.1), 0.3, 2.0), PolyFocal()):
        results = []
        for keep in (2**20, 0):
            monkeypatch.setattr(cpu, "_KEEP", keep)
            loss = softmax_poly_focal(logits, target, poly, weight, reduce=True, scale=0.1)
            results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("by", [None, "row", "entry"])
def test_sigmoid_whose_gradient_is_kept_equals_sigmoid_computed_again(monkeypatch, by):
    logits, target, weight, by_class = (x.float() for x in sigmoid_case(300, 21))
    logits, target = logits.requires_grad_(), target.long()
    weight = {None: None, "row": weight[:, :1], "entry": weight}[by]
    monkeypatch.setattr(cpu, "_BLOCK", 1000)
    monkeypatch.setattr(cpu, "_GRAIN", 100)
    for poly in (PolyFocal(2.0), PolyFocal(0.5, (0.5, -0.2, 0.1), 0.3, 2.0), PolyFocal()):
        for positive, negative in ((0.25, 0.75), (by_class, 1.0 - by_class)):
            results = []
            for keep in (2**20, 0):
                monkeypatch.setattr(cpu, "_KEEP", keep)
                arguments = (poly, positive, negative, weight)
                loss = sigmoid_poly_focal(logits, target, *arguments, reduce=True, scale=0.1)
                results.append((loss.detach(), torch.autograd.grad(3 * loss, logits)[0]))
            torch.testing.assert_close(results[0], results[1])


def test_rows_without_an_object_and_without_a_weight():
    logits, target, _, _ = sigmoid_case(50, 6)
    logits = logits.float().requires_grad_()
    background = torch.full_like(target, 6)
    loss = functional.focal_loss(logits, background, use_sigmoid=True, reduction="sum")
    expected = reference.sigmoid_loss(logits.detach(), background, alpha=0.25, gamma=2.0).sum()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    ignored = torch.full_like(target, 255)
    for use_sigmoid in (True, False):
        logits.grad = None
        loss = functional.focal_loss(logits, ignored, use_sigmoid=use_sigmoid, ignore_index=255)
        loss.backward()
        assert loss.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("layout", ["strided", "channels last"])
def test_any_layout_of_the_logits(layout):
    generator = torch.Generator().manual_seed(0)
    if layout == "strided":
        base = torch.randn(40, 14, generator=generator).requires_grad_()
        logits = base[:, ::2]
    else:
        base = torch.randn(2, 7, 4, 5, generator=generator)
        base = base.to(memory_format=torch.channels_last).requires_grad_()
        logits = base.permute(0, 2, 3, 1).reshape(-1, 7)
    target = torch.randint(8, (40,), generator=generator)
    total = functional.focal_loss(logits, target, use_sigmoid=True, reduction="sum")
    (gradient,) = torch.autograd.grad(total, base)
    copy = logits.detach().clone().requires_grad_()
    expected = functional.focal_loss(copy, target, use_sigmoid=True, reduction="sum")
    torch.testing.assert_close(total, expected)
    (expected_gradient,) = torch.autograd.grad(expected, copy)
    (through,) = torch.autograd.grad(logits, base, expected_gradient)
    torch.testing.assert_close(gradient, through)


def test_a_sum_of_many_rows_is_accurate():
    """As a LiDAR frame has them: 320,000 anchors whose losses are all alike, and a weight each."""
    x = torch.full((320_000, 3), -4.6)
    labels, weight = torch.full((320_000,), 3), torch.ones(320_000)
    loss = FocalLoss(use_sigmoid=True, reduction="sum")
    total = loss(x, labels, weight)
    p = 1 / (1 + math.exp(4.6))
    exact = 960_000 * 0.75 * p**2 * -math.log1p(-p)
    assert total.item() == pytest.approx(exact, rel=2e-6)


def test_equal_input_gives_equal_results():
    logits, target, weight, _ = sigmoid_case(5000, 80)
    results = []
    for _ in range(3):
        leaf = logits.float().requires_grad_()
        loss = functional.poly1_focal_loss(
            leaf, target, weight[:, 0].float(), epsilon=1.0, use_sigmoid=True
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_backward_twice_through_a_kept_graph():
    logits, target, _, _ = sigmoid_case(30, 5)
    logits.requires_grad_()
    loss = functional.focal_loss(logits, target, use_sigmoid=True)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logits, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(scaled, 3 * once)


@pytest.mark.parametrize("use_sigmoid", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_one_buffer_of_the_logits_size(use_sigmoid, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_KEEP", 4000 * 80 - 1)  # fewer logits keep their softmax too
    logits = torch.randn(4000, 80, dtype=dtype).requires_grad_()
    target = torch.randint(80, (4000,))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Poly1FocalLoss(epsilon=1.0, use_sigmoid=use_sigmoid)(logits, target, avg_factor=5.0)
    # Labels are 8 bytes per row, and the softmax form keeps two numbers per row.
    assert sum(kept.values()) <= logits.nbytes + 4000 * 20 + 16


@pytest.mark.parametrize(
    ("gamma", "epsilons", "weighted"),
    [(0.0, (), None), (0.5, (0.7,), "row"), (1.0, (-0.3, 0.2), "entry"), (2.0, (0.7,), None)],
)
def test_compiled_pass_equals_the_blocked_one(always_compiled, gamma, epsilons, weighted):
    poly = PolyFocal(gamma, epsilons, 0.2, 3.0)
    for columns in (20, 80):
        logits, target, weight, by_class = (t.float() for t in sigmoid_case(97, columns))
        target = target.long()
        w = {None: None, "row": weight[:, :1], "entry": weight}[weighted]
        results = []
        for path in ("auto", "blocked"):
            before = use_path(path)
            leaf = logits.clone().requires_grad_()
            loss = sigmoid_poly_focal(leaf, target, poly, by_class, 1 - by_class, w, True)
            (loss * 0.3).backward()
            use_path(before)
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)
    assert not cpu._broken


def test_compiled_pass_is_accurate_in_both_tails(always_compiled):
    x = torch.linspace(-40, 40, 4001).view(-1, 1).repeat(1, 20)
    target = torch.full((len(x),), 20)
    leaf = x.clone().requires_grad_()
    poly = PolyFocal(1.0, (1.0,))
    total = sigmoid_poly_focal(leaf, target, poly, reduce=True)
    total.backward()
    exact = x.double().requires_grad_()
    expected = truth(exact, target, poly, 1.0, 1.0, None)
    (gradient,) = torch.autograd.grad(sigmoid_poly_focal(exact, target, poly, reduce=True), exact)
    torch.testing.assert_close(total.double(), expected.sum().detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=0)


def test_compiled_once_for_any_number_of_anchors(always_compiled):
    loss = Poly1FocalLoss(epsilon=1.0, use_sigmoid=True)

    def step(rows, columns=20):
        logits = torch.randn(rows, columns).requires_grad_()
        target = torch.randint(columns + 1, (rows,))
        loss(logits, target, torch.ones(rows), avg_factor=3.0).backward()

    step(50)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (51, 64, 1000, 7):
            step(rows)
        step(33, columns=36)
    assert not cpu._broken


def test_a_compiler_that_fails_is_told_once_and_done_without(monkeypatch, always_compiled):
    def broken(*_):
        def fail(*_):
            raise RuntimeError("inductor raised:\nOSError: no g++\n\nYou can suppress this by")

        return fail

    monkeypatch.setattr(cpu, "_compiled", broken)
    monkeypatch.setattr(cpu, "_broken", [])
    logits, target, _, _ = sigmoid_case(20, 16)
    logits = logits.float().requires_grad_()
    with pytest.warns(UserWarning, match="raised: OSError: no g\\+\\+$") as caught:
        loss = functional.focal_loss(logits, target, use_sigmoid=True, reduction="sum")
        loss.backward()
    assert len(caught) == 1
    expected = reference.sigmoid_loss(logits.detach(), target, alpha=0.25, gamma=2.0).sum()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        FocalLoss(use_sigmoid=True),
        Poly1FocalLoss(epsilon=1.0, use_sigmoid=True),
        PolyNLoss(epsilons=(0.5, 0.2), use_sigmoid=True),
        CyclicalFocalLoss(use_sigmoid=True),
        FocalLoss(use_sigmoid=False),
        Poly1CrossEntropyLoss(epsilon=-1.0),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{'sigmoid' if loss.use_sigmoid else 'softmax'}",
)
def test_a_compiled_model_holds_the_loss_without_a_graph_break(loss):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 9)
    x, target = torch.randn(40, 6), torch.randint(9, (40,))
    if isinstance(loss, CyclicalFocalLoss):
        if not SEES_ATTRIBUTES:
            pytest.skip("torch.compile of this torch would keep the progress as a constant")
        loss.set_progress(0.1)

    def step(x, target):
        return loss(layer(x), target, avg_factor=7.0)

    expected = step(x, target)
    expected_gradient = torch.autograd.grad(expected, layer.weight)[0]
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, target)
    torch.testing.assert_close(got, expected)
    got_gradient = torch.autograd.grad(got, layer.weight)[0]
    torch.testing.assert_close(got_gradient, expected_gradient)


@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_a_compiled_model_follows_settings_and_schedules(use_sigmoid):
    """From the second value on a number is a symbol, of which a check knows nothing."""
    torch._dynamo.reset()
    x, target = torch.randn(8, 5), torch.randint(5, (8,))
    focal, cyclical = (
        FocalLoss(2.0, use_sigmoid=use_sigmoid),
        CyclicalFocalLoss(use_sigmoid=use_sigmoid),
    )
    compiled = torch.compile(lambda loss, x: loss(x, target), fullgraph=True, backend="eager")
    function = torch.compile(
        lambda x, gamma, epsilon: functional.poly1_focal_loss(
            x, target, gamma=gamma, epsilon=epsilon, use_sigmoid=use_sigmoid
        ),
        fullgraph=True,
        backend="eager",
    )
    for gamma in (2.0, 3.0, 1.5, 2.5):
        loss = FocalLoss(gamma, use_sigmoid=use_sigmoid)
        torch.testing.assert_close(compiled(loss, x), loss(x, target))
        if SEES_ATTRIBUTES:
            focal.gamma = gamma
            torch.testing.assert_close(compiled(focal, x), loss(x, target))
        expected = functional.poly1_focal_loss(
            x, target, gamma=gamma, epsilon=gamma / 2, use_sigmoid=use_sigmoid
        )
        torch.testing.assert_close(function(x, gamma, gamma / 2), expected)
    if not SEES_ATTRIBUTES:  # there the graph is broken where the progress is asked for
        compiled = torch.compile(lambda loss, x: loss(x, target), backend="eager")
    for progress in (0.1, 0.2, 0.23, 0.4, 0.9):
        cyclical.set_progress(progress)
        torch.testing.assert_close(compiled(cyclical, x), cyclical(x, target))


@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_torch_func_differentiates_and_maps(use_sigmoid):
    logits, target, _, _ = sigmoid_case(6, 4)
    target = target % 4

    def loss(x):
        return functional.poly1_focal_loss(
            x, target, epsilon=1.0, use_sigmoid=use_sigmoid, reduction="sum"
        )

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits), expected)
    hessian = torch.autograd.functional.hessian(loss, logits)
    got = torch.func.jacrev(torch.func.jacrev(loss))(logits)
    torch.testing.assert_close(got, hessian)
    torch.testing.assert_close(torch.func.hessian(loss)(logits), hessian)
    value, slope = torch.func.jvp(loss, (logits,), (batch := torch.ones_like(logits),))
    torch.testing.assert_close(value, loss(logits))
    torch.testing.assert_close(slope, (expected * batch).sum())
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(logits, 3 * batch))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, 3 * slope)
    batch = torch.stack([logits, 2 * logits])
    torch.testing.assert_close(
        torch.vmap(loss)(batch), torch.stack([loss(logits), loss(2 * logits)])
    )


def test_a_weight_that_is_trained_gets_its_gradient():
    logits, target, weight, _ = sigmoid_case(5, 3)
    weight.requires_grad_()
    functional.focal_loss(logits, target, weight, use_sigmoid=True, reduction="sum").backward()
    expected = functional.focal_loss(logits, target, use_sigmoid=True, reduction="none")
    torch.testing.assert_close(weight.grad, expected)


def test_an_unknown_path_is_refused():
    with pytest.raises(UserError, match="path='fast': expected one of auto, blocked, composed"):
        use_path("fast")
    code = "import polyfocal"
    environment = {**os.environ, "POLYFOCAL_OPS": "fast"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "POLYFOCAL_OPS='fast'" in done.stderr


def test_triton_kernels_by_its_interpreter():
    pytest.importorskip("triton", "3.0", reason="needs triton 3, which interprets on a CPU")
    checks = Path(__file__).with_name("check_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, checks], env=environment, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this triton does not run beside NumPy 2.4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 cases" in done.stdout


def test_the_gpu_check_runs_without_a_gpu(tmp_path):
    """It is run where there is one, rarely: here it is only seen to reach the kernels."""
    pytest.importorskip("triton", "3.0", reason="needs triton 3, which interprets on a CPU")
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
    command = [sys.executable, script, "--parts", "repeat", "--out", tmp_path / "found"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stdout + done.stderr:
        pytest.skip("the interpreter of this triton does not run beside NumPy 2.4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "repeat" in json.loads((tmp_path / "found.json").read_text())["parts"]


def test_fused_is_what_runs(monkeypatch):
    called = []
    original = cpu.sigmoid
    monkeypatch.setattr(fused.cpu, "sigmoid", lambda *a, **k: called.append(1) or original(*a, **k))
    logits = torch.randn(5, 3).requires_grad_()
    labels = torch.zeros(5, dtype=torch.int64)
    functional.focal_loss(logits, labels, use_sigmoid=True).backward()
    assert len(called) == 1  # the gradient of a small input is computed with the loss
    monkeypatch.setattr(cpu, "_KEEP", 14)
    functional.focal_loss(logits, labels, use_sigmoid=True).backward()
    assert len(called) == 3
