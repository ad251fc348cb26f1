"""What holds of every loss for any input, tried on random ones.

The usual run takes few examples, the same ones each time. Many, other ones each time:
``python -m pytest tests/losses/test_properties.py --hypothesis-profile thorough -s``
"""

import os
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install 'polyfocal[test]'")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polyfocal.losses import (
    LOSSES,
    ClassificationLoss,
    DebiasingLoss,
    NoisedTopKLoss,
    ScheduledLoss,
)
from polyfocal.losses.base import keywords_of
from polyfocal.losses.settings import Number, Numbers

DEVICE = os.environ.get("POLYFOCAL_TEST_DEVICE", "cpu")  # see benchmarks/gpu_check.py
IGNORED = -100
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALVES)

number = st.floats(0, 6) | st.sampled_from([0.0, 0.5, 1.0, 2.0])
epsilon = st.floats(-1, 6) | st.sampled_from([-1.0, 0.0, 1.0])
alpha = st.none() | st.floats(0, 1)
smoothing = st.just(0.0) | st.floats(0, 0.5)
# Beyond 3.59 a part of the curve (1 + p)^gamma CE rises: gamma max_p(-p log p / (1 + p)) = 1.
gamma_hc = st.floats(0, 3.5)
moderate = st.floats(-12, 12)
far = st.sampled_from([0.0, 1e-3, -1e-3, 30.0, -30.0, 90.0, -90.0, 1e4, -1e4])
farther = far | st.sampled_from([1e30, -1e30])

# The settings of one loss, or of any, that take other values than those that they may have.
SPECIAL = {
    "gamma_hc": gamma_hc,
    "factor": st.floats(1, 6),
    "beta": number.filter(lambda beta: beta >= 0.2),  # at any epsilon
    "label_smoothing": smoothing,
    "k": st.just(1),
    "max_margin": st.floats(0.1, 1),
    "scale": st.floats(0.1, 50),
    "LDAMLoss.scale": st.floats(0.1, 30),
    "LDAMLoss.max_margin": st.just(0.5),
    "epsilons": st.tuples(epsilon, st.floats(-1 / 2, 3), st.floats(-1 / 3, 3)),
    "gammas": st.tuples(number, number, number),
    "edges": st.just((0.2, 0.5)),
    "AdaFocalLoss.gamma": st.floats(0.3, 5) | st.floats(-2, -0.3),
    "num_bins": st.just(3),
}
LEFT_OUT = ("use_sigmoid", "reduction", "loss_weight", "class_weight", "ignore_index", "rate")
LEFT_OUT += ("low", "high", "bias_weight")


def settings_of(name):
    """A strategy for every setting of a loss that its constructor takes."""
    cls, found = LOSSES[name], {}
    for key in keywords_of(cls):
        setting = cls.settings.get(key)
        if key in LEFT_OUT:
            continue
        if (special := SPECIAL.get(f"{name}.{key}", SPECIAL.get(key))) is not None:
            found[key] = special
        elif isinstance(setting, Number):
            low, high = max(setting.low, -6), min(setting.high, 6)
            inside = [value for value in (0.0, 0.5, 1.0, 2.0, low) if low <= value <= high]
            found[key] = st.floats(low, high) | st.sampled_from(inside)
        elif isinstance(setting, Numbers) and setting.single:
            found[key] = alpha
    return found


ALL = sorted(LOSSES)
COUNTED = [name for name in ALL if "class_counts" in keywords_of(LOSSES[name])]
TOPK = [name for name in ALL if issubclass(LOSSES[name], NoisedTopKLoss)]
HEATMAP = [name for name in ALL if not issubclass(LOSSES[name], ClassificationLoss)]
BIASED = [name for name in ALL if issubclass(LOSSES[name], DebiasingLoss)]
NOT_MONOTONE = [name for name in ALL if not LOSSES[name].monotone]
CALLS = 0


@pytest.fixture(scope="module", autouse=True)
def count_of_calls():
    yield
    print(f"\n{CALLS} calls of the losses")
    if settings.get_current_profile_name() == "thorough":
        assert CALLS >= 10_000


