"""Every loss on tensors without data, as on a device of which the package knows nothing.

A path that looked at a number, counted rows or chose by a value would fail here; on an accelerator
it would wait for the device in every step.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyfocal.losses import LOSSES, ClassificationLoss, DebiasingLoss, LDAMLoss, ScheduledLoss
from polyfocal.losses.base import keywords_of
from polyfocal.losses.quality import QualityLoss

ROWS, COLUMNS, IGNORED = 6, 5, 255
PER_CLASS = [0.1, 0.2, 0.3, 0.4, 0.5]
NEEDED = {
    "PolyNLoss": dict(epsilons=(1.0, 0.5, -0.2)),
    "Poly1FocalLoss": dict(epsilon=1.0),
    "DualFocalLoss": dict(gamma=2.0),
    "NoisedTopKLoss": dict(k=2, epsilon=0.2),
    "ImbalancedNoisedTopKLoss": dict(
        k=2, epsilon=0.1, max_margin=0.2, class_counts=[1, 2, 3, 4, 5]
    ),
    "LDAMLoss": dict(class_counts=[1, 2, 3, 4, 5]),
    "Poly1MatchabilityAwareLoss": dict(epsilon=0.5, gamma=1.5),
}
NEEDED.update(
    {
        name: dict(epsilon=0.5)
        for name in LOSSES
        if name not in NEEDED and ("epsilon" in keywords_of(LOSSES[name]))
    }
)


def forms(name):
    form = LOSSES[name].settings.get("use_sigmoid")
    if form is None:
        return [None]
    return [True, False] if form.only is None else [form.only]


FORMS = [(name, form) for name in LOSSES for form in forms(name)]


def settings_of(name, form):
    """Every setting that changes what is computed, each alone."""
    cls = LOSSES[name]
    keywords = keywords_of(cls)
    for key, value in {
        "class_weight": PER_CLASS,
        "ignore_index": IGNORED,
        "alpha": PER_CLASS,
        "label_smoothing": 0.1,
        "activated": True,
        "gamma": 0.5,
        "anneal_to": 0.5,
    }.items():
        single = key == "alpha" and not getattr(cls.settings.get(key), "single", False)
        wrong_form = {"label_smoothing": True, "activated": False}.get(key) == form
        if key in keywords and not single and not (wrong_form and form is not None):
            yield {key: value}


def inputs_of(cls, form, device):
    """Keywords of a call: plain, then with every kind of target, weight, avg_factor and map."""
    new = {"device": device, "dtype": torch.float32}
    labels = torch.zeros(ROWS, device=device, dtype=torch.int64)
    entries = torch.zeros(ROWS, COLUMNS, **new)
    pred = torch.zeros(ROWS, COLUMNS, **new)
    if not issubclass(cls, ClassificationLoss):
        yield dict(pred=pred, target=entries)
        yield dict(pred=pred, target=entries, weight=entries, avg_factor=3.0)
        return
    targets = [labels]
    if issubclass(cls, QualityLoss):
        targets += [(labels, torch.zeros(ROWS, **new)), entries]
    elif cls.soft_targets:
        targets.append(entries)
    weights = [torch.zeros(ROWS, **new)]
    weights += [torch.zeros(ROWS, 1, **new), entries] if form else []
    for target in targets:
        yield dict(pred=pred, target=target)
        yield dict(pred=pred, target=target, weight=weights[0], avg_factor=3.0)
    for weight in weights:
        yield dict(pred=pred, target=labels, weight=weight, avg_factor=torch.zeros((), **new))
    if not issubclass(cls, QualityLoss) and cls is not LDAMLoss:
        image = torch.zeros(2, COLUMNS, 3, 4, **new)
        yield dict(pred=image, target=torch.zeros(2, 3, 4, device=device, dtype=torch.int64))


def one_call(loss, call, dtype, reductions=("none", "mean")):
    leaf = call["pred"].to(dtype).requires_grad_()
    call = {**call, "pred": leaf}
    if isinstance(loss, DebiasingLoss):
        call["bias_logits"] = torch.zeros_like(leaf)
    if "teacher_logits" in loss._inputs:
        call["teacher_logits"] = torch.zeros_like(leaf)
    for reduction in reductions:
        value = loss(**call, reduction_override=reduction)
        assert value.device.type == leaf.device.type and value.dtype == torch.float32
        if reduction == "mean":
            assert value.shape == ()
        else:
            rows = leaf.shape[:1] + leaf.shape[2:]
            assert value.shape == (leaf.shape if getattr(loss, "use_sigmoid", True) else rows)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert gradient.shape == leaf.shape and gradient.dtype == dtype
        assert gradient.device.type == leaf.device.type


def built(name, form, device, **own):
    sigmoid = {} if form is None else {"use_sigmoid": form}
    loss = LOSSES[name](**{**NEEDED.get(name, {}), **own, **sigmoid}).to(device)
    if isinstance(loss, ScheduledLoss):
        loss.set_progress(0.3)
    return loss


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_no_path_of_a_loss_reads_data(name, form):
    plain, *others = inputs_of(LOSSES[name], form, "meta")
    loss = built(name, form, "meta")
    one_call(loss, plain, torch.float16)
    for call in (plain, *others):
        one_call(loss, call, torch.float32)
    for own in settings_of(name, form):
        one_call(built(name, form, "meta", **own), others[0], torch.float32, ("mean",))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_fake_tensors_of_a_model_that_is_traced(name, form):
    loss = built(name, form, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain, weighted, *_ = inputs_of(LOSSES[name], form, "cpu")
        one_call(loss, plain, torch.float32, ("none",))
        one_call(loss, weighted, torch.float32, ("mean",))
