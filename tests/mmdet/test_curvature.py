"""Curvature of detectors: what has a second derivative, and what is refused."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from prepared import prepare_experiment
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
