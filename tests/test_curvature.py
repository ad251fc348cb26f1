"""Curvature, compared with the Hessian written out in full by torch.func.hessian, in float64."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy, dropout

from polyfocal import curvature
from polyfocal.curvature import Hessian, eigenvalues, frozen, select_parameters, spectral_density
from polyfocal.errors import UserError
from polyfocal.losses import FocalLoss, Poly1FocalLoss


class Net(nn.Module):
    """A small classifier with batch normalisation and dropout, as a module and as a function."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.fc_cls = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.nn.functional.softplus(self.norm(self.stem(x)))
        return self.fc_cls(self.drop(x.flatten(1)))


def softmax_focal(logits, target):
    p_t = logits.softmax(1).gather(1, target.unsqueeze(1))
    return ((1 - p_t) ** 2 * -p_t.log()).mean()


def sigmoid_poly1(logits, target):
    positive = torch.eye(logits.shape[1], dtype=logits.dtype)[target]
    p_t = (logits * (2 * positive - 1)).sigmoid()
    alpha_t = 0.75 - 0.5 * positive
    return (alpha_t * ((1 - p_t) ** 2 * -p_t.log() + (1 - p_t) ** 3)).mean()


LOSSES = {
    "cross-entropy": (cross_entropy, cross_entropy),
    "focal": (FocalLoss(gamma=2.0, alpha=None, use_sigmoid=False), softmax_focal),
    "poly1, sigmoid": (Poly1FocalLoss(epsilon=1.0, use_sigmoid=True), sigmoid_poly1),
}


@pytest.fixture(params=list(LOSSES))
def problem(request):
    """A model, its losses on two batches, and its exact Hessian's maker."""
    loss, written_out = LOSSES[request.param]
    torch.manual_seed(0)
    net = Net().double()
    batches = [(torch.randn(n, 1, 4, 4).double(), torch.randint(3, (n,))) for n in (6, 9)]
    for x, _ in batches:  # moves the running statistics away from 0 and 1
        net(x)

    def exact(names):
        """The Hessian of the mean of the two losses, from another kind of differentiation."""
        chosen = {name: p.detach() for name, p in net.named_parameters() if name in names}
        rest = {name: p for name, p in net.state_dict().items() if name not in names}
        evaluated = Net().double().eval()
        evaluated.load_state_dict(net.state_dict())

        def mean(flat):
            parts = flat.split([p.numel() for p in chosen.values()])
            new = {n: v.view_as(p) for (n, p), v in zip(chosen.items(), parts, strict=True)}
            outputs = [functional_call(evaluated, {**rest, **new}, (x,)) for x, _ in batches]
            pairs = zip(outputs, batches, strict=True)
            return sum(written_out(logits, y) for logits, (_, y) in pairs) / 2

        return hessian(mean)(torch.cat([p.flatten() for p in chosen.values()]))

    return net, [lambda x=x, y=y: loss(net(x), y) for x, y in batches], exact


@pytest.mark.parametrize("pattern", [".", "fc_cls", "stem|norm"])
def test_products_and_eigenvalues_are_exact(problem, pattern):
    net, losses, exact = problem
    with frozen(net, pattern) as chosen:
        matrix = exact(chosen)
        ours = Hessian(losses, chosen.values())
        torch.testing.assert_close(ours.multiply(torch.eye(ours.size).double()), matrix)
        assert ours.loss() == pytest.approx(sum(float(loss()) for loss in losses) / 2)
        expected = torch.linalg.eigvalsh(matrix).flip(0)
        found = eigenvalues(ours, 5, tolerance=1e-7)
        torch.testing.assert_close(found.values, expected[:5], rtol=0, atol=1e-6)
        rough = eigenvalues(ours, 2, steps=6)
    assert rough.steps <= 6
    distance = (rough.values.unsqueeze(1) - expected).abs().amin(dim=1)
    assert (distance <= rough.errors + 1e-12).all() and rough.errors.max() > 0


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_is_within_its_error(problem, method):
    net, losses, exact = problem
    with frozen(net, ".") as chosen:
        expected = float(exact(chosen).trace())
        ours = Hessian(losses, chosen.values())
        estimates = [curvature.trace(ours, 30, method=method, seed=seed) for seed in range(20)]
        again = curvature.trace(ours, 30, method=method, seed=0)
    assert again == estimates[0]
    z = torch.tensor([(e.value - expected) / e.standard_error for e in estimates])
    # Twenty draws: the error that is stated is the error that there is, and there is no bias.
    assert 0.5 < z.std() < 1.6 and z.mean().abs() < 0.8 and z.abs().max() < 4.5


