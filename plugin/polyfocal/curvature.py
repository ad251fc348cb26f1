"""Curvature of a loss surface: the Hessian of a training loss over chosen parameters of a model.

The Hessian H, (n, n), of the mean of the losses of some batches is never formed. It is multiplied
by vectors, H v = d/dw (g(w) . v), by differentiating the gradient once more (Pearlmutter 1994).
That needs the graph of one batch's gradient: about the memory of two ordinary gradient
computations, whatever the number of batches. Only chosen parameters count: no graph is made of the
rest of the model.

=========================  ====================================================================
:func:`frozen`             a model whose loss is a function of its parameters only
:class:`Hessian`           products with vectors
:func:`eigenvalues`        the largest ones, Lanczos with full reorthogonalisation
:func:`trace`              Hutchinson or Hutch++, with the standard error
:func:`spectral_density`   where the eigenvalues lie, stochastic Lanczos quadrature
:func:`hutchinson_trace`   the trace as a term of a loss, differentiable
=========================  ====================================================================

Every function is deterministic: random vectors come from a generator with the given seed, and
the global generators of Python, NumPy and torch are left as they were.
"""

import contextlib
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polyfocal.data.files import written_whole
from polyfocal.errors import UserError

BRANCH = r"(^|\.)[^.]*cls[^.]*\."
"""Names of the parameters of a detector's classification branch: ``bbox_head.cls_convs.0.weight``,
``bbox_head.retina_cls.bias``, ``roi_head.bbox_head.fc_cls.weight``, ``bbox_head.cls_branches.0...``
"""

_BLOCK = 8  # vectors that are multiplied while one batch's graph is there


def select_parameters(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """The trainable parameters whose names match.

    Args:
        model: Any module.
        pattern: A regular expression that is searched for in ``model.named_parameters()``. None
            means the classification branch (:data:`BRANCH`), and for a model without one, such as
            a classifier, all.

    Raises:
        UserError: The pattern is no regular expression, or no trainable parameter matches.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if pattern is None:
        return {name: p for name, p in trainable.items() if re.search(BRANCH, name)} or trainable
    try:
        chosen = {name: p for name, p in trainable.items() if re.search(pattern, name)}
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}.") from error
    if not chosen:
        some = ", ".join(list(trainable)[-4:])
        raise UserError(
            f"no trainable parameter of the {type(model).__name__} has a name that matches"
            f" {pattern!r}; there are {len(trainable)}, such as {some}."
        )
    return chosen


@contextlib.contextmanager
def frozen(model: nn.Module, pattern: str | None = None) -> Iterator[dict[str, nn.Parameter]]:
    """Makes a model's loss a smooth function of the chosen parameters, inside the block.

    - Modules without submodules are in evaluation mode: batch normalisation uses its running
      statistics (its weight and bias are parameters like any other), and dropout lets everything
      through. With the statistics of the batch the loss would couple the samples, and another
      batch size would give another surface. Containers, such as a detector, stay as they are,
      because some compute no loss in evaluation mode. What is random in them (functional dropout,
      sampling of regions) is one fixed draw, see :class:`Hessian`.
    - Parameters that were not chosen are constants.

    Args:
        model: Any module; mode and ``requires_grad`` are put back at the end.
        pattern: See :func:`select_parameters`.

    Yields:
        The chosen parameters by name.

    Raises:
        UserError: See :func:`select_parameters`.
    """
    chosen = select_parameters(model, pattern)
    # Attention reads the mode for the dropout of its weights, and has submodules.
    leaves = [
        module
        for module in model.modules()
        if not any(module.children()) or isinstance(module, nn.MultiheadAttention)
    ]
    modes = [module.training for module in leaves]
    constants = [p for name, p in model.named_parameters() if name not in chosen]
    flags = [p.requires_grad for p in constants]
    for module in leaves:
        module.training = False
    for p in constants:
        p.requires_grad_(False)
    try:
        yield chosen
    finally:
        for module, mode in zip(leaves, modes, strict=True):
            module.training = mode
        for p, flag in zip(constants, flags, strict=True):
            p.requires_grad_(flag)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch inside the block, and puts them back.

    Args:
        seed: Any whole number.
        device: Where torch draws beside the CPU; None for nowhere.
    """
    numpy: Any = sys.modules.get("numpy")  # what nobody has imported draws nothing
    python, legacy = random.getstate(), numpy and numpy.random.get_state()
    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else []):
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        if device is None or device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(legacy)


