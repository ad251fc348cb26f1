"""The debiasing losses against literal numbers and torch's own, and the sources of bias scores."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polyfocal
from polyfocal.losses import BiasHead, ClassPriors, StoredScores
from polyfocal.losses import functional as L
from polyfocal.losses.bias import write_scores

LN = math.log
# p = softmax(ln 3, 0) = (3/4, 1/4), and as sigmoid(ln 3) = 3/4; the bias model's 9/10 and 1/10.
TWO = torch.tensor([[LN(3.0), 0.0]], dtype=torch.float64)
BIAS = torch.tensor([[LN(9.0), 0.0]], dtype=torch.float64)
ONE, BIAS_ONE = TWO[:, :1], BIAS[:, :1]
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])
FUNCTIONS = {
    "debiased focal": L.debiased_focal_loss,
    "product of experts": L.product_of_experts,
    "reweighted": L.reweighted_cross_entropy,
    "confidence": lambda *a, **k: L.confidence_regularization(
        *a, teacher_logits=k["bias_logits"].detach().flip(0) / 2, **k
    ),
}


def batch(n=12, c=4, use_sigmoid=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, bias = 2 * torch.randn(2, n, c, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, c + use_sigmoid, (n,), generator=generator)
    return logits, bias, labels


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # softmax: (1 - 0.9)^2 * -ln 0.75, and (1 - 0.1)^2 * -ln 0.25 for the other label
        (
            L.debiased_focal_loss(TWO, FIRST, bias_logits=BIAS, use_sigmoid=False),
            0.01 * LN(4 / 3),
        ),
        (
            L.debiased_focal_loss(TWO, SECOND, bias_logits=BIAS, use_sigmoid=False),
            0.81 * LN(4),
        ),
        # sigmoid, background: p_t = 1/4, the bias model's is 1/10
        (
            L.debiased_focal_loss(ONE, SECOND, bias_logits=BIAS_ONE, use_sigmoid=True, gamma=1.0),
            0.9 * LN(4),
        ),
        # annealed: 9^(1/2) = 3, so that p_B is 3/4: (1/4)^2
        (
            L.debiased_focal_loss(TWO, FIRST, bias_logits=BIAS, use_sigmoid=False, theta=0.5),
            0.0625 * LN(4 / 3),
        ),
        # odds 3 * 9 = 27 to 1
        (
            L.product_of_experts(TWO, FIRST, bias_logits=BIAS, use_sigmoid=False),
            LN(28 / 27),
        ),
        (
            L.product_of_experts(ONE, SECOND, bias_logits=BIAS_ONE, use_sigmoid=True),
            LN(28),
        ),
        # annealed: odds 3 * 3
        (
            L.product_of_experts(TWO, SECOND, bias_logits=BIAS, use_sigmoid=False, theta=0.5),
            LN(10),
        ),
        # weights 0.1 and 0.9 of the rows (label first, label second)
        (
            L.reweighted_cross_entropy(
                TWO.expand(2, 2), torch.tensor([0, 1]), bias_logits=BIAS.expand(2, 2),
                use_sigmoid=False,
            ),
            (0.1 * LN(4 / 3) + 0.9 * LN(4)) / (0.1 + 0.9),
        ),
        # annealed: the weights to the power 1/2
        (
            L.reweighted_cross_entropy(
                TWO.expand(2, 2), torch.tensor([0, 1]), bias_logits=BIAS.expand(2, 2),
                use_sigmoid=False, theta=0.5,
            ),
            (0.1**0.5 * LN(4 / 3) + 0.9**0.5 * LN(4)) / (0.1**0.5 + 0.9**0.5),
        ),
        # the teacher's odds are 16 to 1 and w = 1 - 3/4 = 1/4: 16^(1/4) = 2, q = (2/3, 1/3)
        (
            L.confidence_regularization(
                TWO, FIRST, bias_logits=TWO, use_sigmoid=False,
                teacher_logits=torch.tensor([[LN(16.0), 0.0]], dtype=torch.float64),
            ),
            2 / 3 * LN(4 / 3) + 1 / 3 * LN(4),
        ),
        (
            L.confidence_regularization(
                ONE, FIRST, bias_logits=ONE, use_sigmoid=True,
                teacher_logits=torch.tensor([[LN(16.0)]], dtype=torch.float64),
            ),
            2 / 3 * LN(4 / 3) + 1 / 3 * LN(4),
        ),
    ],
)  # fmt: skip
def test_values_worked_out_by_hand(value, expected):
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, use_sigmoid):
    logits, bias, labels = batch(4, 3, use_sigmoid)
    logits.requires_grad_()
    weight = torch.rand(4, dtype=torch.float64)
    joint = name in ("debiased focal", "product of experts")
    bias.requires_grad_(joint)

    def loss(x, b):
        return FUNCTIONS[name](
            x, labels, weight, bias_logits=b, use_sigmoid=use_sigmoid, theta=0.9,
            class_weight=[1.0, 2.0, 0.5], reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (logits, bias) if joint else (logits, bias.detach()))


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_a_bias_model_that_knows_nothing_changes_nothing(use_sigmoid):
    logits, _, labels = batch(use_sigmoid=use_sigmoid)
    even = torch.zeros_like(logits)
    plain = L.poly1_cross_entropy(logits, labels, epsilon=0.0, use_sigmoid=use_sigmoid)
    args = dict(bias_logits=even, use_sigmoid=use_sigmoid)
    torch.testing.assert_close(L.product_of_experts(logits, labels, **args), plain)
    torch.testing.assert_close(L.reweighted_cross_entropy(logits, labels, **args), plain)
    miss = 0.5 if use_sigmoid else 0.75
    focal = L.debiased_focal_loss(logits, labels, **args, gamma=3.0)
    torch.testing.assert_close(focal, plain * miss**3)
    # theta = 0 takes the bias out whatever it says
    wild = dict(args, bias_logits=50 * torch.randn_like(logits), theta=0.0)
    torch.testing.assert_close(L.product_of_experts(logits, labels, **wild), plain)


def test_debiased_focal_with_itself_as_the_bias_is_focal_loss():
    logits, _, labels = batch(use_sigmoid=True)
    for use_sigmoid, y in ((True, labels), (False, labels.clamp_max(3))):
        ours = L.debiased_focal_loss(
            logits, y, bias_logits=logits, use_sigmoid=use_sigmoid, alpha=[0.2, 0.4, 0.6, 0.8]
        )
        focal = L.focal_loss(logits, y, use_sigmoid=use_sigmoid, alpha=[0.2, 0.4, 0.6, 0.8])
        torch.testing.assert_close(ours, focal)


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_contract_of_reductions_ignored_rows_and_soft_targets(name, use_sigmoid):
    logits, bias, labels = batch(use_sigmoid=use_sigmoid)
    function, form = FUNCTIONS[name], dict(use_sigmoid=use_sigmoid)
    call = dict(bias_logits=bias, **form)
    each = function(logits, labels, reduction="none", **call)
    assert each.shape == (logits.shape if use_sigmoid else labels.shape)
    torch.testing.assert_close(function(logits, labels, reduction="sum", **call), each.sum())
    torch.testing.assert_close(function(logits, labels, **call), each.mean())
    weight = torch.rand(12, dtype=torch.float64)
    got = function(logits, labels, weight, avg_factor=3.0, **call)
    rows = weight[:, None] if use_sigmoid else weight
    torch.testing.assert_close(got, (each * rows).sum() / 3)
    if name != "confidence":  # whose teacher here is made of the batch's order
        keep = labels != labels[0]
        got = function(logits, labels, ignore_index=int(labels[0]), **call)
        kept = function(logits[keep], labels[keep], bias_logits=bias[keep], **form)
        torch.testing.assert_close(got, kept)
    hard = (labels[:, None] == torch.arange(4)).double()
    torch.testing.assert_close(function(logits, hard, **call), function(logits, labels, **call))
    empty = function(logits[:0].requires_grad_(), labels[:0], bias_logits=bias[:0], **form)
    empty.backward()
    assert empty == 0


def test_ignored_rows_in_confidence_regularization():
    logits, bias, labels = batch()
    teacher = torch.randn_like(logits)
    keep = labels != 1
    got = L.confidence_regularization(
        logits, labels, bias_logits=bias, teacher_logits=teacher, use_sigmoid=False, ignore_index=1
    )
    expected = L.confidence_regularization(
        logits[keep], labels[keep], bias_logits=bias[keep], teacher_logits=teacher[keep],
        use_sigmoid=False,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_a_trained_bias_model_gets_its_own_cross_entropy():
    logits, bias, labels = batch()
    args = dict(use_sigmoid=False)
    alone = L.debiased_focal_loss(logits, labels, bias_logits=bias, **args)
    bias.requires_grad_()
    both = L.debiased_focal_loss(logits, labels, bias_logits=bias, bias_weight=0.5, **args)
    torch.testing.assert_close(both, alone + 0.5 * F.cross_entropy(bias, labels))
    reweighted = L.reweighted_cross_entropy(logits, labels, bias_logits=bias, **args)
    (gradient,) = torch.autograd.grad(reweighted, bias)
    (expected,) = torch.autograd.grad(F.cross_entropy(bias, labels), bias)
    torch.testing.assert_close(gradient, expected)  # the weights themselves have none


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_stays_finite_far_out(name, use_sigmoid):
    logits, bias, labels = batch(use_sigmoid=use_sigmoid)
    logits, bias = (5000 * logits).float().requires_grad_(), (5000 * bias).float().requires_grad_()
    for extra in (dict(), dict(gamma=0.5)) if name == "debiased focal" else (dict(),):
        loss = FUNCTIONS[name](logits, labels, bias_logits=bias, use_sigmoid=use_sigmoid, **extra)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all() and bias.grad.isfinite().all()


LOSSES = [
    polyfocal.DebiasedFocalLoss,
    polyfocal.ProductOfExpertsLoss,
    polyfocal.ReweightedCrossEntropyLoss,
    polyfocal.ConfidenceRegularizationLoss,
]


@pytest.mark.parametrize("cls", LOSSES)
def test_modules_take_scores_by_hand_or_from_a_source_and_anneal(cls):
    logits, _, labels = batch()
    teacher = {"teacher_logits": 2 * logits} if cls is LOSSES[3] else {}
    priors = ClassPriors([1.0, 2.0, 3.0, 4.0])
    by_hand = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4])).expand(12, 4)
    loss = cls(use_sigmoid=False, bias=priors)
    expected = loss(logits, labels, bias_logits=by_hand, **teacher)
    torch.testing.assert_close(loss(logits, labels, **teacher), expected, rtol=1e-5, atol=1e-6)
    assert loss.state_dict() == {}

    annealed = cls(use_sigmoid=False, bias=priors, anneal_to=0.8)
    with pytest.raises(ValueError, match="does not know the training's progress"):
        annealed(logits, labels, **teacher)
    annealed.set_progress(0.0)
    torch.testing.assert_close(annealed(logits, labels, **teacher), expected)
    annealed.set_progress(0.5)
    assert annealed.theta() == pytest.approx(0.9)
    assert annealed(logits, labels, **teacher) != expected
    copy.deepcopy(annealed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y: polyfocal.ProductOfExpertsLoss(use_sigmoid=False)(x, y),
            "ProductOfExpertsLoss has no bias model's scores: write bias=dict",
        ),
        (
            lambda x, y: polyfocal.ProductOfExpertsLoss(use_sigmoid=False)(
                x, y, bias_logits=x[:, :2]
            ),
            r"bias_logits \(12, 2\) torch.float64 for logits \(12, 4\)",
        ),
        (
            lambda x, y: polyfocal.ProductOfExpertsLoss(use_sigmoid=False, bias=3),
            "bias=3: expected a BiasSource",
        ),
        (
            lambda x, y: polyfocal.DebiasedFocalLoss(use_sigmoid=False, anneal_to=2),
            "anneal_to=2: expected",
        ),
        (
            lambda x, y: polyfocal.ProductOfExpertsLoss(
                use_sigmoid=False, bias=ClassPriors([1, 2, 3])
            )(x, y),
            "ClassPriors has 3 classes for logits of 4 columns",
        ),
        (lambda x, y: ClassPriors([1, 0]), "finite numbers > 0"),
        (lambda x, y: BiasHead(3, sees="sound"), "sees='sound': expected one of colour"),
        (lambda x, y: BiasHead(3, sees="features"), "in_channels=None with sees='features'"),
        (lambda x, y: BiasHead(4, sees="colour")(x, False), "BiasHead has logits for 0 of 12 rows"),
    ],
)
def test_what_is_missing_is_said(call, message):
    logits, _, labels = batch()
    with pytest.raises(ValueError, match=message):
        call(logits, labels)


def test_class_priors_in_the_sigmoid_form_are_probabilities():
    scores = ClassPriors([1.0, 3.0])(torch.zeros(2, 2), True)
    torch.testing.assert_close(scores.sigmoid(), torch.tensor([[0.25, 0.75]] * 2))


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_class_priors_of_a_map_are_those_of_its_pixels(use_sigmoid):
    loss = polyfocal.ProductOfExpertsLoss(use_sigmoid=use_sigmoid, bias=ClassPriors([1, 2, 3]))
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    rows = loss(logits.movedim(1, -1).reshape(-1, 3), labels.reshape(-1))
    torch.testing.assert_close(loss(logits, labels), rows)


def test_bias_head_gives_its_rows_in_the_order_of_the_calls():
    torch.manual_seed(0)
    head = BiasHead(2, sees="geometry", num_anchors=3)
    features = [torch.randn(4, 5, requires_grad=True), torch.randn(1, 5)]
    logits = [head.classify(f) for f in features]
    assert [len(x) for x in logits] == [12, 3]
    head.offer(logits)
    first, second = head(torch.zeros(5, 2), True), head(torch.zeros(10, 2), True)
    torch.testing.assert_close(torch.cat([first, second]), torch.cat(logits))
    torch.cat([first, second]).sum().backward()
    assert features[0].grad is None and head.layers[0].weight.grad.abs().sum() > 0
    torch.testing.assert_close(head.layers[2].bias.sigmoid(), torch.full((6,), 0.01))
    # A loss that is called with some of the rows would get those of other places.
    head.offer(logits)
    head(torch.zeros(5, 2), True)
    with pytest.raises(ValueError, match="BiasHead has 10 rows left from the step before"):
        head.offer(logits)
    frozen = BiasHead(2, sees="colour", frozen=True)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("ids", [[7, 3, 11], ["b.jpg", "a.jpg", "c.jpg"]])
def test_stored_scores_are_looked_up_by_id(tmp_path, ids):
    scores = torch.log_softmax(torch.randn(3, 4), dim=1)
    file = tmp_path / "scores.npz"
    write_scores(file, ids, scores)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npz"]
    source = StoredScores(file)
    assert source.state_dict() == {}
    source.select([ids[2], ids[0], ids[2]])
    pred = torch.zeros(3, 4)
    torch.testing.assert_close(source(pred, False), scores[[2, 0, 2]])
    torch.testing.assert_close(
        F.logsigmoid(source(pred, True)), scores[[2, 0, 2]], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"has no scores of sample 99 \(1 of 1 are missing\)"):
        source.select([99])
    with pytest.raises(ValueError, match="StoredScores knows 3 sample ids for 2 rows"):
        source(pred[:2], False)


def test_a_bad_file_of_scores_is_one_sentence(tmp_path):
    file = tmp_path / "scores.npz"
    missing = StoredScores(file)  # as in a test of the trained model, elsewhere
    with pytest.raises(ValueError, match=r"is not a file of stored scores \(.*No such file"):
        missing.select([1])
    with pytest.raises(ValueError, match="StoredScores knows no sample ids for 2 rows"):
        missing(torch.zeros(2, 2), False)
    file.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="is not a file of stored scores"):
        StoredScores(file)
    # an array of Python objects would have to be unpickled
    np.savez(file, ids=np.array([print], dtype=object), log_probabilities=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="is not a file of stored scores"):
        StoredScores(file)
    np.savez(file, ids=np.arange(3), log_probabilities=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"expected \(M,\) whole numbers or texts"):
        StoredScores(file)
    np.savez(file, ids=np.arange(1), log_probabilities=np.ones((1, 2)))
    with pytest.raises(ValueError, match="not finite numbers <= 0"):
        StoredScores(file)
    with pytest.raises(ValueError, match="expected one id per row, each once"):
        write_scores(file, [1, 1], torch.zeros(2, 2))
    with pytest.raises(ValueError, match="ends in .npz"):
        write_scores(tmp_path / "scores.pkl", [1], torch.zeros(1, 2))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_class_that_the_bias_model_excludes(name):
    """log 0 = -inf: with theta it counts for nothing at 0, and the loss stays finite at 1."""
    logits, _, _ = batch(n=2, c=3)
    logits.requires_grad_()
    labels, even = torch.tensor([0, 2]), torch.zeros(2, 3, dtype=torch.float64)
    bias = torch.log_softmax(torch.tensor([[1.0, 0.5, -math.inf]], dtype=torch.float64), dim=1)
    args = dict(use_sigmoid=False, theta=0.0)
    found = FUNCTIONS[name](logits, labels, bias_logits=bias.expand(2, 3), **args)
    if name in ("debiased focal", "product of experts"):
        torch.testing.assert_close(found, FUNCTIONS[name](logits, labels, bias_logits=even, **args))
    assert found.isfinite() and torch.autograd.grad(found, logits)[0].isfinite().all()
    whole = FUNCTIONS[name](logits[:1], labels[:1], bias_logits=bias, use_sigmoid=False, theta=1.0)
    assert whole.isfinite() and torch.autograd.grad(whole, logits)[0].isfinite().all()


def test_confidence_regularization_divides_by_the_rows_that_are_kept():
    logits, bias, labels = batch(n=5)
    labels[3] = 1
    labels[labels == 1] = 2
    labels[3] = 1
    keep, args = labels != 1, dict(use_sigmoid=False)
    found = L.confidence_regularization(
        logits, labels, bias_logits=bias, teacher_logits=bias / 2, ignore_index=1, **args
    )
    expected = L.confidence_regularization(
        logits[keep], labels[keep], bias_logits=bias[keep], teacher_logits=bias[keep] / 2, **args
    )
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    junk = bias.masked_fill(~keep[:, None], math.nan)
    for function in FUNCTIONS.values():
        call = dict(ignore_index=1, **args)
        same = function(logits, labels, bias_logits=bias, **call)
        if function is not FUNCTIONS["confidence"]:
            torch.testing.assert_close(function(logits, labels, bias_logits=junk, **call), same)