def test_hutch_plus_plus_has_the_smaller_error_and_ends_exact(problem):
    net, losses, exact = problem
    with frozen(net, ".") as chosen:
        ours = Hessian(losses, chosen.values())
        plain, better = (
            curvature.trace(ours, 60, method=method) for method in ("hutchinson", "hutch++")
        )
        full = curvature.trace(ours, 4 * ours.size, method="hutch++")
        assert full.value == pytest.approx(float(exact(chosen).trace()), abs=1e-9)
    assert better.standard_error < plain.standard_error / 2 and full.standard_error < 1e-9


def test_spectral_density(problem):
    net, losses, exact = problem
    with frozen(net, ".") as chosen:
        values = torch.linalg.eigvalsh(exact(chosen))
        ours = Hessian(losses, chosen.values())
        density = spectral_density(ours, probes=60, steps=8)
    assert float(density.weights.sum()) == pytest.approx(1)
    # Probes of random directions: the first moments, and the smoothed density, of all eigenvalues.
    scale = float(values.abs().max())
    for power in (1, 2, 3):
        expected = (values**power).mean() / scale**power
        moment = (density.weights * density.values**power).sum() / scale**power
        assert float(moment) == pytest.approx(float(expected), abs=0.01)
    grid = torch.linspace(-scale, 2 * scale, 400).double()
    width = scale / 4
    gauss = torch.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).mean(1)
    gauss /= width * (2 * torch.pi) ** 0.5
    ours = density.smooth(grid, width)
    assert float(torch.trapezoid(ours, grid)) == pytest.approx(1, abs=1e-2)
    assert torch.trapezoid((ours - gauss).abs(), grid) < 0.05


def quadratic(matrix):
    """The Hessian of x A x / 2, which is A."""
    x = torch.zeros(len(matrix), dtype=matrix.dtype, requires_grad=True)
    return Hessian([lambda: x @ matrix @ x / 2 + x.sum()], [x])


def test_lanczos_where_the_space_ends():
    # Three different eigenvalues, so the Krylov space of any start has three dimensions.
    ours = quadratic(torch.diag(torch.tensor([5.0, 2, 2, 2, -7]).double()))
    assert eigenvalues(ours, 3, tolerance=1e-9).values.tolist() == pytest.approx([5, 2, -7])
    density = spectral_density(ours, probes=1, steps=5)
    assert density.values.tolist() == pytest.approx([-7, 2, 5])
    # More eigenvalues are asked for: another start finds the copies.
    assert eigenvalues(ours, 5).values.tolist() == pytest.approx([5, 2, 2, 2, -7])
    zero = quadratic(torch.zeros(3, 3).double())
    assert eigenvalues(zero, 2).values.tolist() == [0, 0]
    assert curvature.trace(zero).value == 0


def test_signs_make_the_trace_of_a_diagonal_exact():
    assert curvature.trace(quadratic(torch.diag(torch.arange(4.0)))) == curvature.Estimate(6.0, 0.0)


def test_float32_model_of_many_parameters():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y = torch.randn(32, 20), torch.randint(10, (32,))
    ours = Hessian([lambda: cross_entropy(net(x), y)], net.parameters())
    net64 = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10)).double()
    net64.load_state_dict(net.state_dict())
    other = Hessian([lambda: cross_entropy(net64(x.double()), y)], net64.parameters())
    single, double = (eigenvalues(h, 3).values for h in (ours, other))
    torch.testing.assert_close(single, double, rtol=1e-3, atol=0)


