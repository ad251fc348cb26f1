"""The modules: the call contract, their constructors' errors, what a checkpoint holds of them."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch

import polyfocal
from polyfocal.losses import ClassPriors, functional

LOSSES = [
    (polyfocal.FocalLoss, {}, functional.focal_loss, dict(gamma=2.0, alpha=0.25)),
    (
        polyfocal.Poly1FocalLoss,
        dict(epsilon=1.0),
        functional.poly1_focal_loss,
        dict(epsilon=1.0, gamma=2.0, alpha=0.25),
    ),
    (polyfocal.Poly1CrossEntropyLoss, {}, functional.poly1_cross_entropy, dict(epsilon=-1.0)),
    (
        polyfocal.PolyNLoss,
        dict(epsilons=(1.0, 0.5)),
        functional.poly_n_loss,
        dict(epsilons=(1.0, 0.5)),
    ),
    (
        polyfocal.CyclicalFocalLoss,
        {},
        functional.cyclical_focal_loss,
        dict(progress=0.1, alpha=0.25),
    ),
]


@pytest.mark.parametrize(("cls", "settings", "function", "defaults"), LOSSES)
def test_call_contract(cls, settings, function, defaults):
    torch.manual_seed(0)
    pred, target, weight = torch.randn(8, 3), torch.randint(0, 4, (8,)), torch.rand(8)
    loss = cls(use_sigmoid=True, loss_weight=2.0, **settings)
    if isinstance(loss, polyfocal.CyclicalFocalLoss):
        loss.set_progress(0.1)
    value = loss(pred, target, weight, avg_factor=5.0)
    expected = function(pred, target, weight, use_sigmoid=True, avg_factor=5.0, **defaults)
    torch.testing.assert_close(value, 2 * expected)
    none = loss(pred, target, weight, reduction_override="none")
    assert none.shape == (8, 3)
    torch.testing.assert_close(loss(pred, target, weight, reduction_override="sum"), none.sum())
    assert loss.state_dict() == {}
    assert cls.__name__ in repr(loss) and "loss_weight=2.0" in repr(loss)
    torch.testing.assert_close(copy.deepcopy(loss)(pred, target, weight, 5.0), value)


def test_weights_a_class_follow_the_module_and_stay_out_of_the_checkpoint():
    loss = polyfocal.FocalLoss(use_sigmoid=True, class_weight=[1.0, 2.0], alpha=[0.25, 0.5])
    assert loss.state_dict() == {}
    assert loss.to("meta").class_weight.device.type == "meta"


def test_ignore_index_of_one_call():
    loss = polyfocal.Poly1CrossEntropyLoss()
    pred = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 7, 2])
    kept = loss(pred[[0, 1, 3]], labels[[0, 1, 3]])
    torch.testing.assert_close(loss(pred, labels, ignore_index=7), kept)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: polyfocal.FocalLoss(), "FocalLoss has use_sigmoid=None: write use_sigmoid=True"),
        (lambda: polyfocal.FocalLoss(gamma=-1.0, use_sigmoid=True), "gamma=-1.0: expected"),
        (lambda: polyfocal.Poly1FocalLoss(use_sigmoid=True), "Poly1FocalLoss has no epsilon"),
        (lambda: polyfocal.Poly1FocalLoss(-2, use_sigmoid=True), "epsilon=-2: expected"),
        (lambda: polyfocal.Poly1CrossEntropyLoss(epsilon=-1.5), "epsilon=-1.5: expected"),
        (
            lambda: polyfocal.Poly1CrossEntropyLoss(use_sigmoid=True, label_smoothing=0.1),
            "label_smoothing=0.1 is given with use_sigmoid=True",
        ),
        (lambda: polyfocal.PolyNLoss((), use_sigmoid=True), r"epsilons=\(\): expected a list"),
        (lambda: polyfocal.PolyNLoss(3, use_sigmoid=True), "epsilons=3: expected a list"),
        (lambda: polyfocal.CyclicalFocalLoss(factor=0.5, use_sigmoid=True), "factor=0.5"),
        (lambda: polyfocal.CyclicalFocalLoss(gamma_hc=-1, use_sigmoid=True), "gamma_hc=-1"),
        (lambda: polyfocal.FocalLoss(alpha=-0.1, use_sigmoid=True), "alpha holds -0.1"),
        (lambda: polyfocal.FocalLoss(reduction="avg", use_sigmoid=True), "reduction='avg'"),
        (lambda: polyfocal.FocalLoss(class_weight=[], use_sigmoid=True), "class_weight is empty"),
        (lambda: polyfocal.FocalLoss(loss_weight=-1, use_sigmoid=True), "loss_weight=-1: expected"),
        (lambda: polyfocal.FocalLoss(gamma="high", use_sigmoid=True), "gamma=high: expected"),
        (lambda: polyfocal.FocalLoss(gamma=True, use_sigmoid=True), "gamma=True: expected"),
        (lambda: polyfocal.FocalLoss(alpha=[True], use_sigmoid=True), "alpha holds True: expected"),
        (
            lambda: polyfocal.Poly1FocalLoss(1, activated="no", use_sigmoid=True),
            "activated='no': expected True or False",
        ),
        (
            lambda: polyfocal.Poly1VarifocalLoss(1, iou_weighted=0, use_sigmoid=True),
            "iou_weighted=0: expected True or False",
        ),
        (
            lambda: polyfocal.Poly1FocalLoss(1, alpha=[0.2, 0.5], activated=True, use_sigmoid=True),
            r"alpha=\[0.2, 0.5\]: expected a number in \[0, 1\] or None, since the loss is of prob",
        ),
        (lambda: polyfocal.FocalLoss(alpha="auto", use_sigmoid=True), "alpha='auto': expected"),
    ],
)
def test_bad_settings_are_refused_when_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_misspelt_keyword_is_answered_with_the_right_ones():
    message = "FocalLoss has no keyword 'gama': it takes gamma, alpha, use_sigmoid, reduction"
    with pytest.raises(TypeError, match=message):
        polyfocal.FocalLoss(use_sigmoid=True, gama=2)


def test_alpha_none_of_a_cyclical_loss_is_none_in_both_forms():
    kind = polyfocal.CyclicalFocalLoss
    found = {form: [kind(use_sigmoid=form, **a).alpha for a in ({}, dict(alpha=None))]
             for form in (True, False)}  # fmt: skip
    assert found == {True: [0.25, None], False: [None, None]}
    assert "alpha=0.25" in repr(kind(use_sigmoid=True))
    loss = kind(use_sigmoid=True, alpha=None, gamma_hc=0.0, gamma_lc=0.0)
    loss.set_progress(0.25)  # xi is 0: the cross-entropy
    assert loss(torch.zeros(1, 1), torch.zeros(1, 1)).item() == pytest.approx(math.log(2))


def test_a_cyclical_loss_says_that_it_has_no_progress():
    loss = polyfocal.CyclicalFocalLoss(use_sigmoid=True)
    with pytest.raises(ValueError, match="does not know the training's progress"):
        loss(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))


class Squared(polyfocal.losses.ClassificationLoss, table=False):
    """A softmax loss of somebody else."""

    def unreduced(self, logits, target):
        if target.dim() == 1:
            target = torch.nn.functional.one_hot(target, logits.shape[1])
        return ((logits.softmax(dim=1) - target) ** 2).sum(dim=1)


def test_class_weights_of_soft_targets_in_a_loss_of_ones_own():
    loss = Squared(use_sigmoid=False, class_weight=[1.0, 3.0], reduction="none")
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert loss(logits, torch.tensor([0, 1])).tolist() == [0.5, 1.5]
    # Half of each class weighs 2, and misses by nothing; a quarter and three quarters 2.5.
    soft = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert loss(logits, soft).tolist() == [0.0, 2.5 * 2 * 0.25**2]


class Model(torch.nn.Module):
    """A model as detectors are: the loss is called while it is trained only."""

    def __init__(self, loss):
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        self.loss = loss

    def forward(self, x, target):
        pred = self.layer(x)
        if self.training:
            return self.loss(pred, target, avg_factor=2.0)
        return pred


@pytest.mark.parametrize(
    "loss",
    [
        polyfocal.FocalLoss(
            use_sigmoid=True, alpha=[0.1, 0.2, 0.3, 0.4], class_weight=[1, 2, 3, 4]
        ),
        polyfocal.CyclicalFocalLoss(use_sigmoid=True),
        polyfocal.GaussianPoly1FocalLoss(epsilon=1.0),
        polyfocal.NoisedTopKLoss(k=1, epsilon=0.1),
        polyfocal.AdaFocalLoss(),
        polyfocal.ConfidenceRegularizationLoss(
            use_sigmoid=True, bias=ClassPriors([1, 2, 3, 4]), teacher=ClassPriors([4, 3, 2, 1])
        ),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_model_that_calls_the_loss_is_scripted_saved_and_serves(loss, tmp_path):
    model = Model(loss).eval()
    torch.jit.script(model).save(tmp_path / "model.pt")
    served = torch.jit.load(tmp_path / "model.pt")
    x, target = torch.randn(5, 3), torch.zeros(5, 4)
    torch.testing.assert_close(served(x, target), model(x, target))


def test_a_subclass_hands_its_keywords_on():
    class Mine(polyfocal.FocalLoss, table=False):
        def __init__(self, extra, **kwargs):
            super().__init__(**kwargs)
            self.extra = extra

    loss = Mine(3, gamma=1.5, use_sigmoid=True, class_weight=[1.0, 2.0])
    assert (loss.extra, loss.gamma) == (3, 1.5)
    with pytest.raises(TypeError, match="Mine has no keyword 'gama': it takes extra, gamma, alpha"):
        Mine(3, gama=1.5, use_sigmoid=True)

    class Open(polyfocal.FocalLoss, table=False):
        def __init__(self, **options):
            super().__init__(use_sigmoid=True)
            self.options = options

    assert Open(anything=1).options == {"anything": 1}


def test_signatures_are_spelled_out():
    names = list(inspect.signature(polyfocal.FocalLoss).parameters)
    shared = ["reduction", "loss_weight", "class_weight", "ignore_index"]
    assert names == ["gamma", "alpha", "use_sigmoid", *shared]
    assert inspect.signature(polyfocal.FocalLoss).parameters["loss_weight"].default == 1.0
    names = list(inspect.signature(functional.focal_loss).parameters)
    assert names[:6] == ["logits", "target", "weight", "use_sigmoid", "gamma", "alpha"]
    assert names[6:] == ["class_weight", "ignore_index", "reduction", "avg_factor"]


def test_a_setting_is_checked_when_it_is_set():
    loss = polyfocal.FocalLoss(use_sigmoid=True)
    for name, value in (("gamma", -1.0), ("alpha", [0.1, 2.0]), ("reduction", "avg")):
        before = getattr(loss, name)
        with pytest.raises(ValueError, match=name):
            setattr(loss, name, value)
        assert getattr(loss, name) == before
    loss.alpha = [0.1, 0.4]
    assert loss.state_dict() == {}
    logits, labels = torch.zeros(1, 2), torch.tensor([1])
    each = torch.tensor([[0.9, 0.4]]) * 0.25 * math.log(2)
    torch.testing.assert_close(loss(logits, labels, reduction_override="none"), each)
    loss.alpha = None
    torch.testing.assert_close(loss(logits, labels), torch.tensor(0.25 * math.log(2)))


def test_numbers_per_class_are_shown_and_keep_their_precision():
    loss = polyfocal.FocalLoss(
        use_sigmoid=True, class_weight=np.array([1.0, 2.5]), alpha=(0.3, 0.7)
    )
    assert "alpha=(0.3, 0.7)" in repr(loss) and "class_weight=(1, 2.5)" in repr(loss)
    many = polyfocal.LDAMLoss([16.0] * 1203 + [1.0])
    assert "margins=(0.25, 0.25, 0.25, ..., 0.5, 1204 numbers)" in repr(many)
    ada, priors = polyfocal.AdaFocalLoss(num_bins=3, gamma=1.1), ClassPriors([1.0, 2.0])
    for module in (loss, many, ada, priors):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        assert before
        for halved in (module.bfloat16(), module.half(), module.float(), module.to(torch.float16)):
            for name, buffer in halved.named_buffers():
                assert buffer.dtype == torch.float32 and buffer.equal(before[name])


def test_what_differs_from_mmdetections_cross_entropy():
    """The table of docs/migrate.md, measured on both sides."""
    mmdet = pytest.importorskip("mmdet.models.losses", reason="needs MMDetection")
    zeros, background = torch.zeros(1, 2), torch.tensor([2])
    stock = mmdet.CrossEntropyLoss(use_sigmoid=True, class_weight=[3.0, 3.0])
    ours = polyfocal.Poly1CrossEntropyLoss(0.0, use_sigmoid=True, class_weight=[3.0, 3.0])
    each = dict(reduction_override="none")
    assert stock(zeros, background, **each).tolist() == [[pytest.approx(0.69, abs=0.005)] * 2]
    assert ours(zeros, background, **each).tolist() == [[pytest.approx(2.08, abs=0.005)] * 2]
    rows, labels = torch.zeros(2, 2), torch.tensor([0, -100])
    assert mmdet.CrossEntropyLoss()(rows, labels).item() == pytest.approx(0.35, abs=0.005)
    with pytest.raises(ValueError, match="label -100 is out of range"):
        polyfocal.Poly1CrossEntropyLoss(0.0)(rows, labels)
    kept = polyfocal.Poly1CrossEntropyLoss(0.0, ignore_index=-100)
    assert kept(rows, labels).item() == pytest.approx(0.69, abs=0.005)
    both = [loss(rows, labels, avg_factor=1.0) for loss in (mmdet.CrossEntropyLoss(), kept)]
    torch.testing.assert_close(*both)
