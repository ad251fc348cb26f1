"""Maps of labels (N, H, W) for logits (N, C, H, W), against torch's cross-entropy and by rows."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import polyfocal
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss, functional
from polyfocal.losses.functional import focal_loss, poly1_focal_loss
from polyfocal.ops import cpu

CLASSES, IGNORED = 5, 255
SIZES = [(7,), (6, 4), (3, 2, 5)]


def maps(size=(6, 4), dtype=torch.float64, channels_last=False, classes=CLASSES):
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, classes, *size, dtype=dtype)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (2, *size))
    labels[0, 1] = IGNORED
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ignored", [True, False])
def test_cross_entropy_is_torchs(reduction, size, ignored):
    logits, labels = maps(size)
    labels = labels if ignored else labels.clamp_max(CLASSES - 1)
    theirs = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    for loss in (
        polyfocal.FocalLoss(gamma=0.0, alpha=None, use_sigmoid=False),
        polyfocal.Poly1CrossEntropyLoss(epsilon=0.0),
    ):
        ours = loss(logits, labels, reduction_override=reduction, ignore_index=IGNORED)
        torch.testing.assert_close(ours, theirs)
        (gradient,) = torch.autograd.grad(ours.sum(), logits)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ["class_weight", "alpha"])
def test_a_number_per_class_weighs_the_pixels_of_the_class(name):
    logits, labels = maps()
    numbers = torch.tensor([0.1, 0.9, 0.5, 0.25, 1.0], dtype=torch.float64)
    settings = dict(gamma=0.0, alpha=None, use_sigmoid=False, reduction="none") | {name: numbers}
    ours = focal_loss(logits, labels, ignore_index=IGNORED, **settings)
    theirs = F.cross_entropy(logits, labels, weight=numbers, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(ours, theirs)


def test_the_sigmoid_form_by_its_formula():
    logits, labels = maps()
    labels[1, 2] = CLASSES  # no class
    alpha = torch.tensor([0.1, 0.9, 0.5, 0.25, 0.7], dtype=torch.float64)
    kept = labels != IGNORED
    target = F.one_hot(torch.where(kept, labels, CLASSES), CLASSES + 1)[..., :CLASSES]
    target = target.movedim(-1, 1).double()
    p = torch.sigmoid(logits)
    p_t = target * p + (1 - target) * (1 - p)
    of_class = alpha.view(1, -1, 1, 1)
    alpha_t = target * of_class + (1 - target) * (1 - of_class)
    expected = -alpha_t * (1 - p_t) ** 2 * torch.log(p_t) * kept.unsqueeze(1)
    settings = dict(use_sigmoid=True, alpha=alpha, ignore_index=IGNORED)
    ours = focal_loss(logits, labels, reduction="none", **settings)
    torch.testing.assert_close(ours, expected)
    mean = focal_loss(logits, labels, **settings)
    torch.testing.assert_close(mean, expected.sum() / (kept.sum() * CLASSES))


@pytest.mark.parametrize("name", ["class_weight", "alpha"])
def test_a_number_per_class_is_refused_where_nothing_says_which_dimension_has_the_classes(name):
    settings = {"alpha": None, name: [1.0, 0.0, 0.0, 0.0]}
    soft = torch.zeros(1, 4, 4, 4)
    with pytest.raises(UserError, match=name + r" has 4 values with soft targets \(1, 4, 4, 4\)"):
        focal_loss(soft, soft, use_sigmoid=True, **settings)


def test_soft_maps_in_the_softmax_form_are_refused_with_what_is_right():
    soft = torch.full((2, 3, 4, 4), 1 / 3)
    message = r"a map of integer labels \(2, 4, 4\), or rows \(N, C\) of both: the softmax form"
    with pytest.raises(UserError, match=message):
        focal_loss(soft, soft, use_sigmoid=False)


def test_gradient():
    logits, labels = maps((3, 2))
    for use_sigmoid in (True, False):
        settings = dict(epsilon=1.0, use_sigmoid=use_sigmoid, ignore_index=IGNORED)
        assert torch.autograd.gradcheck(
            lambda x, s=settings: poly1_focal_loss(x, labels, **s), logits
        )


def losses():
    for name, cls in sorted(polyfocal.losses.LOSSES.items()):
        if not issubclass(cls, ClassificationLoss) or (
            name.startswith("Poly1")
            and (
                "Quality" in name or "Varifocal" in name or "Matchability" in name or "IoU" in name
            )
        ):
            continue
        if name != "LDAMLoss":
            yield cls


@pytest.mark.parametrize("cls", losses(), ids=lambda cls: cls.__name__)
def test_every_loss_takes_a_map_as_rows(cls):
    known = inspect.signature(cls).parameters
    values = dict(
        epsilon=0.5,
        epsilons=[0.5],
        gamma=1.0,
        k=1,
        class_counts=[5, 4, 3, 2, 1],
        max_margin=0.3,
        seed=0,
        num_classes=CLASSES,
    )
    given = {key: value for key, value in values.items() if key in known}
    softmax_only = known["use_sigmoid"].default is False
    for use_sigmoid in (False,) if softmax_only else (True, False):
        try:
            loss = cls(use_sigmoid=use_sigmoid, **given)
        except UserError:  # a form that it does not have
            continue
        call = {}
        logits, labels = maps(dtype=torch.float32)
        rows = logits.movedim(1, -1).reshape(-1, CLASSES)
        by_rows = {}
        for name in ("bias", "teacher"):
            if name in known:
                key = f"{name}_logits"
                call[key] = torch.randn_like(logits)
                by_rows[key] = call[key].movedim(1, -1).reshape(-1, CLASSES)
        if isinstance(loss, polyfocal.losses.ScheduledLoss):
            loss.set_progress(0.4)
        for reduction in ("mean", "none"):
            common = dict(reduction_override=reduction, ignore_index=IGNORED)
            torch.manual_seed(1)
            found = loss(logits, labels, **common, **call)
            torch.manual_seed(1)
            expected = loss(rows, labels.reshape(-1), **common, **by_rows)
            if reduction == "none" and expected.dim() == 2:
                expected = expected.view(2, 6, 4, CLASSES).movedim(-1, 1)
            elif reduction == "none":
                expected = expected.view(2, 6, 4)
            if "seed" not in known:
                torch.testing.assert_close(found, expected)
            assert found.shape == expected.shape


def test_weights_by_pixel():
    logits, labels = maps()
    weight = torch.rand(2, 6, 4, dtype=torch.float64)
    plain = focal_loss(logits, labels, use_sigmoid=False, ignore_index=IGNORED, reduction="none")
    for given in (weight, weight.unsqueeze(1)):
        found = focal_loss(
            logits, labels, given, use_sigmoid=False, ignore_index=IGNORED, reduction="none"
        )
        torch.testing.assert_close(found, plain * weight)
    settings = dict(use_sigmoid=True, ignore_index=IGNORED, reduction="none")
    entries = torch.rand(logits.shape, dtype=torch.float64)
    plain = focal_loss(logits, labels, **settings)
    torch.testing.assert_close(focal_loss(logits, labels, entries, **settings), plain * entries)


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)])
@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_no_pixels(shape, use_sigmoid):
    logits = torch.zeros(shape, requires_grad=True)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    loss = focal_loss(logits, labels, use_sigmoid=use_sigmoid, ignore_index=IGNORED)
    assert loss == 0
    loss.backward()
    assert logits.grad.shape == shape
    unreduced = focal_loss(logits, labels, use_sigmoid=use_sigmoid, reduction="none")
    assert unreduced.shape == (shape if use_sigmoid else labels.shape)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_other_integers(dtype):
    logits, labels = maps()
    settings = dict(use_sigmoid=False, ignore_index=IGNORED)
    expected = focal_loss(logits, labels, **settings)
    assert focal_loss(logits, labels.to(dtype), **settings) == expected


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_what_ignored_pixels_hold_does_not_matter(channels_last, use_sigmoid):
    logits, labels = maps(dtype=torch.float32, channels_last=channels_last)
    given = logits.detach().clone()
    given[0, :, 1] = torch.nan
    given.requires_grad_()
    before = given.detach().clone()
    loss = focal_loss(given, labels, use_sigmoid=use_sigmoid, ignore_index=IGNORED)
    loss.backward()
    torch.testing.assert_close(
        loss, focal_loss(logits, labels, use_sigmoid=use_sigmoid, ignore_index=IGNORED)
    )
    assert (given.grad[0, :, 1] == 0).all()
    assert given.grad.isfinite().all()
    torch.testing.assert_close(given.detach(), before, equal_nan=True)


class Large(TorchDispatchMode):
    """Counts the tensors of some size that operations make, views not among them."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made = numel, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.numel() >= self.numel:
                self.made.add(one.untyped_storage().data_ptr())
                self.kept = getattr(self, "kept", [])
                self.kept.append(one)
        return out