class Hessian:
    """The Hessian of the mean of some losses, multiplied by vectors and never formed.

    The vectors are the chosen parameters, flattened, one after the other. A parameter that a loss
    does not depend on has zeros there. The graph of the last batch's gradient is kept, so that
    with one batch no product needs another forward pass. A change of a parameter makes a new graph.

    Args:
        losses: One function for each batch; it computes a scalar loss from the model's present
            parameters and has no arguments. The model should be :func:`frozen`.
        parameters: Leaf tensors that require a gradient, of one dtype (float32 or float64) and on
            one device.
        seed: The generators of Python, NumPy and torch are seeded with it, plus the number of the
            batch, before a loss is computed, and put back afterwards: what is random in the loss is
            one fixed draw.

    Raises:
        UserError: A loss or a parameter is none of these, or an operation between a chosen
            parameter and a loss has no second derivative.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = lambda: nn.functional.cross_entropy(layer(x), y)
        >>> hessian = Hessian([loss], layer.parameters())
        >>> hessian.multiply(torch.ones(1, hessian.size)).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        losses: Sequence[Callable[[], Tensor]],
        parameters: Iterable[Tensor],
        *,
        seed: int = 0,
    ) -> None:
        self.losses = list(losses)
        self.parameters = list(parameters)
        self.seed = seed
        if not self.losses or not self.parameters:
            raise UserError(
                f"a Hessian needs a loss and a parameter, got {len(self.losses)} losses and"
                f" {len(self.parameters)} parameters."
            )
        kinds = {(p.dtype, p.device) for p in self.parameters}
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        if len(kinds) > 1 or self.dtype not in (torch.float32, torch.float64):
            found = ", ".join(sorted({f"{dtype} on {device}" for dtype, device in kinds}))
            raise UserError(
                "the parameters of a Hessian must all be float32, or all float64, on one device,"
                f" got {found}."
            )
        self.size = sum(p.numel() for p in self.parameters)
        self._kept: tuple[tuple[int, ...], list[Tensor | None]] | None = None

    def multiply(self, vectors: Tensor) -> Tensor:
        """H v for each row v.

        Args:
            vectors: (k, n), of the parameters' dtype and device.

        Returns:
            (k, n), detached.
        """
        if vectors.shape[1:] != (self.size,):
            raise UserError(
                f"vectors must be (k, {self.size}), a row for each, got {tuple(vectors.shape)}."
            )
        products = torch.zeros_like(vectors)
        for number in range(len(self.losses)):
            gradient = self._gradient(number)
            for vector, product in zip(vectors, products, strict=True):
                product += self._product(gradient, vector)
        return products / len(self.losses)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean of the losses."""
        return sum(float(self._loss(number)) for number in range(len(self.losses))) / len(
            self.losses
        )

    def _loss(self, number: int) -> Tensor:
        with seeded(self.seed + number, self.device), _differentiable_attention():
            return self.losses[number]()

    def _gradient(self, number: int) -> list[Tensor | None]:
        """The gradient of one batch's loss, with its graph; None where it does not depend."""
        state = (number, *(p._version for p in self.parameters))
        if self._kept is None or self._kept[0] != state:
            self._kept = None  # before the next graph takes memory
            with torch.enable_grad():
                loss = self._loss(number)
                _check_loss(loss)
                self._kept = state, _gradient(loss, self.parameters)
        return self._kept[1]

    def _product(self, gradient: list[Tensor | None], vector: Tensor) -> Tensor:
        parts = _split(vector, self.parameters)
        products = _second_derivative(gradient, self.parameters, parts)
        flat = [
            torch.zeros_like(p).flatten() if product is None else product.detach().flatten()
            for p, product in zip(self.parameters, products, strict=True)
        ]
        return torch.cat(flat)


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues that were found.

    Attributes:
        values: In falling order, (k,) float64 on the CPU.
        errors: Within this distance of each value there is an eigenvalue: the norm of the
            residual of its Ritz pair, (k,). The value itself is usually much closer.
        steps: Products that it took.
    """

    values: Tensor
    errors: Tensor
    steps: int


def eigenvalues(
    hessian: Hessian, k: int = 1, *, steps: int = 100, tolerance: float = 1e-3, seed: int = 0
) -> Eigenvalues:
    """The k largest eigenvalues, by Lanczos with full reorthogonalisation.

    It ends when all their errors are below ``tolerance`` times the largest in magnitude, after
    ``steps`` products, or when the space is exhausted. The vectors are kept: steps x n numbers at
    most. Like any Krylov method it finds an eigenvalue that occurs several times only once; such
    eigenvalues need a symmetric model.

    Args:
        hessian: Of n parameters.
        k: How many, in [1, n]; largest with their sign, not in magnitude.
        steps: Most products, >= k.
        tolerance: Relative, > 0.
        seed: Seed of the random start.

    Raises:
        UserError: A number is out of its range, or the Hessian has entries that are not finite.
    """
    check_eigenvalues(k, steps, hessian.size)
    if tolerance <= 0:
        raise UserError(f"tolerance={tolerance}: expected a number above 0.")
    found: Eigenvalues | None = None

    def good_enough(diagonal: list[float], off_diagonal: list[float]) -> bool:
        nonlocal found
        if len(diagonal) < k:
            return False
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
        errors = (off_diagonal[-1] * vectors[-1]).abs()
        found = Eigenvalues(values[-k:].flip(0), errors[-k:].flip(0), len(diagonal))
        return bool(found.errors.max() <= tolerance * values.abs().max())

    _lanczos(hessian, _generator(hessian, seed), min(steps, hessian.size), good_enough)
    assert found is not None  # steps >= k, and a shorter Krylov space is extended
    return found


def check_eigenvalues(k: int, steps: int, size: int | None = None) -> None:
    """Raises UserError for numbers that :func:`eigenvalues` refuses; ``size`` is n, if known."""
    if k < 1 or (size is not None and k > size):
        expected = "1 or more" if size is None else f"1 to {size}"
        raise UserError(f"k={k} eigenvalues are asked for: expected {expected}.")
    if steps < k:
        raise UserError(f"steps={steps} products cannot give k={k} eigenvalues: expected >= {k}.")


@dataclass(frozen=True)
class Estimate:
    """A random estimate and its error.

    Attributes:
        value: The estimate, without bias.
        standard_error: Standard deviation of the estimate, estimated from the spread of the random
            samples; useful from about ten samples on.
    """

    value: float
    standard_error: float


def trace(
    hessian: Hessian, probes: int = 16, *, method: str = "hutchinson", seed: int = 0
) -> Estimate:
    """The trace, that is the sum of all eigenvalues, from ``probes`` products.

    ``'hutchinson'``: the mean of v . H v over random signs v (Hutchinson 1990), whose variance is
    2 (|H|_F^2 - sum H_ii^2). ``'hutch++'`` (Meyer et al. 2021, algorithm 1): a third of the
    products finds a subspace Q with most of H, another third takes the trace there exactly, and
    the rest is Hutchinson's estimate of the remainder. It has the smaller error if few eigenvalues
    carry the trace, and keeps three times probes/3 vectors.

    Args:
        hessian: Of n parameters.
        probes: Products in all, >= 2, for Hutch++ >= 4.
        method: ``'hutchinson'`` or ``'hutch++'``.
        seed: Seed of the random signs.

    Raises:
        UserError: There is no such method, or there are too few probes.
    """
    check_trace(probes, method)
    generator = _generator(hessian, seed)
    exact, basis = 0.0, None
    if method == "hutch++":
        rank = probes // 3
        sketch = hessian.multiply(_signs(hessian, rank, generator))
        basis = torch.linalg.qr(sketch.T).Q.T
        exact = float((basis * hessian.multiply(basis)).sum(dtype=torch.float64))
        probes -= 2 * rank
    samples: list[Tensor] = []
    for start in range(0, probes, _BLOCK):
        v = _signs(hessian, min(_BLOCK, probes - start), generator)
        if basis is not None:
            v = v - (v @ basis.T) @ basis
        samples.append((v * hessian.multiply(v)).sum(dim=1, dtype=torch.float64))
    forms = torch.cat(samples)
    _check_finite(forms)
    return Estimate(exact + float(forms.mean()), float(forms.std()) / probes**0.5)


def check_trace(probes: int, method: str = "hutchinson") -> None:
    """Raises UserError for settings that :func:`trace` refuses."""
    fewest = {"hutchinson": 2, "hutch++": 4}
    if method not in fewest:
        raise UserError(f"method={method!r}: expected one of {', '.join(fewest)}.")
    if probes < fewest[method]:
        raise UserError(f"probes={probes}: {method} needs {fewest[method]} or more.")


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues as weighted points.

    Attributes:
        values: Where the points lie, (m,) float64.
        weights: Part of all eigenvalues for which each stands, (m,), sum 1.
    """

    values: Tensor
    weights: Tensor

    def smooth(self, grid: Tensor, width: float) -> Tensor:
        """The density with each point spread to a Gaussian, whose integral is 1.

        Args:
            grid: Where to evaluate, (g,).
            width: Standard deviation of the Gaussians, > 0.

        Returns:
            (g,) float64.
        """
        z = (grid.double().unsqueeze(1) - self.values) / width
        return torch.exp(-0.5 * z**2) @ self.weights / (width * (2 * torch.pi) ** 0.5)

    def draw(self, file: str | Path) -> None:
        """Draw it on a logarithmic scale, smoothed by a hundredth of its width.

        Args:
            file: A picture; its ending says the format.

        Raises:
            UserError: It cannot be written.
        """
        from matplotlib.figure import Figure

        low, high = float(self.values.min()), float(self.values.max())
        width = max(high - low, abs(high), 1e-12) / 100
        grid = torch.linspace(low - 5 * width, high + 5 * width, 1000, dtype=torch.float64)
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.semilogy(grid, self.smooth(grid, width).clamp(min=1e-9 / width), color="#0072B2")
        axes.set(xlabel="eigenvalue of the Hessian", ylabel="density")
        axes.set_ylim(bottom=1e-7 / width)
        axes.grid(alpha=0.3)
        with written_whole(file) as part:
            figure.savefig(part, dpi=150)


