"""Curvature of detectors: what has a second derivative, and what is refused."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.losses import SeesawLoss
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from prepared import prepare_experiment
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from polyfocal.curvature import Hessian, frozen
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.errors import UserError
from polyfocal.mmengine.curvature import batch_losses, fixed_batches, measure_curvature

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    settings = DigitScenes(num_train=4, num_val=1, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "digits", settings)


def detector(scenes, config):
    """A tiny detector with random weights and one batch of two pictures."""
    cfg = prepare_experiment(CONFIGS / f"{config}.py", data=scenes, profile="tiny").config
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
        model.init_weights()
        loader = Runner.build_dataloader(cfg.train_dataloader)
        return model, fixed_batches(loader, 1)


@pytest.mark.parametrize("config", ["retinanet_poly1", "retinanet_focal", "mask_rcnn_poly1"])
def test_largest_eigenvalue_of_a_classification_branch(scenes, config):
    model, batches = detector(scenes, config)
    measured = measure_curvature(model, batches, steps=30, probes=2)
    assert all("cls" in name for name in measured.parameters)
    largest = float(measured.eigenvalues.values)
    assert largest > 0 and measured.eigenvalues.errors.max() < 0.05 * largest
    assert model.training and all(p.requires_grad for p in model.neck.parameters())


@pytest.mark.parametrize("config", ["retinanet_poly1", "retinanet_focal"])
def test_curve_of_the_loss_along_its_gradient(scenes, config):
    """v . H v against second differences of the loss itself, where no ReLU's kink is passed."""
    model, batches = detector(scenes, config)
    model.double()
    with frozen(model, "retina_cls") as chosen, torch.no_grad():
        losses = batch_losses(model, batches)
        hessian = Hessian(losses, chosen.values())
        with torch.enable_grad():
            gradient = torch.autograd.grad(losses[0](), list(chosen.values()))
        v = torch.cat([g.flatten() for g in gradient])
        v /= v.norm()
        start = parameters_to_vector(chosen.values())
        step, values = 1e-3, []
        for position in (start + step * v, start, start - step * v):
            vector_to_parameters(position, chosen.values())
            values.append(hessian.loss())
        vector_to_parameters(start, chosen.values())
        curve = float(v @ hessian.multiply(v.unsqueeze(0))[0])
    assert curve == pytest.approx((values[0] - 2 * values[1] + values[2]) / step**2, rel=1e-3)


def test_what_has_no_second_derivative_is_refused_by_name(scenes):
    model, batches = detector(scenes, "mask_rcnn_poly1")
    with pytest.raises(UserError, match="RoIAlignFunction lies between the chosen parameters"):
        measure_curvature(model, batches, parameters="^neck", kind="cls", steps=2)
    assert model.training and all(p.requires_grad for p in model.neck.parameters())


def picture():
    """A picture of 64 x 64 pixels with one box, whose coordinates have the sum 96."""
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), pad_shape=(64, 64)))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 40]]))
    return dict(inputs=torch.zeros(3, 64, 64), data_samples=sample)


class Boxes(BaseModel):
    """Its loss is |w|^2 times the coordinates of a picture's box: H = 2 x 96 I at the first size.

    Pictures and boxes get another size in every second iteration, as YOLOX has it.
    """

    def __init__(self, **augment):
        resize = dict(type="BatchSyncRandomResize", random_size_range=(32, 320), **augment)
        super().__init__(DetDataPreprocessor(batch_augments=[resize]))
        self.cls_scale = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.cls_scale.weight)

    def forward(self, inputs, data_samples, mode="loss"):
        scale = sum(sample.gt_instances.bboxes.sum() for sample in data_samples)
        return dict(loss_cls=self.cls_scale.weight.square().sum() * scale)


def boxes_runner(work_dir, hooks):
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = Boxes(interval=2)
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=[picture() for _ in range(5)],
            batch_size=1,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-6)),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        custom_hooks=hooks,
        randomness=dict(seed=0),
        experiment_name=f"{work_dir.parent.name}_{work_dir.name}",
        log_level="ERROR",
    )


def test_boxes_do_not_grow_where_pictures_change_their_size(tmp_path):
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = Boxes(interval=10)
    model.data_preprocessor.batch_augments[0]._input_size = (96, 96)  # boxes 1.5 times as large
    batches = [{key: [value] for key, value in picture().items()} for _ in range(2)]
    for _ in range(2):
        measured = measure_curvature(model, batches, probes=2)
        assert measured.loss == 3 * 1.5 * 96 and measured.trace.value == 3 * 2 * 1.5 * 96
        assert float(measured.eigenvalues.values) == pytest.approx(2 * 1.5 * 96)
    assert batches[0]["data_samples"][0].gt_instances.bboxes.tolist() == [[8, 8, 40, 40]]

    plain = boxes_runner(tmp_path / "plain", [])
    plain.train()
    hook = dict(type="polyfocal.CurvatureHook", steps=3, probes=2)
    hooked = boxes_runner(tmp_path / "hooked", [hook])
    hooked.train()
    size = hooked.model.data_preprocessor.batch_augments[0]._input_size
    assert size != (64, 64), "the training had other sizes"
    history = hooked.message_hub.log_scalars["curvature/trace"].data[0]
    assert history.tolist() == [3 * 2 * 96] * 3, "and its measurements had not"
    assert size == plain.model.data_preprocessor.batch_augments[0]._input_size
    assert torch.equal(plain.model.cls_scale.weight, hooked.model.cls_scale.weight)


class Counting(BaseModel):
    """With a loss that counts the samples of each class, and weighs them by that."""

    def __init__(self):
        super().__init__()
        self.fc_cls = nn.Linear(2, 5)
        self.loss_cls = SeesawLoss(num_classes=3, return_dict=False)
        self.loss_cls.cum_samples[:3] = torch.tensor([9.0, 3.0, 1.0])

    def forward(self, rows, labels, mode="loss"):
        return dict(loss_cls=self.loss_cls(self.fc_cls(rows), labels))


def test_a_loss_that_counts_is_left_as_it_was():
    torch.manual_seed(0)
    model, batch = Counting(), (torch.randn(8, 2), torch.arange(8) % 3)
    expected = model(*batch)["loss_cls"].item()  # counts 8 samples
    model.loss_cls.cum_samples[:3] = torch.tensor([9.0, 3.0, 1.0])
    losses = batch_losses(model, [batch])
    assert [loss().item() for loss in losses * 3] == pytest.approx([expected] * 3, rel=1e-6)
    assert model.loss_cls.cum_samples.tolist()[:3] == [9, 3, 1]