@pytest.mark.parametrize(("channels_last", "most"), [(False, 2), (True, 1)])
def test_one_copy_and_the_gradient(channels_last, most, monkeypatch):
    """Of the logits' size: rows, unless the channels are last, and the gradient. No one-hot."""
    monkeypatch.setattr(cpu, "_KEEP", 0)  # fewer logits keep their softmax too
    torch.manual_seed(0)
    logits = torch.randn(2, 20, 128, 128)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    labels = torch.randint(20, (2, 128, 128))
    labels[0, :9] = IGNORED if not channels_last else 0
    logits.requires_grad_()
    theirs, ours = Large(logits.numel()), Large(logits.numel())
    with ours:
        loss = focal_loss(logits, labels, use_sigmoid=False, alpha=None, ignore_index=IGNORED)
        torch.autograd.grad(loss, logits)
    with theirs:
        torch.autograd.grad(F.cross_entropy(logits, labels, ignore_index=IGNORED), logits)
    made = ours.made - {logits.untyped_storage().data_ptr()}
    assert len(made) == most <= len(theirs.made)


@pytest.mark.parametrize(
    ("target", "weight", "sentence"),
    [
        (torch.zeros(2, 4, 6, dtype=torch.int64), None, r"or \(N, C, ...\) with a map of labels"),
        (torch.zeros(2, 1, 6, 4, dtype=torch.int64), None, r"with a map of labels \(N, ...\)"),
        (torch.zeros(2, 6, 4), None, r"with a map of labels"),
        (
            torch.zeros(2, 6, 4, dtype=torch.int64),
            torch.ones(2, 4, 6),
            r"weight has shape \(2, 4, 6\): expected \(2, 6, 4\), that of the map of labels$",
        ),
        (torch.full((2, 6, 4), 9), None, r"label 9 is out of range \(48 of 48 labels are\)"),
    ],
)
def test_refuses(target, weight, sentence):
    logits, _ = maps()
    with pytest.raises(UserError, match=sentence):
        focal_loss(logits, target, weight, use_sigmoid=False)