@dataclass
class Case:
    """A loss and what it is called with, by rows."""

    loss: torch.nn.Module
    rows: dict[str, torch.Tensor]
    heatmap: bool = False

    def of(self, index):
        """The case of these rows alone."""
        return replace(self, rows={name: value[index] for name, value in self.rows.items()})

    def __call__(self, reduction="none"):
        """The loss and its gradients for the logits, and for those of a bias model."""
        global CALLS
        CALLS += 1
        rows = {name: value.to(DEVICE, copy=True) for name, value in self.rows.items()}
        leaves = [rows[name] for name in ("pred", "bias_logits", "teacher_logits") if name in rows]
        for leaf in leaves:
            leaf.requires_grad_()
        value = self.loss.to(DEVICE)(**rows, reduction_override=reduction)
        gradients = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
        return value.detach().cpu(), tuple(gradient.cpu() for gradient in gradients)

    @property
    def toward_target(self):
        """Which way each entry has to go for p_t to grow: 1, -1, or 0 for no matter."""
        pred, target = self.rows["pred"], self.rows["target"]
        if self.heatmap:
            return torch.where(target == 1, 1.0, -1.0)
        positive = target.unsqueeze(1) == torch.arange(pred.shape[1])
        return torch.where(positive, 1.0, -1.0 if self.loss.use_sigmoid else 0.0)


def array(shape, elements, dtype):
    top = torch.finfo(dtype).max
    return arrays(np.float64, shape, elements=elements, fill=st.nothing()).map(
        lambda values: torch.from_numpy(values.clip(-top, top)).to(dtype)
    )


@st.composite
def cases(draw, name, *, elements=farther, dtypes=DTYPES, plain=False, rows=None):
    """A case of the loss of that name; plain: labels, and settings of which p_t alone decides."""
    count = draw(st.integers(0, 6)) if rows is None else rows
    dtype = draw(st.sampled_from(dtypes))
    columns = draw(st.integers(2 if name in TOPK else 1, 5))
    shape = count, columns
    seed = draw(st.integers(0, 2**31))
    cls = LOSSES[name]
    chosen = {key: draw(value) for key, value in settings_of(name).items()}
    chosen["loss_weight"] = draw(st.sampled_from([1.0, 0.0, 2.5]))
    held = {}
    if name in HEATMAP:
        unit = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
        # The gradient for a probability is up to 1e12, beyond float16's range.
        dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        held["pred"] = draw(array(shape, unit, dtype))
        held["target"] = draw(array(shape, unit, torch.float32))
        held["weight"] = draw(array(shape, st.floats(0, 4), torch.float32))
        return Case(cls(**chosen), held, heatmap=True)
    only = cls.settings["use_sigmoid"].only
    sigmoid = draw(st.booleans()) if only is None else only
    if sigmoid or plain:
        chosen.pop("label_smoothing", None)
    if name in COUNTED:
        chosen["class_counts"] = draw(
            st.lists(st.integers(1, 500), min_size=columns, max_size=columns)
        )
    if draw(st.booleans()):
        weights = st.lists(st.floats(0, 4), min_size=columns, max_size=columns)
        chosen["class_weight"] = draw(weights)
    loss = cls(use_sigmoid=sigmoid, ignore_index=IGNORED, **chosen)
    if isinstance(loss, ScheduledLoss):
        loss.set_progress(draw(st.floats(0, 1)))
    if name == "AdaFocalLoss":
        low, high = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
        loss.edges.copy_(torch.tensor([low, high]))
    held["pred"] = draw(array(shape, moderate | elements, dtype))
    generator = torch.Generator().manual_seed(seed)
    takes_soft = cls.soft_targets and not chosen.get("label_smoothing")
    if takes_soft and not plain and draw(st.booleans()):
        soft = torch.rand(shape, generator=generator)
        held["target"] = soft if sigmoid else torch.softmax(8 * soft, dim=1)
    else:
        top = columns + 1 if sigmoid else columns
        held["target"] = torch.randint(0, top, (count,), generator=generator)
    widths = [(count,), (count, 1), shape] if sigmoid else [(count,)]
    width = draw(st.none() | st.sampled_from(widths))
    if width is not None:
        held["weight"] = 4 * torch.rand(width, generator=generator)
        held["weight"][torch.rand(width, generator=generator) < 0.2] = 0.0
    if name in BIASED:
        # A half's gradient for the bias model, of the size of the logits, is beyond its range.
        held["bias_logits"] = draw(array(shape, moderate | far, torch.float32))
    if name == "ConfidenceRegularizationLoss":
        held["teacher_logits"] = draw(array(shape, moderate | far, torch.float32))
    if name in TOPK:
        held["noise"] = torch.randn(*shape, loss.num_samples, generator=generator)
    return Case(loss, held)


