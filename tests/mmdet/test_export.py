"""Exported detectors: ONNX Runtime finds what the checkpoint finds, and no loss is in the file."""

import collections
import functools
import json
import re
import sys

import numpy as np
import pytest

pytest.importorskip("mmdet.models", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install 'polyfocal[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'polyfocal[onnx]'")

import onnxruntime
import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet_models import tiny_model
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoOperation
from torch.nn import functional as F

from polyfocal.calibration.posthoc import Calibrator
from polyfocal.commands import export as tool
from polyfocal.errors import PackageError, UserError
from polyfocal.losses import LOSSES
from polyfocal.mmdet.tiny import use_tiny_profile
from polyfocal.mmengine.configs import read_config
from polyfocal.shipped import config_file

try:
    from polyfocal.mmdet import export
except PackageError as error:  # this torch is too old
    pytest.skip(str(error), allow_module_level=True)

CLASSES = ("cat", "dog", "cow")


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def ours(name, **settings):
    return dict(type=f"polyfocal.{name}", **settings)


def in_roi(name, **settings):
    return ours("RoILoss", loss=ours(name, **settings))


def poly1(epsilon=1.0, use_sigmoid=True):
    return ours("Poly1FocalLoss", epsilon=epsilon, use_sigmoid=use_sigmoid)


def with_opinions(model, spread):
    """A model in evaluation mode whose last layers say something else of every place."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if re.search("cls|reg|gfl", name) and "convs" not in name and "loss" not in name:
            if weight.dim() > 1:
                weight.data.normal_(0, spread if "cls" in name else 0.03)
                if "cls" in name:  # each class is as likely as another
                    weight.data -= weight.data.mean(1, keepdim=True)
            elif "cls" in name:
                weight.data.fill_(-2.0)
    return model.eval()


def pictures(count, height, width):
    """Random pictures with structures of some 30 pixels."""
    torch.manual_seed(2)
    noise = torch.rand(count, 3, height // 16, width // 16) * 255
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 255)


def run(file, images):
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except NoOperation as error:
        if "DeformConv" in str(error):  # 1.23, the last for Python 3.10, has none
            pytest.skip("this ONNX Runtime computes no deformable convolutions")
        raise
    return session.run(None, {"images": images.numpy()})


def predicted(model, images):
    """What MMDetection finds, by the way that its tools take."""
    size = tuple(images.shape[-2:])
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=dict(meta)) for _ in images]
    data = model.data_preprocessor(dict(inputs=list(images), data_samples=samples))
    with torch.no_grad():
        return [one.pred_instances for one in model(**data, mode="predict")]


def assert_same(found, expected, at_least=20):
    """The same detections, each within 0.01 pixels and 1e-5 of its score."""
    for boxes, scores, labels, instances in zip(*found, expected, strict=True):
        count = len(instances)
        assert count >= at_least
        assert (scores > 0).sum() == count
        assert (labels[count:] == -1).all() and not scores[count:].any()
        np.testing.assert_allclose(scores[:count], instances.scores.numpy(), rtol=0, atol=1e-5)
        # Detections of the same score, to rounding, may change places.
        for one in instances:
            near = np.abs(boxes - one.bboxes.numpy()).max(1) < 0.01
            same = (labels == one.labels.item()) & (np.abs(scores - one.scores.item()) < 1e-5)
            assert (near & same).any()


DETECTORS = {
    # loss, spread of the last layer, pictures
    "retina sigmoid": (poly1(), 0.05, (1, 480, 640)),
    "retina softmax": (poly1(use_sigmoid=False), 0.05, (2, 150, 171)),
    "fcos": (poly1(epsilon=-1.0), 0.3, (1, 160, 224)),
    "faster sigmoid": (ours("RoILoss", loss=poly1()), 0.3, (2, 128, 96)),
    "mask topk": (in_roi("NoisedTopKLoss", k=1, epsilon=0.1), 0.3, (1, 480, 640)),
    "cascade softmax": (ours("Poly1CrossEntropyLoss", epsilon=1.0), 0.5, (1, 160, 160)),
    "deformable": (poly1(), 0.3, (2, 96, 128)),
    "dino": (ours("Poly1IoUAwareBCELoss", epsilon=1.0, use_sigmoid=True), 0.3, (1, 96, 128)),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_same_boxes_and_scores_as_the_checkpoint(name, tmp_path):
    loss, spread, shape = DETECTORS[name]
    detector = name.split()[0]
    thin = dict(stacked_convs=1) if detector in ("retina", "fcos") else {}
    model = with_opinions(tiny_model(detector, loss, **thin), spread)
    if detector in ("deformable", "dino"):
        model.bbox_head.test_cfg.max_per_img = 50  # of 30 queries and 3 classes
    images = pictures(*shape)
    expected = predicted(model, images)
    file = tmp_path / "model.onnx"
    program = export.export_onnx(model, file, shape[1:], batch_size=shape[0])
    assert_same(run(file, images), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"], "weights are in the file"
    stray = [n for n in program.model.graph.initializers if "loss" in n or "mask_head" in n]
    assert not stray
    again = predicted(model, images)
    assert all(torch.equal(a.bboxes, b.bboxes) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("config", ["tood_quality", "rtmdet_s_quality"])
def test_heads_with_a_decoding_of_their_own(config, tmp_path):
    cfg = read_config(config_file(config))
    use_tiny_profile(cfg, 160)
    model = with_opinions(MODELS.build(cfg.model), 0.1)
    images = pictures(1, 160, 160)
    export.export_onnx(model, tmp_path / "model.onnx", (160, 160))
    assert_same(run(tmp_path / "model.onnx", images), predicted(model, images))


BIAS = dict(
    type="polyfocal.BiasHead", num_classes=3, sees="colour", background=False, num_anchors=1
)
COUNTS = [9.0, 3.0, 1.0, 90.0]
STOCK = {
    "sigmoid": ("RetinaHead", dict(type="FocalLoss", use_sigmoid=True)),
    "softmax": ("RetinaHead", dict(type="CrossEntropyLoss")),
    "quality": ("GFLHead", dict(type="QualityFocalLoss", use_sigmoid=True)),
    "heatmap": ("CenterNetUpdateHead", dict(type="GaussianFocalLoss")),
}
SETTINGS = {
    "FocalLoss": ("sigmoid", dict(class_weight=[1.0, 2.0, 3.0])),
    "Poly1FocalLoss": ("sigmoid", dict(epsilon=1.0, alpha=[0.1, 0.2, 0.3])),
    "Poly1CrossEntropyLoss": ("softmax", dict(epsilon=1.0)),
    "PolyNLoss": ("sigmoid", dict(epsilons=[1.0, 0.5])),
    "CyclicalFocalLoss": ("sigmoid", dict()),
    "DualFocalLoss": ("softmax", dict(gamma=2.0)),
    "SampleDependentFocalLoss": ("sigmoid", dict()),
    "AdaFocalLoss": ("softmax", dict()),
    "LDAMLoss": ("roi", dict(class_counts=COUNTS)),
    "NoisedTopKLoss": ("roi", dict(k=1, epsilon=0.1)),
    "ImbalancedNoisedTopKLoss": (
        "roi",
        dict(k=1, epsilon=0.1, class_counts=COUNTS, max_margin=0.5),
    ),
    "DebiasedFocalLoss": ("sigmoid", dict(bias=BIAS)),
    "ProductOfExpertsLoss": ("sigmoid", dict(bias=BIAS)),
    "ReweightedCrossEntropyLoss": ("sigmoid", dict(bias=BIAS)),
    "ConfidenceRegularizationLoss": (
        "sigmoid",
        dict(bias=BIAS, teacher=dict(BIAS, sees="features", in_channels=4)),
    ),
    "Poly1QualityFocalLoss": ("quality", dict(epsilon=1.0)),
    "Poly1VarifocalLoss": ("quality", dict(epsilon=1.0)),
    "Poly1IoUAwareBCELoss": ("quality", dict(epsilon=1.0)),
    "Poly1MatchabilityAwareLoss": ("quality", dict(epsilon=1.0)),
    "GaussianPoly1FocalLoss": ("heatmap", dict(epsilon=1.0)),
}


def of_one_level(head, loss):
    """A detector of a few convolutions, one level and three classes."""
    settings = dict(type=head, num_classes=3, in_channels=4, feat_channels=4, stacked_convs=0)
    if head == "CenterNetUpdateHead":
        settings.update(strides=[4], regress_ranges=((0, 99),), norm_cfg=None)
    else:
        anchors = dict(type="AnchorGenerator", ratios=[1.0], scales=[4], strides=[4])
        settings.update(anchor_generator=anchors)
    if head == "GFLHead":
        settings.update(norm_cfg=None)
    one = dict(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    nms = dict(type="nms", iou_threshold=0.5)
    model = dict(
        type="SingleStageDetector",
        data_preprocessor=dict(type="DetDataPreprocessor", mean=[9.0] * 3, std=[50.0] * 3),
        backbone=dict(type="ResNet", depth=18, base_channels=4, **one),
        bbox_head=dict(settings, loss_cls=loss),
        test_cfg=dict(nms_pre=100, score_thr=0.0, nms=nms, max_per_img=20),
    )
    return MODELS.build(ConfigDict(model)).eval()


def content(model):
    """The operations of the graph of a model, and the names of the weights that they use."""
    traced = export.Detector(model).traced(torch.zeros(1, 3, 32, 32))
    nodes = traced.graph.nodes
    held = {one.arg.name: one.target for one in traced.graph_signature.input_specs}
    used = {held[node.name] for node in nodes if node.op == "placeholder" and node.users}
    return collections.Counter(str(n.target) for n in nodes if n.op != "placeholder"), used


@pytest.fixture(scope="module")
def stock():
    """The same of detectors with MMDetection's own losses."""

    @functools.cache
    def held(kind):
        return content(tiny_model("faster") if kind == "roi" else of_one_level(*STOCK[kind]))

    return held


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_leaves_nothing_in_the_graph(name, stock):
    kind, settings = SETTINGS[name]
    if kind == "roi":
        operations, used = content(tiny_model("faster", in_roi(name, **settings)))
        assert used == stock(kind)[1]
        assert (operations - stock(kind)[0])["aten.mul.Tensor"] == 1, "the scores are stretched"
        return
    if kind in ("sigmoid", "quality"):
        settings = dict(settings, use_sigmoid=True)
    found = content(of_one_level(STOCK[kind][0], ours(name, **settings)))
    assert found == stock(kind)
    assert len(found[1]) > 20 and not [name for name in found[1] if name and "loss" in name]


def test_a_loss_with_weights_and_networks_leaves_nothing_in_the_file(tmp_path):
    loss = ours("DebiasedFocalLoss", use_sigmoid=True, bias=BIAS, class_weight=[1.0, 2.0, 3.0])
    model = of_one_level("RetinaHead", loss)
    assert [name for name, _ in model.named_parameters() if "loss_cls.bias" in name]
    program = export.export_onnx(model, tmp_path / "model.onnx", (32, 32))
    names = set(program.model.graph.initializers)
    assert "model.bbox_head.retina_cls.weight" in names
    assert not [name for name in names if "loss" in name]
    content = (tmp_path / "model.onnx").read_bytes()
    assert b"loss" not in content and b"site-packages" not in content


def test_every_loss_is_exported_here():
    assert set(SETTINGS) == set(LOSSES)


@pytest.fixture(scope="module")
def small():
    """A detector, its pictures and what it finds in them."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = of_one_level("RetinaHead", STOCK["sigmoid"][1])
        model = with_opinions(model, 1.0)
    images = pictures(2, 64, 96)
    return model, images, predicted(model, images)


CALIBRATORS = {
    "temperature": Calibrator(
        "temperature", "iou", {"temperature": [2.0]}, {"dog": {"temperature": [0.5]}}
    ),
    "platt": Calibrator(
        "platt",
        "iou",
        {"slope": [0.7], "offset": [-0.4]},
        {"cat": {"slope": [1.5], "offset": [0.2]}},
    ),
    "isotonic": Calibrator(
        "isotonic",
        "precision",
        {"x": [0.05, 0.2, 0.6, 0.9], "y": [0.0, 0.3, 0.3, 0.8]},
        {"dog": {"x": [0.3], "y": [0.5]}, "cow": {"x": [0.1, 0.9], "y": [0.2, 1.0]}},
    ),
}


@pytest.mark.parametrize("method", CALIBRATORS)
def test_a_calibrator_in_float32_is_the_calibrator(method):
    torch.manual_seed(0)
    labels = torch.randint(3, (2, 500))
    scores = torch.rand(2, 500)
    scores[0, :9] = torch.tensor([0.0, 1e-9, 0.05, 0.1, 0.2, 0.3, 0.6, 0.9, 1.0])
    found = export.CalibratedScores(CALIBRATORS[method], CLASSES)(scores, labels)
    names = [CLASSES[label] for label in labels.flatten()]
    expected = CALIBRATORS[method].apply(scores.flatten(), names)
    np.testing.assert_allclose(found.flatten(), expected, rtol=0, atol=2e-6)


def test_a_calibrator_in_the_file_is_one_applied_afterwards(small, tmp_path):
    model, images, expected = small
    file, calibrator = tmp_path / "model.onnx", CALIBRATORS["isotonic"]
    export.export_onnx(model, file, (64, 96), classes=CLASSES, batch_size=2, calibrator=calibrator)
    boxes, scores, labels = run(file, images)
    for i, instances in enumerate(expected):
        names = [CLASSES[label] for label in instances.labels]
        wanted = calibrator.apply(instances.scores, names)
        count = len(instances)
        assert count == 20 and len(set(names)) > 1
        assert np.abs(wanted - instances.scores.numpy()).max() > 0.05
        assert (np.diff(wanted) > 0.01).any(), "a detection overtakes another"
        assert (np.diff(scores[i]) <= 0).all()
        np.testing.assert_allclose(scores[i, :count], np.sort(wanted)[::-1], rtol=0, atol=2e-5)
        for one, score in zip(instances, wanted, strict=True):
            near = np.abs(boxes[i] - one.bboxes.numpy()).max(1) < 0.01
            assert (
                near & (labels[i] == one.labels.item()) & (np.abs(scores[i] - score) < 2e-5)
            ).any()


def test_a_calibrator_needs_the_names_of_the_classes(small, tmp_path):
    with pytest.raises(UserError, match="names the classes"):
        export.export_onnx(small[0], tmp_path / "m.onnx", (64, 96), calibrator=CALIBRATORS["platt"])


def test_without_suppression_every_candidate_comes_out(small, tmp_path):
    from mmcv.ops import batched_nms

    model, images, expected = small
    file = tmp_path / "model.onnx"
    export.export_onnx(model, file, (64, 96), classes=CLASSES, batch_size=2, nms=False)
    boxes, scores, labels = run(file, images)
    assert scores.shape == (2, 100) and (np.diff(scores) <= 0).all()
    for i, instances in enumerate(expected):
        rows = [torch.from_numpy(one[i]) for one in (boxes, scores, labels)]
        kept, places = batched_nms(*rows, dict(type="nms", iou_threshold=0.5))
        np.testing.assert_allclose(kept[:20, :4], instances.bboxes, rtol=0, atol=0.01)
        np.testing.assert_allclose(kept[:20, 4], instances.scores, rtol=0, atol=1e-5)
        assert (rows[2][places[:20]] == instances.labels).all()


@pytest.mark.parametrize(
    ("nms", "said"),
    [
        (dict(type="soft_nms", iou_threshold=0.5), "type 'soft_nms'"),
        (dict(type="nms", iou_threshold=0.5, max_num=7), "max_num=7"),
    ],
)
def test_a_suppression_that_onnx_has_not_is_refused(nms, said, tmp_path):
    model = of_one_level("RetinaHead", STOCK["sigmoid"][1])
    model.bbox_head.test_cfg.nms = ConfigDict(nms)
    with pytest.raises(UserError, match=said):
        export.export_onnx(model, tmp_path / "model.onnx", (32, 32))
    export.Detector(model, nms=False)


def test_two_stages_keep_their_suppression(tmp_path):
    with pytest.raises(UserError, match="between its two stages"):
        export.export_onnx(tiny_model("faster"), tmp_path / "m.onnx", (64, 64), nms=False)


def test_what_cannot_be_traced_is_refused_in_one_sentence(small, tmp_path):
    class Counting(type(small[0].bbox_head)):
        def predict(self, x, samples, rescale=False):
            return super().predict(x, samples, rescale)[: int((x[0] > 0).sum())]

    model = of_one_level("RetinaHead", STOCK["sigmoid"][1])
    model.bbox_head.__class__ = Counting
    file = tmp_path / "model.onnx"
    file.write_bytes(b"as it was")
    with pytest.raises(UserError, match="SingleStageDetector cannot be exported to ONNX for") as e:
        export.export_onnx(model, file, (32, 32))
    assert "\n" not in str(e.value)
    assert file.read_bytes() == b"as it was" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(package, small, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PackageError, match=rf"needs {package}, .* pip install 'polyfocal\[onnx\]'"):
        export.export_onnx(small[0], tmp_path / "model.onnx", (32, 32))


@pytest.fixture
def trained(tmp_path):
    """The config and the checkpoint that a training would leave."""
    cfg = read_config(config_file("retinanet_poly1"))
    use_tiny_profile(cfg, 96)
    cfg.model.bbox_head.update(num_classes=3, stacked_convs=1)
    cfg.dump(tmp_path / "config.py")
    model = with_opinions(MODELS.build(cfg.model), 0.05)
    checkpoint = dict(meta=dict(dataset_meta=dict(classes=CLASSES)), state_dict=model.state_dict())
    torch.save(checkpoint, tmp_path / "epoch_2.pth")
    return tmp_path, model


def test_the_tool_needs_a_config_and_a_checkpoint(trained, capsys):
    folder, model = trained
    arguments = [str(folder / "config.py"), str(folder / "epoch_2.pth")]
    assert tool.main(arguments) == 0
    out = capsys.readouterr().out
    assert out == f"{folder / 'epoch_2.onnx'}: images (1, 3, 96, 96) -> boxes, scores, labels\n"
    images = pictures(1, 96, 96)
    assert_same(run(folder / "epoch_2.onnx", images), predicted(model, images))
    session = onnxruntime.InferenceSession(str(folder / "epoch_2.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
    assert [one.name for one in session.get_outputs()] == list(export.OUTPUTS)


@pytest.mark.parametrize(
    "loss",
    [
        ours("FocalLoss", use_sigmoid=True, class_weight="balanced", alpha="sqrt"),
        ours("DebiasedFocalLoss", use_sigmoid=True,
             bias=ours("StoredScores", file="none.npz")),
        ours("DebiasedFocalLoss", use_sigmoid=True,
             bias=ours("ClassPriors", class_counts="none.json")),
        ours("LDAMLoss", class_counts="none.json", scale=1.0),
    ],
    ids=["balanced", "scores", "priors", "counts"],
)  # fmt: skip
def test_what_only_the_loss_needs_may_be_missing(loss, trained):
    """A checkpoint and the user's config, where the training data and other files are not."""
    folder, model = trained
    cfg = Config.fromfile(folder / "config.py")
    if loss["type"] == "polyfocal.LDAMLoss":  # one more column in the head
        cfg.model.bbox_head.loss_cls = dict(type="CrossEntropyLoss")
        model = with_opinions(MODELS.build(cfg.model), 0.05)
        torch.save(dict(state_dict=model.state_dict()), folder / "epoch_2.pth")
    cfg.model.bbox_head.loss_cls = loss
    cfg.dump(folder / "own.py")
    own = read_config(folder / "own.py")
    found, _ = export.load_detector(own, str(folder / "epoch_2.pth"))
    assert own.model.bbox_head.loss_cls == loss, "the config given stays"
    ((one,), (expected,)) = (predicted(each, pictures(1, 96, 96)) for each in (found, model))
    assert len(one) == len(expected) > 20
    torch.testing.assert_close(one.scores, expected.scores, rtol=0, atol=0)
    torch.testing.assert_close(one.bboxes, expected.bboxes, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "model.pt"], "--out takes a name that ends in .onnx, got model.pt"),
        (["--calibrator", "none.json"], "none.json"),
        (["--size", "0", "96"], "at least 1, got 1 of (0, 96)"),
        (["--cfg-options", "model.bbox_head.num_classes=7"], "checkpoint of another model"),
    ],
)
def test_the_tool_says_what_is_wrong(more, said, trained, capsys):
    folder, _ = trained
    assert tool.main([str(folder / "config.py"), str(folder / "epoch_2.pth"), *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not list(folder.glob("*.onnx"))


def test_only_detectors_of_pictures(trained, capsys):
    folder, _ = trained
    config = str(config_file("classification/focal"))
    assert tool.main([config, str(folder / "epoch_2.pth")]) == 2
    assert "takes configs of MMDetection" in capsys.readouterr().err


def test_the_usual_size_of_a_config():
    """As MMCV resizes a picture of landscape form to it; without a ratio that is any picture."""
    for settings, shape in (
        (dict(scale=(1333, 800), keep_ratio=True), (1600, 2666)),
        (dict(scale=(800, 1333), keep_ratio=True), (1600, 2666)),
        (dict(scale=(480, 640), keep_ratio=False), (100, 300)),
        (dict(scale=(480, 640)), (300, 100)),
        (dict(scale=640), (100, 300)),
    ):
        step = dict(type="Resize", **settings)
        cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[step]))))
        resized = TRANSFORMS.build(step)(dict(img=np.zeros((*shape, 3), np.uint8)))
        assert export.usual_size(cfg) == resized["img"].shape[:2]
