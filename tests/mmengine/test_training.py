"""The losses under MMEngine's Runner: progress, resume, EMA, accumulation, two processes."""

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import polyfocal.mmengine
from polyfocal.losses import LOSSES, bias
from polyfocal.losses.functional import cyclical_focal_loss
from polyfocal.losses.quality import QualityLoss

CYCLICAL = dict(type="polyfocal.CyclicalFocalLoss", use_sigmoid=True, factor=2.0)


class Rows(Dataset):
    """Sixteen rows, of classes 0, 1 and background."""

    metainfo: ClassVar[dict] = {}

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.randn(4, generator=torch.Generator().manual_seed(i)), i % 3


class Classifier(BaseModel):
    """A linear layer; keeps what its loss saw."""

    def __init__(self, loss):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.loss_cls = MODELS.build(loss)
        self.seen = []

    def forward(self, rows, labels, mode="tensor"):
        logits = self.fc(rows)
        value = self.loss_cls(logits, labels)
        if isinstance(self.loss_cls, polyfocal.CyclicalFocalLoss):
            self.seen.append(self.loss_cls.progress())
        self.expected = logits.detach(), labels, value.detach()
        return dict(loss_cls=value)


def runner(work_dir, loss=CYCLICAL, epochs=3, by_iteration=False, **settings):
    torch.manual_seed(0)
    optim = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1))
    optim.update(settings.pop("optim_wrapper", {}))
    loop = dict(type="IterBasedTrainLoop", max_iters=4 * epochs) if by_iteration else None
    return Runner(
        model=Classifier(loss),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Rows(),
            batch_size=settings.pop("batch_size", 4),
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="default_collate"),
        ),
        optim_wrapper=optim,
        train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=2)),
        experiment_name=f"{Path(work_dir).parent.name}_{Path(work_dir).name}",
        log_level="ERROR",
        **settings,
    )


def progress_of(n):
    return [i / (n - 1) for i in range(n)]


@pytest.mark.parametrize("by_iteration", [False, True])
def test_progress_needs_no_hook(tmp_path, by_iteration):
    run = runner(tmp_path / "work", by_iteration=by_iteration)
    run.train()
    assert run.model.seen == pytest.approx(progress_of(12))
    logits, labels, value = run.model.expected
    expected = cyclical_focal_loss(
        logits, labels, progress=1.0, factor=2.0, alpha=0.25, use_sigmoid=True
    )
    torch.testing.assert_close(value, expected)


def test_one_iteration_is_the_start(tmp_path):
    run = runner(tmp_path / "work", by_iteration=True, epochs=1)
    run.train_loop._max_iters = 1
    run.train()
    assert run.model.seen == [0.0]


def test_progress_survives_a_resume(tmp_path):
    # Stopped after two of three epochs, then resumed in a new Runner, as a new process would.
    class Stop(Exception):
        pass

    from mmengine.hooks import Hook

    class StopHook(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 2:
                raise Stop

    run = runner(tmp_path / "first", custom_hooks=[StopHook()])
    with pytest.raises(Stop):
        run.train()
    again = runner(
        tmp_path / "second", load_from=str(tmp_path / "first" / "epoch_2.pth"), resume=True
    )
    again.train()
    assert again.model.seen == pytest.approx(progress_of(12)[8:])


def test_ema_and_accumulation(tmp_path):
    run = runner(
        tmp_path / "work",
        custom_hooks=[dict(type="EMAHook")],
        optim_wrapper=dict(accumulative_counts=2),
    )
    run.train()
    assert run.model.seen == pytest.approx(progress_of(12))


def test_no_progress_source_is_said():
    MessageHub.get_instance("nothing_published")
    loss = MODELS.build(CYCLICAL)
    rows = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"finds no training progress in MMEngine's MessageHub"):
        loss(*rows)
    loss.set_progress(0.0)
    assert loss(*rows).isfinite()


def test_class_statistics_are_logged_and_not_summed(tmp_path):
    run = runner(
        tmp_path / "work",
        loss=dict(type="polyfocal.FocalLoss", use_sigmoid=True),
        epochs=1,
        custom_hooks=[dict(type="polyfocal.ClassStatisticsHook", interval=4)],
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
    )
    run.train()
    scalars = run.message_hub.log_scalars
    names = [name for name in scalars if "positives" in name or "p_t" in name]
    assert sorted(names) == [f"train/cls/{k}_{c}" for k in ("p_t", "positives") for c in (0, 1)]
    # rows 0, 3, ..., 15 are of class 0 and 1, 4, ..., 13 of class 1
    assert scalars["train/cls/positives_0"].current() == 6
    assert scalars["train/cls/positives_1"].current() == 5
    rows = torch.stack([Rows()[i][0] for i in range(0, 16, 3)])
    expected = run.model.fc(rows).sigmoid()[:, 0].mean().item()
    assert scalars["train/cls/p_t_0"].current() == pytest.approx(expected, rel=1e-5)
    assert not [name for name in names if "loss" in name]