def test_in_a_head_of_mmsegmentation():
    pytest.importorskip("mmseg", reason="needs MMSegmentation: pip install mmsegmentation")
    from mmengine.structures import PixelData
    from mmseg.models.decode_heads import FCNHead
    from mmseg.structures import SegDataSample

    import polyfocal.mmengine  # noqa: F401

    logits, labels = maps((16, 16), torch.float32)
    samples = []
    for one in labels:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=one.unsqueeze(0))
        samples.append(sample)
    stock = dict(type="CrossEntropyLoss", avg_non_ignore=True, loss_weight=0.5)
    found = []
    for loss in (
        stock,
        dict(type="polyfocal.FocalLoss", use_sigmoid=False, gamma=0.0, alpha=None, loss_weight=0.5),
    ):
        head = FCNHead(
            in_channels=8, channels=8, num_classes=CLASSES, num_convs=1, loss_decode=loss
        )
        losses = head.loss_by_feat(logits, samples)
        assert losses.pop("acc_seg") is not None
        ((name, value),) = losses.items()
        assert name.startswith("loss_")
        (gradient,) = torch.autograd.grad(value, logits)
        found.append((value, gradient))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_functions_of_rows_are_those_of_maps():
    """A map of one pixel a picture is a batch of rows."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, CLASSES), torch.tensor([0, 4, 2, 1])
    for function in (functional.focal_loss, functional.stepped_focal_loss):
        more = dict(edges=(0.5,), gammas=(2.0, 1.0)) if "stepped" in function.__name__ else {}
        expected = function(logits, labels, use_sigmoid=False, **more)
        found = function(
            logits[..., None, None], labels[..., None, None], use_sigmoid=False, **more
        )
        torch.testing.assert_close(found, expected)