def test_the_graph_follows_the_weights():
    x = torch.ones(1, requires_grad=True)
    calls = []
    ours = Hessian([lambda: calls.append(0) or (x**3).sum()], [x])
    one = torch.ones(1, 1)
    assert [ours.multiply(one).item(), ours.multiply(2 * one).item()] == [6, 12]
    assert len(calls) == 1, "one batch: its graph is used again"
    with torch.no_grad():
        x.add_(1)
    assert ours.multiply(one).item() == 12


def test_the_model_is_left_as_it_was(problem):
    net, losses, _ = problem
    net.stem.bias.requires_grad_(False)
    net.drop.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    modes = {name: module.training for name, module in net.named_modules()}
    random = torch.get_rng_state()
    with frozen(net, ".") as chosen:
        assert "stem.bias" not in chosen, "what is not trained is no direction of training"
        assert net.training and not net.norm.training
        curvature.trace(Hessian(losses, chosen.values()), 4)
    assert flags == {name: p.requires_grad for name, p in net.named_parameters()}
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_randomness_in_the_loss_is_one_draw():
    x = torch.ones(50, dtype=torch.float64, requires_grad=True)
    ours = Hessian([lambda: dropout((x**2), 0.5).sum()] * 2, [x])
    diagonal = ours.multiply(torch.ones(1, 50).double())
    assert torch.equal(diagonal, ours.multiply(torch.ones(1, 50).double()))
    assert set(diagonal.unique().tolist()) == {0, 2, 4}, "two batches, two draws"


DRAWS = {
    "random": lambda: [random.random() for _ in range(50)],
    "numpy": lambda: np.random.random(50).tolist(),
    "torch": lambda: torch.rand(50).tolist(),
}


@pytest.mark.parametrize("library", list(DRAWS))
def test_what_any_library_draws_in_the_loss_is_one_draw(library):
    """The second derivatives of sum(d x^2) are 2 d: so the product shows the draw d itself."""
    draw = DRAWS[library]
    x = torch.ones(50, dtype=torch.float64, requires_grad=True)
    ours = Hessian([lambda: (torch.tensor(draw()).double() * x**2).sum()] * 2, [x])
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    diagonal = ours.multiply(torch.ones(1, 50).double())
    assert torch.equal(diagonal, ours.multiply(torch.ones(1, 50).double()))
    assert 0.1 < diagonal.std() < 0.9 and (diagonal > 0).all()
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert np.random.get_state()[1].tolist() == states[1]


def test_attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.3).double()
    x = torch.randn(2, 5, 8).double()
    with frozen(layer, "in_proj_bias") as chosen:
        ours = Hessian([lambda: layer(x).square().sum()], chosen.values())
        matrix = ours.multiply(torch.eye(ours.size).double())
    torch.testing.assert_close(matrix, matrix.T)
    before = layer.self_attn.in_proj_bias.detach().clone()
    layer.train(False)
    step, gradients = 1e-5, []
    layer.requires_grad_(True)
    for sign in (1, -1):
        layer.self_attn.in_proj_bias.data = before + sign * step * torch.eye(24).double()[10]
        layer.train()
        for module in layer.modules():
            if not any(module.children()) or isinstance(module, nn.MultiheadAttention):
                module.training = False
        loss = layer(x).square().sum()
        gradients.append(torch.autograd.grad(loss, layer.self_attn.in_proj_bias)[0])
    torch.testing.assert_close(
        matrix[10], (gradients[0] - gradients[1]) / (2 * step), rtol=1e-4, atol=1e-6
    )


