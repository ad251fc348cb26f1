"""Curvature and its penalty under MMEngine's Runner."""

import copy
import json
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import torch
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import polyfocal.mmengine  # noqa: F401
from polyfocal.errors import UserError
from polyfocal.losses.bias import write_scores
from polyfocal.losses.functional import noised_topk_loss
from polyfocal.mmengine.curvature import batch_losses, fixed_batches, measure_curvature


class Rows(Dataset):
    """Sixteen rows of three classes, with a little noise on them each time."""

    metainfo: ClassVar[dict] = {}

    def __len__(self):
        return 16

    def __getitem__(self, i):
        row = torch.randn(4, generator=torch.Generator().manual_seed(i))
        return row + 0.1 * torch.randn(4), i % 3


class Classifier(BaseModel):
    """With batch normalisation and dropout, and a loss that its classification does not feel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.2)
        self.fc_cls = nn.Linear(5, 3)
        self.loss_cls = MODELS.build(
            dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=0.0, use_sigmoid=False)
        )

    def forward(self, rows, labels, mode="tensor"):
        features = self.norm(self.stem(rows)).tanh()
        logits = self.fc_cls(self.drop(features))
        return dict(loss_cls=self.loss_cls(logits, labels), loss_bbox=[features.square().mean()])


def runner(
    work_dir, hooks=(), epochs=2, lr=0.1, model=Classifier, data=None, collate="default", **settings
):
    torch.manual_seed(0)
    return Runner(
        model=model(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=data or Rows(),
            batch_size=4,
            sampler=dict(type="DefaultSampler", shuffle=True),
            collate_fn=dict(type=f"{collate}_collate"),
        ),
        optim_wrapper=settings.pop(
            "optim_wrapper", dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=lr))
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
        custom_hooks=list(hooks),
        randomness=dict(seed=0),
        experiment_name=f"{Path(work_dir).parent.name}_{Path(work_dir).name}",
        visualizer=dict(
            type="Visualizer",
            vis_backends=[dict(type="LocalVisBackend")],
            name=f"{Path(work_dir).parent.name}_{Path(work_dir).name}",
        ),
        log_level="ERROR",
        **settings,
    )


def exact_hessian(model, batches, names):
    """Of the mean cross-entropy of some batches, in evaluation mode."""
    model = copy.deepcopy(model).double().eval()
    parameters = dict(model.named_parameters())
    sizes = [parameters[name].numel() for name in names]

    def mean(flat):
        new = {
            name: part.view_as(parameters[name])
            for name, part in zip(names, flat.split(sizes), strict=True)
        }

        def logits(rows):
            return functional_call(
                nn.Sequential(model.stem, model.norm, nn.Tanh(), model.fc_cls),
                {
                    name.replace("stem", "0").replace("norm", "1").replace("fc_cls", "3"): value
                    for name, value in new.items()
                },
                (rows.double(),),
            )

        return sum(cross_entropy(logits(rows), labels) for rows, labels in batches) / len(batches)

    return hessian(mean)(torch.cat([parameters[name].detach().flatten() for name in names]))


def test_hook_logs_the_curvature_and_changes_nothing(tmp_path):
    hook = dict(type="polyfocal.CurvatureHook", interval=3, top_k=2, probes=400, steps=18)
    plain = runner(tmp_path / "plain", epochs=4)
    plain.train()
    run = runner(tmp_path / "hooked", [hook], epochs=4)
    run.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name

    batches = fixed_batches(run.train_dataloader, 2)
    matrix = exact_hessian(run.model, batches, ["fc_cls.weight", "fc_cls.bias"])
    (scalars,) = Path(run.work_dir).glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    logged = [line for line in lines if "curvature/trace" in line]
    assert [line["step"] for line in logged] == [3, 4], "every third epoch and the last"
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:2].tolist()
    found = [logged[-1][f"curvature/eigenvalue_{k}"] for k in (1, 2)]
    assert found == pytest.approx(expected, rel=1e-3)
    error = logged[-1]["curvature/trace"] - float(matrix.trace())
    assert abs(error) < 4 * logged[-1]["curvature/trace_error"] < 0.2 * float(matrix.trace())
    assert all("curvature" not in name for line in lines for name in line if "loss" in line)


def test_whole_model_and_all_losses(tmp_path):
    run = runner(tmp_path / "work")
    batches = fixed_batches(run.build_dataloader(run._train_dataloader), 3, seed=5)
    again = fixed_batches(run.build_dataloader(run._train_dataloader), 3, seed=5)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    names = [name for name, _ in run.model.named_parameters()]
    matrix = exact_hessian(run.model, batches, names)
    ours = measure_curvature(run.model, batches, parameters=".", kind="cls", steps=60)
    assert ours.size == len(matrix) and ours.parameters == tuple(names)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert float(ours.eigenvalues.values) == pytest.approx(largest, rel=1e-3)
    everything = measure_curvature(run.model, batches, parameters=".", kind="all")
    run.model.eval()
    both, classification = (
        sum(float(loss()) for loss in batch_losses(run.model, batches, kind)) / 3
        for kind in ("all", "cls")
    )
    assert (everything.loss, ours.loss) == pytest.approx((both, classification), rel=1e-5)
    assert both > classification


def test_penalty_is_the_trace_and_lowers_it(tmp_path):
    settings = dict(type="polyfocal.TracePenaltyHook", coefficient=0.5, probes=300)
    run = runner(tmp_path / "one", [settings], epochs=1, lr=0.0)
    run.model.drop.p = 0.0
    seen = []
    run.model.register_forward_pre_hook(lambda model, args: seen.append(args))
    run.train()
    hub = run.message_hub
    trace = hub.get_scalar("train/trace").current()
    logged = {k: hub.get_scalar(f"train/{k}").current() for k in ("loss", "loss_cls", "loss_bbox")}
    assert hub.get_scalar("train/loss_trace").current() == pytest.approx(0.5 * trace, rel=1e-5)
    total = logged["loss_cls"] + logged["loss_bbox"] + 0.5 * trace
    assert logged["loss"] == pytest.approx(total, rel=1e-5)

    # With the statistics of the batch, as the step computed it.
    rows, labels = seen[-1]
    model = run.model
    features = nn.functional.batch_norm(model.stem(rows), None, None, training=True).tanh()
    weight = torch.cat([model.fc_cls.weight, model.fc_cls.bias[:, None]], 1).detach()

    def loss(flat):
        padded = torch.cat([features.detach(), torch.ones(4, 1)], 1)
        return cross_entropy(padded @ flat.view(3, 6).T, labels)

    expected = hessian(loss)(weight.flatten()).trace()
    assert trace == pytest.approx(float(expected), rel=0.1)

    traces = []
    for coefficient in (0.0, 0.3):
        hook = dict(type="polyfocal.TracePenaltyHook", coefficient=coefficient, parameters=".")
        run = runner(tmp_path / f"many{coefficient}", [hook], epochs=30)
        run.train()
        assert not run.model._forward_hooks, "the model is left as it was"
        batches = fixed_batches(run.train_dataloader, 4)
        traces.append(measure_curvature(run.model, batches, parameters=".", probes=50).trace.value)
    assert traces[1] < 0.8 * traces[0]


class Saddle(Classifier):
    """Its classification loss is -|w|^2 over the 15 weights and 3 biases of fc_cls: H = -2 I."""

    def forward(self, rows, labels, mode="tensor"):
        outputs = super().forward(rows, labels)
        outputs["loss_cls"] = -sum(p.square().sum() for p in self.fc_cls.parameters())
        return outputs


def test_a_negative_trace_is_not_penalised(tmp_path):
    plain = runner(tmp_path / "plain", model=Saddle)
    plain.train()
    hook = dict(type="polyfocal.TracePenaltyHook", coefficient=0.5)
    run = runner(tmp_path / "hook", [hook], model=Saddle)
    run.train()
    assert run.message_hub.get_scalar("train/trace").current() == pytest.approx(-36)
    assert run.message_hub.get_scalar("train/loss_trace").current() == 0
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, run.model.state_dict()[name])


def test_penalty_of_zero_changes_nothing(tmp_path):
    plain = runner(tmp_path / "plain")
    plain.train()
    run = runner(tmp_path / "zero", [dict(type="polyfocal.TracePenaltyHook", coefficient=0.0)])
    run.train()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, run.model.state_dict()[name])


def test_hook_and_penalty_together(tmp_path):
    hooks = [
        dict(type="polyfocal.CurvatureHook"),
        dict(type="polyfocal.TracePenaltyHook", coefficient=0.1),
    ]
    run = runner(tmp_path / "work", hooks)
    run.train()
    logged = run.message_hub.get_scalar("curvature/loss").current()
    batches = fixed_batches(run.train_dataloader, 2)
    assert measure_curvature(run.model, batches).loss == pytest.approx(logged)
    assert logged == pytest.approx(measure_curvature(run.model, batches, kind="cls").loss)


def test_class_statistics_are_those_of_the_training(tmp_path):
    hooks = [
        dict(type="polyfocal.CurvatureHook", steps=3, probes=2),
        dict(type="polyfocal.ClassStatisticsHook", interval=8),
    ]
    run = runner(tmp_path / "work", hooks)
    run.train()
    counts = [run.message_hub.get_scalar(f"train/cls/positives_{c}").current() for c in range(3)]
    assert counts == [2 * 6, 2 * 5, 2 * 5], "sixteen rows, twice"


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        (dict(type="polyfocal.CurvatureHook", interval=0), "interval=0"),
        (dict(type="polyfocal.CurvatureHook", batches=0), "batches=0"),
        (dict(type="polyfocal.CurvatureHook", kind="box"), "kind='box'"),
        (dict(type="polyfocal.CurvatureHook", top_k=0), "k=0 eigenvalues .* expected 1 or more"),
        (dict(type="polyfocal.CurvatureHook", top_k=40), "steps=30 products cannot give k=40"),
        (dict(type="polyfocal.CurvatureHook", steps=0), "steps=0 products cannot give k=1"),
        (dict(type="polyfocal.CurvatureHook", probes=1), "probes=1: hutchinson needs 2 or more"),
        (dict(type="polyfocal.TracePenaltyHook", coefficient=-1), "coefficient=-1"),
        (dict(type="polyfocal.TracePenaltyHook", coefficient=1, probes=0), "probes=0"),
        (dict(type="polyfocal.TracePenaltyHook", coefficient=1, kind="box"), "kind='box'"),
    ],
)
def test_bad_settings(hook, sentence):
    with pytest.raises(UserError, match=sentence):
        HOOKS.build(hook)


class OneLoss(Classifier):
    def forward(self, rows, labels, mode="tensor"):
        return dict(loss=super().forward(rows, labels)["loss_cls"])


@pytest.mark.parametrize(
    ("model", "settings", "sentence"),
    [
        (Classifier, dict(parameters="head"), "matches 'head'"),
        (Classifier, dict(top_k=19), "k=19 eigenvalues .* expected 1 to 18"),  # 5 x 3 + 3
        (OneLoss, dict(kind="cls"), "no loss of the model is called cls: it has loss"),
    ],
)
def test_a_hook_that_does_not_fit_the_model_is_refused_before_the_first_step(
    tmp_path, model, settings, sentence
):
    run = runner(tmp_path, [dict(type="polyfocal.CurvatureHook", **settings)], model=model)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(UserError, match=sentence):
        run.train()
    assert run.iter == 0
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in before.items())


def test_probes_are_checked_before_any_product(tmp_path, monkeypatch):
    run = runner(tmp_path)
    monkeypatch.setattr("polyfocal.curvature.Hessian.multiply", None)
    batches = fixed_batches(run.train_dataloader, 1)
    with pytest.raises(UserError, match="probes=1: hutchinson needs 2"):
        measure_curvature(run.model, batches, top_k=5, probes=1)


def test_penalty_refuses_mixed_precision(tmp_path, monkeypatch):
    monkeypatch.setattr("mmengine.optim.AmpOptimWrapper.__init__", lambda self: None)
    from mmengine.optim import AmpOptimWrapper

    run = runner(tmp_path / "work", [dict(type="polyfocal.TracePenaltyHook", coefficient=1.0)])
    run.optim_wrapper = AmpOptimWrapper()
    with pytest.raises(UserError, match="train without AMP"):
        run.call_hook("before_train")


def test_of_a_model_that_several_processes_train(tmp_path):
    """What wraps the model is looked through: the numbers are those of the model itself."""
    made = runner(tmp_path / "w")
    batches = fixed_batches(made.train_dataloader, 2)
    alone = measure_curvature(made.model, batches, probes=4)
    wrapped = measure_curvature(nn.DataParallel(made.model), batches, probes=4)
    assert wrapped.parameters == alone.parameters and wrapped.loss == alone.loss
    assert wrapped.trace == alone.trace
    assert torch.equal(wrapped.eigenvalues.values, alone.eigenvalues.values)


class NamedRows(Rows):
    """Their ids are texts."""

    def __getitem__(self, i):
        row, label = super().__getitem__(i)
        return dict(inputs=row, data_samples=BaseDataElement(metainfo=dict(name=f"r{i}", y=label)))


class Debiased(BaseModel):
    """Logits plus stored scores of the sample: a product of experts."""

    def __init__(self, file):
        super().__init__()
        self.fc_cls = nn.Linear(4, 3)
        bias = dict(type="polyfocal.StoredScores", file=str(file))
        self.loss_cls = MODELS.build(
            dict(type="polyfocal.ProductOfExpertsLoss", use_sigmoid=False, bias=bias)
        )

    def forward(self, inputs, data_samples, mode="tensor"):
        labels = torch.tensor([sample.y for sample in data_samples])
        return dict(loss_cls=self.loss_cls(self.fc_cls(torch.stack(inputs)), labels))


def test_stored_scores_are_those_of_the_samples_that_are_measured(tmp_path):
    torch.manual_seed(1)
    stored = (3 * torch.randn(16, 3)).log_softmax(1)
    write_scores(tmp_path / "scores.npz", [f"r{i}" for i in range(16)], stored)
    settings = dict(
        model=lambda: Debiased(tmp_path / "scores.npz"), data=NamedRows(), collate="pseudo"
    )
    ids = dict(type="polyfocal.StoredScoresHook", key="name")
    plain = runner(tmp_path / "plain", [ids], **settings)
    plain.train()
    hook = dict(type="polyfocal.CurvatureHook", batches=3, probes=2)
    run = runner(tmp_path / "hooked", [ids, hook], **settings)
    run.train()
    assert torch.equal(plain.model.fc_cls.weight, run.model.fc_cls.weight)
    source, of_training = (one.model.loss_cls.bias._selected for one in (run, plain))
    assert torch.equal(source, of_training), "the samples of the last step"

    batches = fixed_batches(run.train_dataloader, 3)
    rows = torch.cat([torch.stack(batch["inputs"]) for batch in batches]).double()
    samples = [sample for batch in batches for sample in batch["data_samples"]]
    scores = torch.stack([stored[int(sample.name[1:])] for sample in samples]).double()
    labels = torch.tensor([sample.y for sample in samples])

    def mean(flat):
        padded = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        return cross_entropy(padded @ flat.view(3, 5).T + scores, labels)

    fc = run.model.fc_cls
    weights = torch.cat([fc.weight, fc.bias[:, None]], dim=1).detach().double().flatten()
    logged = {
        name: run.message_hub.get_scalar(f"curvature/{name}").current()
        for name in ("loss", "eigenvalue_1")
    }
    assert logged["loss"] == pytest.approx(float(mean(weights)), rel=1e-5)
    largest = float(torch.linalg.eigvalsh(hessian(mean)(weights))[-1])
    assert logged["eigenvalue_1"] == pytest.approx(largest, rel=1e-3)


class Noised(Classifier):
    """With a loss whose n-th call draws its noise from (7, n)."""

    def __init__(self):
        super().__init__()
        noised = dict(type="polyfocal.NoisedTopKLoss", k=1, epsilon=1.0, seed=7, use_sigmoid=False)
        self.loss_cls = MODELS.build(noised)

    def forward(self, rows, labels, mode="tensor"):
        logits = self.fc_cls(self.norm(self.stem(rows)).tanh())
        return dict(loss_cls=self.loss_cls(logits, labels).square())  # a hinge has no curvature


def test_seeded_noise_is_that_of_the_batch_and_the_training_keeps_its_own(tmp_path):
    plain = runner(tmp_path / "plain", model=Noised)
    plain.train()
    hook = dict(type="polyfocal.CurvatureHook", steps=5, probes=2)
    run = runner(tmp_path / "hooked", [hook], model=Noised)
    run.train()
    assert run.model.loss_cls._calls == 2 * 4, "epochs of four steps"
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name

    model = run.model.eval()
    expected = 0.0
    for number, (rows, labels) in enumerate(fixed_batches(run.train_dataloader, 2)):
        noise = torch.Generator().manual_seed(7 * 1_000_003 + number)
        logits = model.fc_cls(model.norm(model.stem(rows)).tanh())
        loss = noised_topk_loss(logits, labels, k=1, epsilon=1.0, generator=noise)
        expected += loss.square().item() / 2
    logged = run.message_hub.get_scalar("curvature/loss").current()
    assert logged == pytest.approx(expected, rel=1e-5)
