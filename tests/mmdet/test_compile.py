"""torch.compile of a detector's head: what it finds in our losses, beside MMDetection's own."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
import torch._dynamo as dynamo
from mmdet_models import batch, tiny_model
from mmengine.registry import DefaultScope

import polyfocal.mmdet
from polyfocal._torch import SEES_ATTRIBUTES

OURS = str(Path(polyfocal.__file__).parent)
STOCK = dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25)
POLY1 = dict(type="polyfocal.Poly1FocalLoss", use_sigmoid=True, epsilon=1.0)


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


@pytest.fixture
def compiler():
    if not SEES_ATTRIBUTES:
        pytest.skip("torch.compile of this torch takes the settings of a loss for constants")
    dynamo.reset()
    yield dynamo.utils.counters
    dynamo.reset()


def head_and_inputs(loss):
    """FCOS's head, and what its loss is computed from."""
    model = tiny_model("fcos", loss).train()
    inputs, samples = batch(model)
    outs = [[x.detach().requires_grad_() for x in level] for level in model(inputs, samples)]
    truth = [sample.gt_instances for sample in samples]
    return model.bbox_head, (*outs, truth, [sample.metainfo for sample in samples])


def test_a_compiled_head_breaks_nowhere_in_the_loss(compiler):
    """The graph is broken where MMDetection picks the positives, with any loss alike."""
    breaks = []
    for loss in (STOCK, POLY1):
        head, inputs = head_and_inputs(loss)
        found = dynamo.explain(head.loss_by_feat)(*inputs)
        files = [f.filename for why in found.break_reasons for f in why.user_stack]
        assert files and not [file for file in files if file.startswith(OURS)]
        breaks.append(found.graph_break_count)
        dynamo.reset()
    assert breaks == breaks[:1] * 2


def test_new_values_of_settings_do_not_compile_anew(compiler):
    head, inputs = head_and_inputs(POLY1)
    compiled = torch.compile(head.loss_by_feat, backend="eager")
    graphs = []
    for step in range(5):
        head.loss_cls.gamma, head.loss_cls.epsilon = 2.0 + 0.1 * step, 1.0 + 0.3 * step
        got = compiled(*inputs)["loss_cls"]
        torch.testing.assert_close(got, head.loss_by_feat(*inputs)["loss_cls"])
        graphs.append(compiler["stats"]["unique_graphs"])
    # The second value makes a number of a constant; after that there is nothing new.
    assert graphs[0] > 0 and graphs[2:] == graphs[2:3] * 3