def test_scoped_type_needs_no_import():
    code = (
        "from mmengine.registry import MODELS\n"
        "loss = dict(type='polyfocal.Poly1FocalLoss', epsilon=1.0, use_sigmoid=True)\n"
        "loss = MODELS.build(loss)\n"
        "assert type(loss).__module__ == 'polyfocal.losses.poly1_focal', type(loss).__module__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


TWO_PROCESSES = """
import sys, torch
torch.cuda.set_device = lambda device: None  # MMEngine's launcher calls it whatever the backend
sys.path.insert(0, {tests!r})
from mmengine.dist import get_rank
from test_training import runner, CYCLICAL
run = runner({work!r}, epochs=2, launcher="pytorch",
    env_cfg=dict(dist_cfg=dict(backend="gloo")),
    cfg=dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel", device_ids=None)))
run.train()
model = run.model.module
gathered = [None, None]
torch.distributed.all_gather_object(gathered, (model.seen, model.fc.weight.detach()))
(first, weight), (second, other) = gathered
assert first == second and len(first) == 4, gathered
assert torch.equal(weight, other)
if get_rank() == 0:
    torch.save(weight, {work!r} + "/weight.pth")
"""


def test_two_processes_train_as_one(tmp_path):
    # Two processes with half a batch each, against one with the whole: 8 rows a step, 2 steps an
    # epoch. The rows of a step are the same, in another order, and the loss is a mean.
    work = tmp_path / "two"
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent), work=str(work)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = runner(tmp_path / "one", epochs=2, batch_size=8)
    one.train()
    weight = torch.load(work / "weight.pth", weights_only=True)
    torch.testing.assert_close(weight, one.model.fc.weight.detach())


COUNTS = [8.0, 4.0, 2.0, 1.0]
PRIORS = dict(type="polyfocal.ClassPriors", class_counts=COUNTS)
NEEDED = dict(
    epsilon=1.0, epsilons=[1.0], gamma=2.0, k=2, class_counts=COUNTS, max_margin=0.5, bias=PRIORS,
    teacher=PRIORS, use_sigmoid=True,
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_of_a_config_is_pickled(name):
    """As ``torch.save(model)`` and a spawned process do it."""
    wanted = inspect.signature(LOSSES[name]).parameters
    settings = {
        key: value
        for key, value in NEEDED.items()
        if key in wanted and wanted[key].default in (inspect.Parameter.empty, None)
    }
    loss = MODELS.build(dict(type=f"polyfocal.{name}", **settings))
    again = pickle.loads(pickle.dumps(loss))
    assert type(again) is type(loss)
    torch.manual_seed(0)
    pred, labels, scores = torch.rand(6, 4), torch.arange(6) % 4, torch.rand(6, 4)
    of_quality = issubclass(LOSSES[name], QualityLoss)
    of_map = name == "GaussianPoly1FocalLoss"
    target = (labels, scores[:, 0]) if of_quality else scores if of_map else labels
    values = []
    for one in (loss, again):
        if hasattr(one, "set_progress"):
            one.set_progress(0.5)
        torch.manual_seed(0)
        values.append(one(pred, target))
    assert values[0] > 0 and values[0] == values[1]


def test_a_bias_model_of_a_config_is_pickled(tmp_path):
    file = tmp_path / "scores.npz"
    stored = torch.log_softmax(torch.randn(2, 3), dim=1)
    bias.write_scores(file, [7, 9], stored)
    source = MODELS.build(dict(type="polyfocal.StoredScores", file=str(file)))
    again = pickle.loads(pickle.dumps(source))
    again.select([9, 7])
    torch.testing.assert_close(again(torch.zeros(2, 3), False), stored[[1, 0]])
    head = MODELS.build(dict(type="polyfocal.BiasHead", num_classes=2, sees="colour"))
    seen = torch.rand(3, 6)
    torch.testing.assert_close(pickle.loads(pickle.dumps(head)).classify(seen), head.classify(seen))