def spectral_density(
    hessian: Hessian, probes: int = 4, *, steps: int = 40, seed: int = 0
) -> SpectralDensity:
    """Where the eigenvalues lie, by stochastic Lanczos quadrature (Ubaru et al. 2017).

    Each probe is a random start of a Lanczos run, whose Ritz values and squared first components
    are the Gauss quadrature of the spectrum as the start weighs it. Moments up to 2 steps - 1 are
    right in the mean over probes.

    Args:
        hessian: Of n parameters.
        probes: Runs, >= 1.
        steps: Products of each run, >= 1; as many points.
        seed: Seed of the random starts.

    Raises:
        UserError: A number is out of its range, or the Hessian has entries that are not finite.
    """
    for name, number in (("probes", probes), ("steps", steps)):
        if number < 1:
            raise UserError(f"{name}={number}: expected 1 or more.")
    generator = _generator(hessian, seed)
    values, weights = [], []
    for _ in range(probes):
        diagonal, off_diagonal = _lanczos(
            hessian, generator, min(steps, hessian.size), lambda _, betas: betas[-1] == 0
        )
        points, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
        values.append(points)
        weights.append(vectors[0] ** 2 / probes)
    return SpectralDensity(torch.cat(values), torch.cat(weights))


def hutchinson_trace(
    loss: Tensor,
    parameters: Iterable[Tensor],
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The Hessian's trace as a term of a loss: Hutchinson's estimate, differentiable.

    Its gradient, a third derivative of the loss, goes to everything on which the loss depends, not
    only to ``parameters``. The Hessian is that of the loss as it was computed, for example with the
    statistics of the batch and a draw of dropout.

    Args:
        loss: A scalar with its graph.
        parameters: Leaf tensors over which the trace is taken.
        probes: Random vectors, >= 1; one is without bias.
        generator: Source of the random signs, on the parameters' device.

    Returns:
        A scalar, which can be negative where the surface is not convex.

    Raises:
        UserError: The path to the parameters has an operation without a second derivative, or
            there is no probe.
    """
    if probes < 1:
        raise UserError(f"probes={probes}: the trace needs 1 or more.")
    parameters = list(parameters)
    _check_loss(loss)
    gradient = _gradient(loss, parameters)
    total = loss.new_zeros(())
    for _ in range(probes):
        signs = [_random_signs(p.shape, p, generator) for p in parameters]
        products = _second_derivative(gradient, parameters, signs, create_graph=True)
        for sign, product in zip(signs, products, strict=True):
            if product is not None:
                total = total + (sign * product).sum()
    return total / probes


def _gradient(loss: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    if all(g is None for g in gradient):
        raise UserError("the loss does not depend on any of the chosen parameters.")
    return list(gradient)


def _second_derivative(
    gradient: list[Tensor | None],
    parameters: list[Tensor],
    vectors: Sequence[Tensor],
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """d/dw (gradient . vectors) for each parameter; None where it does not depend on it."""
    # A loss that is linear in a parameter has a constant gradient there.
    pairs = [
        (g, v) for g, v in zip(gradient, vectors, strict=True) if g is not None and g.requires_grad
    ]
    if not pairs:
        return [None] * len(parameters)
    outputs, upstream = zip(*pairs, strict=True)
    try:
        return torch.autograd.grad(
            outputs,
            parameters,
            upstream,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except (RuntimeError, NotImplementedError) as error:
        missing = re.search(r"derivative for (\S+) is not implemented", str(error))
        if missing is None:
            raise
        raise _no_second_derivative(missing[1]) from error


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"a loss must be one number, got {shape}: take its mean or sum.")
    if not loss.requires_grad:
        raise UserError("the loss does not depend on any of the chosen parameters.")
    # All of the graph belongs to the chosen parameters, or is passed by their gradient in any case.
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        function: Any = getattr(node, "_forward_cls", None)
        backward = getattr(function, "backward", None)
        # The decorator's wrapper is the one that holds what it wraps and lives in torch's file.
        file = getattr(getattr(backward, "__code__", None), "co_filename", None)
        if file == once_differentiable.__code__.co_filename and hasattr(backward, "__wrapped__"):
            raise _no_second_derivative(function.__name__)


def _no_second_derivative(operation: str) -> UserError:
    return UserError(
        f"{operation} lies between the chosen parameters and the loss and has no second"
        " derivative: choose parameters behind it, or a loss that is made without it (the losses"
        " of this package have one)."
    )


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Scaled dot product attention by plain operations: the fused ones have no 2nd derivative."""
    backends = torch.backends.cuda
    before = backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()
    backends.enable_flash_sdp(False)
    backends.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        backends.enable_flash_sdp(before[0])
        backends.enable_mem_efficient_sdp(before[1])


def _lanczos(
    hessian: Hessian,
    generator: torch.Generator,
    steps: int,
    stop: Callable[[list[float], list[float]], bool],
) -> tuple[list[float], list[float]]:
    """The diagonal of T, and the entries below it, of which the last leads out of T.

    If the Krylov space is exhausted, the last entry is 0. If ``stop`` then lets the iteration
    continue, it does so with a new random vector.
    """
    basis: list[Tensor] = []
    vector = _normalised(_normal(hessian, generator))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    norm = 0.0  # of H, from below
    while True:
        basis.append(vector)
        product = hessian.multiply(vector.unsqueeze(0))[0]
        _check_finite(product)
        diagonal.append(float(vector @ product))
        product = _orthogonal(product, basis)
        beta = float(product.norm())
        norm = max(norm, abs(diagonal[-1]), beta)
        if beta <= norm * hessian.size**0.5 * torch.finfo(hessian.dtype).eps:
            beta = 0.0
        off_diagonal.append(beta)
        if stop(diagonal, off_diagonal) or len(diagonal) == steps:
            return diagonal, off_diagonal
        if beta == 0:
            product = _orthogonal(_normal(hessian, generator), basis)
        vector = _normalised(product)


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):  # twice is enough (Kahan, in Parlett 1980)
        for other in basis:
            vector = torch.addcmul(vector, other, other @ vector, value=-1)
    return vector


def _tridiagonal(diagonal: list[float], off_diagonal: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    return matrix + torch.diag(torch.tensor(off_diagonal[:-1], dtype=torch.float64), -1)


def _generator(hessian: Hessian, seed: int) -> torch.Generator:
    return torch.Generator(hessian.device).manual_seed(seed)


def _normal(hessian: Hessian, generator: torch.Generator) -> Tensor:
    return torch.randn(
        hessian.size, generator=generator, dtype=hessian.dtype, device=hessian.device
    )


def _signs(hessian: Hessian, count: int, generator: torch.Generator) -> Tensor:
    return _random_signs((count, hessian.size), hessian.parameters[0], generator)


def _random_signs(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(2, tuple(shape), generator=generator, device=like.device)
    return bits.to(like.dtype).mul_(2).sub_(1)


def _normalised(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def _split(vector: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise UserError(
            "the Hessian has entries that are not finite: are the weights and the loss?"
        )
