"""Self-debiasing and AdaFocal under MMEngine's Runner, and the losses' settings from configs."""

import copy
import json
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import numpy as np
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import Dataset, Subset

import polyfocal.mmengine
from polyfocal.data.unpickling import read_weights
from polyfocal.mmengine import AdaFocalHook, StoredScoresHook, StoreScoresHook, class_counts


class Rows(Dataset):
    """Rows of three classes whose ids count down from 100."""

    metainfo = {"classes": ("a", "b", "c")}  # noqa: RUF012

    def __init__(self, n=24):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        row = torch.randn(4, generator=torch.Generator().manual_seed(i))
        sample = BaseDataElement(metainfo={"sample_idx": 100 - i, "label": i % 3})
        return {"inputs": row + torch.eye(4)[i % 3], "data_samples": sample}


class Classifier(BaseModel):
    def __init__(self, loss):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.loss_cls = MODELS.build(loss)

    def forward(self, inputs, data_samples, mode="tensor"):
        logits = self.fc(torch.stack(inputs))
        if mode == "tensor":
            return logits
        labels = torch.tensor([sample.label for sample in data_samples])
        self.last = logits.detach(), labels, [sample.sample_idx for sample in data_samples]
        self.value = self.loss_cls(logits, labels)
        return {"loss": self.value}


def loader(dataset=None, shuffle=False):
    return dict(
        dataset=dataset or Rows(),
        batch_size=8,
        sampler=dict(type="DefaultSampler", shuffle=shuffle),
        collate_fn=dict(type="pseudo_collate"),
    )


def runner(work_dir, loss, hooks, epochs=2, train=None, **settings):
    torch.manual_seed(0)
    return Runner(
        model=Classifier(loss),
        work_dir=str(work_dir),
        train_dataloader=loader(train, shuffle=True),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.5)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        custom_hooks=hooks,
        experiment_name=f"{Path(work_dir).parent.name}_{Path(work_dir).name}",
        log_level="ERROR",
        **settings,
    )


CE = dict(type="polyfocal.Poly1CrossEntropyLoss", epsilon=0.0)


def test_self_debiasing_from_a_shallow_model_to_the_loss(tmp_path):
    file = tmp_path / "shallow" / "scores.npz"
    store = dict(type="polyfocal.StoreScoresHook", out=str(file), dataloader=loader())
    shallow = runner(tmp_path / "one", CE, [store], train=Subset(Rows(), range(8)))
    shallow.train()
    assert shallow.model.training
    with np.load(file, allow_pickle=False) as archive:
        ids, stored = archive["ids"], torch.from_numpy(archive["log_probabilities"])
    assert sorted(ids.tolist()) == list(range(77, 101))  # of all samples, not of the eight

    bias = dict(type="polyfocal.StoredScores", file=str(file))
    loss = dict(type="polyfocal.ProductOfExpertsLoss", use_sigmoid=False, bias=bias, anneal_to=0.8)
    real = runner(tmp_path / "two", loss, [dict(type="polyfocal.StoredScoresHook")])
    real.train()
    logits, labels, seen = real.model.last
    rows = stored[[ids.tolist().index(key) for key in seen]]
    # the last step: theta is 0.8
    expected = nn.functional.cross_entropy(logits + 0.8 * rows, labels)
    torch.testing.assert_close(real.model.value.detach(), expected)
    assert set(real.model.state_dict()) == {"fc.weight", "fc.bias"}


def test_stored_scores_without_the_hook_or_an_id_are_refused(tmp_path):
    file = tmp_path / "scores.npz"
    polyfocal.losses.bias.write_scores(file, [1], torch.zeros(1, 3))
    bias = dict(type="polyfocal.StoredScores", file=str(file))
    loss = dict(type="polyfocal.ProductOfExpertsLoss", use_sigmoid=False, bias=bias)
    with pytest.raises(ValueError, match="StoredScores knows no sample ids for 8 rows"):
        runner(tmp_path / "a", loss, []).train()
    with pytest.raises(ValueError, match=r"has no scores of sample \d+ \(8 of 8 are missing\)"):
        runner(tmp_path / "b", loss, [StoredScoresHook()]).train()
    with pytest.raises(ValueError, match="of the batch has no 'img_id'"):
        runner(tmp_path / "c", loss, [StoredScoresHook(key="img_id")]).train()
    loss = dict(loss, bias=dict(bias, file=str(tmp_path / "none.npz")))
    run = runner(tmp_path / "d", loss, [StoredScoresHook()])
    with pytest.raises(ValueError, match=r"none.npz is not a file of stored scores \(.*No such f"):
        run.train()
    assert not hasattr(run.model, "last"), "before the first step"
    with pytest.raises(ValueError, match="expected a name in .npz"):
        StoreScoresHook("scores.pkl", {})


ADAFOCAL = dict(type="polyfocal.AdaFocalLoss", num_bins=3)


def test_adafocal_follows_the_validation_data(tmp_path):
    run = runner(tmp_path / "work", ADAFOCAL, [AdaFocalHook(loader(Rows(12)))], epochs=1)
    run.train()
    loss = run.model.loss_cls
    assert run.model.training and loss.gammas.ne(1).all()
    # The same from the trained model's outputs.
    data = [Rows(12)[i] for i in range(12)]
    with torch.no_grad():
        p = run.model([d["inputs"] for d in data], None).softmax(dim=1)
    expected = polyfocal.AdaFocalLoss(num_bins=3)
    confidence, guess = p.max(dim=1)
    expected.update(confidence, guess == torch.tensor([d["data_samples"].label for d in data]))
    torch.testing.assert_close(loss.gammas, expected.gammas)
    torch.testing.assert_close(loss.edges, expected.edges)