def test_hutchinson_trace_is_differentiable():
    torch.manual_seed(0)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(3, dtype=torch.float64, requires_grad=True)

    # Over w the Hessian is diag(12 w^2) * sum(u^2): random signs give its trace without error.
    value = curvature.hutchinson_trace((w**4).sum() * (u**2).sum(), [w])
    expected = 12 * (w**2).sum() * (u**2).sum()
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(
        torch.autograd.grad(value, [w, u]), torch.autograd.grad(expected, [w, u]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_hutchinson_trace_needs_a_probe():
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(UserError, match="probes=0: the trace needs 1 or more"):
        curvature.hutchinson_trace((w**4).sum(), [w], probes=0)


@pytest.mark.parametrize("kind", ["focal", "poly1, sigmoid"])
def test_the_gradient_of_the_penalty_of_a_loss(kind):
    """The third derivative of a fused loss, against that of plain operations."""
    torch.manual_seed(0)
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    ours, plain = LOSSES[kind]
    value, expected = (
        curvature.hutchinson_trace(loss, [z], probes=3, generator=torch.Generator().manual_seed(1))
        for loss in (ours(z, y), plain(z, y))
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, z)[0] for each in (value, expected)))


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_second_derivative_for_soft_targets(target):
    x = torch.tensor([-4.0, -0.7, 0.0, 0.2, 3.0], dtype=torch.float64, requires_grad=True)
    y = torch.full_like(x, target).detach()

    def written_out(x):
        p = x.sigmoid()
        miss = y * (1 - p) + (1 - y) * p
        cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log())
        return ((0.25 * y + 0.75 * (1 - y)) * (miss**2 * cross_entropy + miss**3)).sum()

    def ours(x):
        return Poly1FocalLoss(epsilon=1.0, use_sigmoid=True, reduction="sum")(x[None], y[None])

    expected = hessian(written_out)(x.detach())
    found = Hessian([lambda: ours(x)], [x]).multiply(torch.eye(5).double())
    torch.testing.assert_close(found, expected)
    far = torch.tensor([-200.0, -100.0, 0.0, 100.0, 200.0], requires_grad=True)
    y = y.float()
    assert Hessian([lambda: ours(far)], [far]).multiply(torch.eye(5)).isfinite().all()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda x: Once.apply(x).square().sum(), "Once lies between .* no second derivative"),
        (lambda x: x * 2, r"a loss must be one number, got \(3,\)"),
        (lambda x: x.detach().sum(), "does not depend"),
        (lambda x: torch.ones(1, requires_grad=True).sum(), "does not depend"),
        (lambda x: (x / 0).square().sum(), "not finite"),
    ],
)
def test_bad_losses(loss, sentence):
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(UserError, match=sentence):
        eigenvalues(Hessian([lambda: loss(x)], [x]))


def test_an_operation_off_the_path_does_not_matter():
    net = nn.ModuleDict({"neck": nn.Linear(2, 2), "fc_cls": nn.Linear(2, 2)})
    x = torch.ones(1, 2)
    with frozen(net) as chosen:
        assert list(chosen) == ["fc_cls.weight", "fc_cls.bias"]
        ours = Hessian(
            [lambda: net["fc_cls"](Once.apply(net["neck"](x))).square().sum()], chosen.values()
        )
        assert eigenvalues(ours).values > 0


def test_bad_settings():
    net = Net()
    with pytest.raises(UserError, match=r"matches 'head'; there are 6, such as"):
        select_parameters(net, "head")
    with pytest.raises(UserError, match="not a regular expression"):
        select_parameters(net, "(")
    ours = quadratic(torch.eye(3))
    for call, sentence in (
        (lambda: eigenvalues(ours, 0), "k=0"),
        (lambda: eigenvalues(ours, 4), "expected 1 to 3"),
        (lambda: eigenvalues(ours, 2, steps=1), "steps=1"),
        (lambda: eigenvalues(ours, tolerance=0), "tolerance=0"),
        (lambda: curvature.trace(ours, 1), "probes=1"),
        (lambda: curvature.trace(ours, method="exact"), "hutchinson, hutch"),
        (lambda: spectral_density(ours, 0), "probes=0"),
        (lambda: ours.multiply(torch.ones(3)), r"\(k, 3\)"),
        (lambda: Hessian([], net.parameters()), "0 losses"),
        (lambda: Hessian([lambda: 0], net.half().parameters()), "float16"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