def close(found, expected):
    exact = found.dtype == torch.float64
    torch.testing.assert_close(
        found, expected, rtol=1e-9 if exact else 1e-4, atol=1e-9 if exact else 1e-5
    )


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_finite_and_not_negative(name, data):
    case = data.draw(cases(name))
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]))
    value, gradients = case(reduction)
    wide = torch.float64 if case.rows["pred"].dtype == torch.float64 else torch.float32
    assert value.dtype == wide
    assert value.isfinite().all()
    assert (value >= -1e-5).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
    assert gradients[0].dtype == case.rows["pred"].dtype


@pytest.mark.parametrize("name", [name for name in ALL if name not in NOT_MONOTONE])
@given(data=st.data())
def test_a_larger_p_t_never_costs_more(name, data):
    case = data.draw(cases(name, dtypes=(torch.float32, torch.float64), plain=True))
    pred = case.rows["pred"]
    step = data.draw(st.floats(0.01, 1) | st.sampled_from([1e-3, 10.0, 1e3]))
    better = pred + (step * case.toward_target).to(pred.dtype)
    better = better.clamp(0, 1) if case.heatmap else better
    before, _ = case()
    after, _ = replace(case, rows={**case.rows, "pred": better})()
    rounding = 1e-9 if pred.dtype == torch.float64 else 2e-5
    assert (after <= before + rounding * (1 + before.abs())).all()


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_the_order_of_the_rows_does_not_matter(name, data):
    case = data.draw(cases(name, elements=far))
    order = torch.tensor(
        data.draw(st.permutations(range(len(case.rows["pred"])))), dtype=torch.int64
    )
    value, gradients = case()
    shuffled, shuffled_gradients = case.of(order)()
    close(shuffled, value[order])
    for gradient, other in zip(gradients, shuffled_gradients, strict=True):
        close(other, gradient[order])
    for reduction in ("mean", "sum"):
        close(case.of(order)(reduction)[0], case(reduction)[0])


# The weights of reweighted cross-entropy are over the mean of the batch.
@pytest.mark.parametrize("name", [name for name in ALL if name != "ReweightedCrossEntropyLoss"])
@given(data=st.data())
def test_chunks_add_up(name, data):
    case = data.draw(cases(name, elements=far))
    count = len(case.rows["pred"])
    cut = data.draw(st.integers(0, count))
    whole, gradients = case("sum")
    head, head_gradients = case.of(slice(0, cut))("sum")
    tail, tail_gradients = case.of(slice(cut, count))("sum")
    close(head + tail, whole)
    for parts in zip(gradients, head_gradients, tail_gradients, strict=True):
        close(torch.cat(parts[1:]), parts[0])


@pytest.mark.parametrize("name", [name for name in ALL if name not in HEATMAP])
@given(data=st.data())
def test_ignored_rows_change_nothing(name, data):
    case = data.draw(cases(name, plain=True))
    count = len(case.rows["pred"])
    where = torch.tensor(
        data.draw(st.lists(st.integers(0, count), min_size=1, max_size=3)), dtype=torch.int64
    )
    # What the ignored rows hold is drawn like the rest; they stand anywhere among it.
    junk = data.draw(cases(name, plain=True, rows=len(where), dtypes=(case.rows["pred"].dtype,)))
    order = torch.cat([torch.arange(count).double() + 0.5, where.double()]).argsort(stable=True)
    kept = order < count
    rows = {}
    for key, value in case.rows.items():
        filler = value.new_full((len(where), *value.shape[1:]), 3)
        source = junk.rows.get(key)
        if source is not None and source.shape == filler.shape:
            filler = source.to(value.dtype)
        if key == "target":
            filler = torch.full_like(filler, IGNORED)
        rows[key] = torch.cat([value, filler])[order]
    longer = replace(case, rows=rows)
    for reduction in ("mean", "sum", "none"):
        value, gradients = case(reduction)
        found, found_gradients = longer(reduction)
        if reduction == "none":
            assert (found[~kept] == 0).all()
            found = found[kept]
        close(found, value)
        for gradient, other in zip(gradients, found_gradients, strict=True):
            assert (other[~kept] == 0).all()
            close(other[kept], gradient)