def test_adafocal_comes_back_on_resuming_and_stays_out_of_the_weights(tmp_path):
    hooks = [AdaFocalHook(loader(Rows(12)))]
    first = runner(tmp_path / "first", ADAFOCAL, hooks, epochs=2)
    first.train()
    file = tmp_path / "first" / "epoch_2.pth"
    checkpoint = read_weights(file)
    assert set(checkpoint["state_dict"]) == {"fc.weight", "fc.bias"}
    again = runner(
        tmp_path / "again", ADAFOCAL, copy.deepcopy(hooks), 3, load_from=str(file), resume=True
    )
    again.load_or_resume()
    torch.testing.assert_close(again.model.loss_cls.gammas, first.model.loss_cls.gammas)
    torch.testing.assert_close(again.model.loss_cls.edges, first.model.loss_cls.edges)


def test_adafocal_hook_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="finds no AdaFocalLoss"):
        runner(tmp_path / "a", CE, [AdaFocalHook(loader())]).train()
    with pytest.raises(ValueError, match="has no dataloader and the Runner has no validation"):
        runner(tmp_path / "b", ADAFOCAL, [AdaFocalHook()]).train()


def test_annealing_follows_the_runner():
    loss = MODELS.build(
        dict(
            type="polyfocal.DebiasedFocalLoss",
            use_sigmoid=False,
            anneal_to=0.5,
            bias=dict(type="polyfocal.ClassPriors", class_counts=[1, 2]),
        )
    )
    hub = MessageHub.get_instance("annealing")
    hub.update_info_dict(dict(iter=5, max_iters=11))
    assert loss.theta() == pytest.approx(0.75)
    with pytest.raises(TypeError, match="has no keyword 'anneal': it takes gamma, alpha"):
        MODELS.build(dict(type="polyfocal.DebiasedFocalLoss", use_sigmoid=False, anneal=0.5))


def test_class_counts_of_a_file_and_of_data_sets(tmp_path):
    file = tmp_path / "train.json"
    categories = [dict(id=7, name="cat"), dict(id=3, name="dog"), dict(id=9, name="owl")]
    annotations = [dict(category_id=c, iscrowd=0) for c in (3, 3, 7)]
    annotations += [dict(category_id=7, iscrowd=1), dict(category_id=3)]  # LVIS has no crowds
    file.write_text(json.dumps(dict(categories=categories, annotations=annotations)))
    assert class_counts(file) == [1, 3, 0]  # in the file's order

    class Labelled:
        targets = torch.tensor([1, 1, 0])

    class Detection:
        metainfo = dict(classes=("a", "b", "c"))  # noqa: RUF012

        def __len__(self):
            return 2

        def get_cat_ids(self, index):
            return [[1, 1], [0]][index]

    assert class_counts(Labelled()) == [1, 2]
    assert class_counts(Detection()) == [1, 2, 0]
    with pytest.raises(ValueError, match="class_counts of a int: expected the path"):
        class_counts(3)
    with pytest.raises(ValueError, match=r"missing.json cannot be read"):
        class_counts(tmp_path / "missing.json")
    file.write_text("[]")
    with pytest.raises(ValueError, match="is not a COCO annotation file"):
        class_counts(file)


def test_counts_of_a_config_may_be_a_file(tmp_path):
    file = tmp_path / "train.json"
    annotations = [dict(category_id=c) for c in [1] * 16 + [2]]
    categories = [dict(id=1, name="a"), dict(id=2, name="b")]
    file.write_text(json.dumps(dict(categories=categories, annotations=annotations)))
    loss = MODELS.build(
        dict(
            type="polyfocal.ImbalancedNoisedTopKLoss",
            k=1,
            epsilon=0.01,
            class_counts=str(file),
            max_margin=0.2,
        )
    )
    torch.testing.assert_close(loss.margins, torch.tensor([0.1, 0.2]))
    priors = MODELS.build(dict(type="polyfocal.ClassPriors", class_counts=str(file)))
    torch.testing.assert_close(priors.probabilities, torch.tensor([16 / 17, 1 / 17]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_class_statistics_of_a_map_of_labels_are_those_of_its_rows(dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(4, (2, 4, 5))
    labels[0, 0] = 255
    loss = polyfocal.FocalLoss(use_sigmoid=True, ignore_index=255)
    hooks = [polyfocal.mmengine.ClassStatisticsHook() for _ in range(2)]
    hooks[0]._count("loss", loss, (logits, labels.to(dtype)), {}, None)
    rows = logits.movedim(1, -1).reshape(-1, 3)
    hooks[1]._count("loss", loss, (rows, labels.reshape(-1)), {}, None)
    torch.testing.assert_close(hooks[0]._sums, hooks[1]._sums)
    assert hooks[0]._sums["loss"][0].tolist() == [(labels == c).sum() for c in range(3)]


@pytest.mark.parametrize("activated", [False, True])
def test_class_statistics_where_the_score_learns_the_overlap(activated):
    """As GFL's, RTMDet's and TOOD's heads call their losses; p_t is the score itself."""
    p = torch.tensor([[0.2, 0.1], [0.6, 0.3], [0.4, 0.9]])
    labels, overlaps = torch.tensor([0, 0, 2]), torch.tensor([0.7, 0.8, 0.0])
    loss = polyfocal.Poly1QualityFocalLoss(epsilon=1.0, use_sigmoid=True, activated=activated)
    hook = polyfocal.mmengine.ClassStatisticsHook()
    pred = p if activated else torch.logit(p)
    hook._count("loss", loss, (pred, (labels, overlaps)), {}, None)
    torch.testing.assert_close(hook._sums["loss"], torch.tensor([[2.0, 0.0], [0.8, 0.0]]))
