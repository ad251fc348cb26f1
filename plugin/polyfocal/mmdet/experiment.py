"""From a config file and the tools' options to a config that is ready to run."""

import copy
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mmcv.transforms import LoadImageFromFile, RandomFlip
from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.transforms import LoadImageFromNDArray, PackDetInputs
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmdet.evaluation import DumpDetResults, DumpODVGResults, DumpProposals
from mmdet.models.detectors import GLIP, GroundingDINO
from mmdet.models.detectors.glip import clean_label_name
from mmdet.models.roi_heads import MultiInstanceRoIHead
from mmdet.visualization.palette import get_palette
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmengine.runner import Runner

from polyfocal.calibration.thresholds import Thresholds
from polyfocal.coco import CocoSplit, hold_out, load_split
from polyfocal.data.annotations import forget_annotations, read_annotations
from polyfocal.data.evaluation import USUAL_LIMIT, detection_limit, remark_on_more
from polyfocal.data.files import DatasetError
from polyfocal.data.pictures import Loader
from polyfocal.demo import DEMO_FOLDER, write_digit_scenes
from polyfocal.errors import UserError
from polyfocal.experiments.request import Request
from polyfocal.mmdet.datasets import CocoDataset, picture_loader
from polyfocal.mmdet.frozen import freeze_backbone, is_frozen, use_features, uses_features
from polyfocal.mmdet.metrics import (
    CocoMetric,
    check_ground_truth,
    check_names,
    number_from_one,
)
from polyfocal.mmdet.pictures import draw_predictions
from polyfocal.mmdet.thresholds import DrawAboveThresholdsHook
from polyfocal.mmdet.tiny import MAX_SIDE, use_small_profile, use_tiny_profile
from polyfocal.mmengine import experiment as mmengine_experiment
from polyfocal.mmengine.class_weights import use_class_weights
from polyfocal.mmengine.configs import (
    SCOPE_KEY,
    annotation_file,
    class_of,
    evaluators,
    is_a,
    leaf_datasets,
    merge_options,
    set_evaluators,
    type_name,
    walk,
    without_weights,
)

# They write what a model predicts, and compare it with nothing.
_DUMPS = (DumpDetResults, DumpODVGResults, DumpProposals)


class Experiment(mmengine_experiment.Experiment):
    """A detector's config that is ready to run."""

    @property
    def quality(self) -> list[str]:
        kinds = reversed(_metrics(self.config))  # masks before boxes
        return [f"{kind}_{number}" for kind in kinds for number in ("mAP", "mAP_50", "mAP_75")]

    def hold_out(self, folder: Path) -> None:
        cfg = self.config
        source, *others = leaf_datasets(cfg.train_dataloader.dataset)
        if others:
            raise UserError(
                f"{cfg.filename} trains on several data sets side by side, of which no part can be "
                "held out: give one of them with --data DIR."
            )
        root = source.get("data_root") or ""
        whole = annotation_file(source)
        kept, out = hold_out(whole, folder)
        prefix = {key: os.path.join(root, value) for key, value in source.data_prefix.items()}
        evaluated = [*leaf_datasets(cfg.val_dataloader), *leaf_datasets(cfg.test_dataloader)]
        files = [(source, kept), *((dataset, out) for dataset in evaluated)]
        # A hook may fit something on val, which the search must not see.
        for dataset in leaf_datasets(cfg.get("custom_hooks")):
            files.append((dataset, kept if annotation_file(dataset) == whole else out))
        for dataset, file in files:
            dataset.update(
                data_root="", ann_file=str(file.resolve()), data_prefix=ConfigDict(prefix)
            )
        for node in (*evaluators(cfg, "val"), *evaluators(cfg, "test")):
            if "ann_file" in node:
                node.ann_file = str(out.resolve())
        if is_frozen(cfg):  # they are pictures of the training split, seen again and again
            use_features(cfg, "val")

    def draw(self, runner: Runner) -> Path | None:
        return None if uses_features(self.config, "val") else draw_predictions(runner)

    def check_metrics(self, metrics: list[BaseMetric], dataset: Any) -> None:
        check_ground_truth(metrics, dataset)
        check_names(self.config, metrics, dataset.metainfo.get("classes") or ())
        for metric in metrics:
            if isinstance(metric, MMDetCocoMetric) and metric._coco_api is not None:
                number_from_one(metric._coco_api)

    def keep_results(self, metrics: list[BaseMetric], prefix: Path) -> None:
        for metric in metrics:
            if isinstance(metric, MMDetCocoMetric) and metric.outfile_prefix is None:
                metric.outfile_prefix = str(prefix)

    def keep_detections(self, out: str) -> list[BaseMetric]:
        """Have a test write its detections; returns metrics to evaluate beside the config's.

        Args:
            out: ``NAME.json`` for COCO results, ``NAME.pkl`` for MMDetection's analysis tools.

        Raises:
            UserError: ``out`` ends in something else.
        """
        if out.endswith((".pkl", ".pickle")):
            return [DumpDetResults(out_file_path=out)]
        if not out.endswith(".json"):
            raise UserError(f"--out takes a name that ends in .json or .pkl, got {out}.")
        cfg = self.config
        writers = self._metrics("test", MMDetCocoMetric)
        if not writers:
            raise UserError(
                f"--out {out}: no metric in the test_evaluator of {cfg.filename} writes COCO "
                "results; NAME.pkl works with all."
            )
        writers[0].outfile_prefix = out.removesuffix(".json")
        return []

    def _metrics(self, split: str, kind: type) -> list[ConfigDict]:
        """The metrics of a split that are of a class or of one derived from it."""
        scope = self.config.get("default_scope")
        every = evaluators(self.config, split)
        return [node for node in every if is_a(node, METRICS, scope, kind)]

    def draw_all(self, folder: str) -> None:
        hooks = self.config.default_hooks
        hooks.setdefault("visualization", ConfigDict(type="mmdet.DetVisualizationHook"))
        hooks.visualization.update(draw=True, test_out_dir=folder)

    def use_thresholds(self, file: str) -> None:
        """Have a test measure and draw at score thresholds per class.

        Raises:
            UserError: The file holds none, or no metric of the config takes them.
        """
        Thresholds.load(file)
        cfg = self.config
        ours = self._metrics("test", CocoMetric)
        if not ours:
            raise UserError(
                f"--thresholds {file}: no metric in the test_evaluator of {cfg.filename} is "
                "polyfocal's CocoMetric, which measures at thresholds."
            )
        for node in ours:
            node.thresholds = file
        drawing = cfg.default_hooks.setdefault("visualization", ConfigDict())
        drawing.update(type=f"polyfocal.{DrawAboveThresholdsHook.__name__}", thresholds=file)

    def log_to(self, names: Sequence[str]) -> None:
        super().log_to(names)
        for node in self._metrics("val", CocoMetric):
            node.classwise = True

    def use_tta(self) -> None:
        """Put the model behind MMDetection's test-time augmentation.

        Raises:
            UserError: The model predicts masks, which that augmentation does not merge.
        """
        cfg = self.config
        if any("segm" in node.get("metric", ()) for node in evaluators(cfg, "test")):
            raise UserError("--tta merges boxes, and this model predicts masks: test it without.")
        wrapper = cfg.get("tta_model") or ConfigDict(
            type="DetTTAModel",
            tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
        )
        for dataset in leaf_datasets(cfg.test_dataloader.dataset):
            own = copy.deepcopy(cfg.get("tta_pipeline"))
            dataset.pipeline = own or _flipped(dataset.pipeline)
        test_cfg = cfg.model.get("test_cfg") or {}
        for node in (test_cfg, test_cfg.get("rcnn") or {}):
            _raise_max_detections(wrapper.get("tta_cfg"), node.get("max_per_img", 0))
        cfg.model = ConfigDict(**wrapper, module=cfg.model)


def _flipped(pipeline: list[ConfigDict]) -> list[ConfigDict]:
    """A test pipeline that yields each picture as it is and mirrored."""
    *steps, pack = copy.deepcopy(pipeline)
    usual = inspect.signature(PackDetInputs).parameters["meta_keys"].default
    pack.meta_keys = (*pack.get("meta_keys", usual), "flip", "flip_direction")
    flips = [dict(type="mmdet.RandomFlip", prob=probability) for probability in (0.0, 1.0)]
    return [*steps, ConfigDict(type="TestTimeAug", transforms=[flips, [pack]])]


def prepare_experiment(request: Request, cfg: Config) -> Experiment:
    """Adapt an MMDetection 3.x config, in place, to what is asked for.

    Args:
        request: Its data are a COCO-format folder, see :func:`polyfocal.coco.load_split`; the
            built-in ones are digit scenes.
        cfg: Config of the request.

    Raises:
        UserError: The config, an override or the data set is not usable.
    """
    experiment = Experiment(cfg)
    data = write_digit_scenes(DEMO_FOLDER) if request.demo else request.data
    splits = {}
    if data is not None:
        splits = {
            name: load_split(data, name, _loader(cfg, name))
            for name in (("train", "val") if request.train else ("val",))
        }
    if request.demo or request.profile:
        side = min(MAX_SIDE, _usual_side(splits["val"])) if splits else MAX_SIDE
        (use_small_profile if request.profile == "small" else use_tiny_profile)(cfg, side)
        experiment.notes += without_weights(cfg)
    _use_own_metric(cfg)
    if splits:
        _use_data(experiment, **splits)
    if request.demo:
        # A mirrored digit is another sign or none.
        for step in walk(cfg.train_dataloader.dataset):
            if is_a(step, TRANSFORMS, cfg.get("default_scope"), RandomFlip):
                step.prob = 0.0
    if request.freeze:
        experiment.notes += freeze_backbone(cfg)
    merge_options(cfg, request.options)
    _check_annotations(cfg, ("train", "val") if request.train else ("test",))
    experiment.notes += use_class_weights(cfg, train=request.train)
    if request.train:
        experiment.notes += _read_run_lengths(cfg, keep=bool(splits))
    return experiment


def _read_run_lengths(cfg: Config, *, keep: bool) -> list[str]:
    """Have masks that are run lengths loaded; where polygons are asked for, they would be left out.

    MMDetection ignores such an object, and trains on a picture as if the object were not there.
    """
    notes = []
    for dataset in leaf_datasets(cfg.train_dataloader.dataset):
        # A hook may have the pipeline of the last epochs.
        every = [*walk(dataset.get("pipeline")), *walk(cfg.get("custom_hooks"))]
        steps = [
            step for step in every if step.get("with_mask") and not step.get("poly2mask", True)
        ]
        if not steps:
            continue
        file = annotation_file(dataset)
        try:
            objects = read_annotations(file).objects
        except DatasetError:  # another format than COCO's
            continue
        found = sum(isinstance(one.get("segmentation"), dict) for one in objects)
        if not keep:  # nobody else reads the config's own file here, which may be all of COCO
            del objects
            forget_annotations(file)
        if found:
            for step in steps:
                step.poly2mask = True
            notes.append(
                f"the masks of {found} objects of {file} are run lengths, which poly2mask=False of "
                "the config would leave out, and the objects with them: poly2mask becomes True."
            )
    return notes


def _use_data(experiment: Experiment, val: CocoSplit, train: CocoSplit | None = None) -> None:
    cfg = experiment.config
    metrics = _metrics(cfg)
    for name, split in (("train", train), ("val", val)):
        if split is None or split.has_masks:
            continue
        loads = any(step.get("with_mask") for step in walk(cfg[f"{name}_dataloader"].dataset))
        if loads or "segm" in metrics:
            raise UserError(
                f"{cfg.filename} needs masks: {split.mask_problem} Take a config without masks for "
                f"it, such as configs/retinanet_poly1.py."
            )
    if train is not None:
        train.check_same_classes(val)
        experiment.notes += train.shared_with(val)
    notes: dict[str, None] = {}
    for loader, split in (("train", train), ("val", val), ("test", val)):
        if split is not None:
            dataloader = cfg[f"{loader}_dataloader"]
            dataloader.dataset = one_data_set(dataloader.dataset, notes)
            (dataset,) = leaf_datasets(dataloader.dataset)
            notes.update(dict.fromkeys(split.notes))
            _point_to(dataset, split, cfg, notes)
            _use_local_files(dataloader)
    if is_a(cfg.model.get("roi_head"), MODELS, cfg.get("default_scope"), MultiInstanceRoIHead):
        raise UserError(
            f"{cfg.filename} has a MultiInstanceRoIHead (CrowdDet), which knows no classes and is "
            "evaluated on CrowdHuman alone: take another config for a COCO-format folder."
        )
    if is_a(cfg.model, MODELS, cfg.get("default_scope"), (GLIP, GroundingDINO)):
        _check_phrases(val)
    _set_num_classes(cfg.model, len(val.classes))
    for hook in cfg.get("custom_hooks") or []:
        for dataset in leaf_datasets(hook):
            notes[
                f"the data set of {type_name(hook)} stays that of the config, "
                f"{annotation_file(dataset)}."
            ] = None
    limit = detection_limit(val.annotations)
    queries = _queries(cfg.model)
    if queries is not None:
        limit = min(limit, queries)
        most = max(split.max_instances for split in (train, val) if split is not None)
        if most > queries:
            notes[
                f"a picture holds up to {most} objects, and the model finds {queries} at most, one "
                "for each query: the others are neither trained on nor found. More num_queries (or "
                "num_proposals) in the config would take them."
            ] = None
    if limit > USUAL_LIMIT:
        _raise_max_detections(cfg.model.get("test_cfg"), limit)
        notes[remark_on_more(val.annotations, limit)] = None
    for name in ("val", "test"):
        _evaluate_on(cfg, name, val, metrics, limit, notes)
    experiment.notes += notes


def one_data_set(dataset: ConfigDict, notes: dict[str, None]) -> ConfigDict:
    """A tree of data sets in which several side by side are replaced by the first of them."""
    for node in walk(dataset):
        if isinstance(node.get("dataset"), dict):
            node.dataset = one_data_set(node.dataset, notes)
    side_by_side = dataset.get("datasets")
    if not isinstance(side_by_side, list | tuple):
        return dataset
    notes[
        f"{len(side_by_side)} data sets stand side by side in the config: the data take the place "
        "of the first, and the others are left out."
    ] = None
    return one_data_set(side_by_side[0], notes)


def _point_to(dataset: ConfigDict, split: CocoSplit, cfg: Config, notes: dict[str, None]) -> None:
    """Make a data set read a split; its other settings stay."""
    kind = class_of(dataset, DATASETS, cfg.get("default_scope"))
    # MMDetection's classes other than CocoDataset itself read other files, or mean other data.
    if kind is None or not issubclass(kind, MMDetCocoDataset) or _is_of_mmdet(kind):
        _become(dataset, CocoDataset, kind, notes)
    step = next((s for s in walk(dataset.get("pipeline")) if s.get("with_seg")), None)
    if step is not None:
        raise UserError(
            f"{cfg.filename} trains on semantic maps (with_seg of {type_name(step)}), which a "
            "COCO-format folder does not hold: take another config."
        )
    classes = tuple(split.classes)
    stated = (dataset.get("metainfo") or {}).get("classes")
    if stated is not None and tuple(stated) != classes:
        notes[
            f"the config's classes ({', '.join(map(str, stated))}) give way to those of "
            f"{split.annotation_file}."
        ] = None
    metainfo: dict[str, Any] = {"classes": classes}
    if stated is None or tuple(stated) != classes or "palette" not in dataset.metainfo:
        # COCO's colours are easier to tell apart, but there are only 80.
        colors = get_palette("coco" if len(classes) <= 80 else "random", len(classes))
        metainfo["palette"] = [tuple(map(int, color)) for color in colors[: len(classes)]]
    dataset.update(
        data_root="",
        ann_file=str(split.annotation_file.resolve()),
        data_prefix=dict(img=f"{split.image_dir.resolve()}/"),
        metainfo=metainfo,
    )


def _become(node: ConfigDict, kind: type, was: type | None, notes: dict[str, None]) -> None:
    """Give a dictionary a class of this package, without settings that only the old class has."""
    gone = [key for key in node if key not in _keywords(kind)]
    old = type_name(node)
    for key in gone:
        node.pop(key)
    node.type = f"polyfocal.{kind.__name__}"
    if was is None or not issubclass(kind, was):
        without = f", without its {', '.join(gone)}" if gone else ""
        notes[f"the data are in COCO's format: {old} becomes {kind.__name__}{without}."] = None


def _is_of_mmdet(kind: type) -> bool:
    return kind.__module__.startswith("mmdet.")


def _keywords(kind: type) -> set[str]:
    """The keys of a class's dictionary, with the settings that it hands on to its parents."""
    names = {"type", SCOPE_KEY}
    for base in kind.__mro__:
        parameters = inspect.signature(base).parameters.values()
        names.update(one.name for one in parameters if one.kind is not one.VAR_KEYWORD)
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return names


def _use_local_files(node: ConfigDict) -> None:
    """Remove how a config reaches files on a server: the files of ``--data`` are on a disk."""
    for one in walk(node):
        if one.get("backend_args") is not None:
            one.backend_args = None


def _evaluate_on(
    cfg: Config, name: str, val: CocoSplit, kinds: list[str], limit: int, notes: dict[str, None]
) -> None:
    """Make the metrics of a config compare with the val split; their other settings stay."""
    kept, has_coco, scope = [], False, cfg.get("default_scope")
    for node in evaluators(cfg, name):
        kind = class_of(node, METRICS, scope)
        own = kind is None or not _is_of_mmdet(kind)
        if kind is MMDetCocoMetric or (kind and own and issubclass(kind, MMDetCocoMetric)):
            has_coco = True
        elif not own and kind not in _DUMPS:  # it reads another format than COCO's
            if has_coco:
                notes[f"{type_name(node)} of the config is left out: the data are COCO's."] = None
                continue
            _become(node, CocoMetric, kind, notes)
            node.metric, has_coco = kinds, True
        elif "ann_file" not in node:
            kept.append(node)
            continue
        node.ann_file = str(val.annotation_file.resolve())
        if node.get("backend_args") is not None:
            node.backend_args = None
        kept.append(node)
    if not has_coco:
        kept.insert(0, ConfigDict(type="polyfocal.CocoMetric", metric=kinds))
        kept[0].ann_file = str(val.annotation_file.resolve())
    for node in kept:
        if limit > USUAL_LIMIT and is_a(node, METRICS, scope, CocoMetric):
            node.max_dets = max(limit, node.get("max_dets", limit))
    set_evaluators(cfg, name, kept)


def _use_own_metric(cfg: Config) -> None:
    """Replace MMDetection's metric by that of this package, if it knows all the settings."""
    for node in (*evaluators(cfg, "val"), *evaluators(cfg, "test")):
        kind = class_of(node, METRICS, cfg.get("default_scope"))
        # Theirs also measures proposals, of which average precision says nothing.
        asked = node.get("metric", "bbox")
        kinds = {asked} if isinstance(asked, str) else set(asked)
        known = kinds <= {"bbox", "segm"} and set(node) <= _keywords(CocoMetric)
        if kind is MMDetCocoMetric and known:
            node.type = f"polyfocal.{CocoMetric.__name__}"


def _metrics(cfg: Config) -> list[str]:
    """The kinds of evaluation that the config asks for."""
    kinds: list[str] = []
    for evaluator in evaluators(cfg, "val"):
        metric = evaluator.get("metric", [])
        kinds += [metric] if isinstance(metric, str) else metric
    return [kind for kind in ("bbox", "segm") if kind in kinds] or ["bbox"]


def _set_num_classes(model: ConfigDict, count: int) -> None:
    """Set every ``num_classes`` of a model, but not those of a proposal network: it has one."""
    proposals = [id(node) for node in walk(model.get("rpn_head"))]
    for node in walk(model):
        if "num_classes" in node and id(node) not in proposals:
            node.num_classes = count
        if "num_things_classes" in node:  # MaskFormer and Mask2Former
            before = node.num_things_classes + node.get("num_stuff_classes", 0)
            node.update(num_things_classes=count, num_stuff_classes=0)
            given = (node.get("loss_cls") or {}).get("class_weight")
            if isinstance(given, list | tuple) and len(given) == before + 1 != count + 1:
                *weights, background = given
                if len(set(weights)) > 1:
                    raise UserError(
                        f"class_weight of loss_cls has different weights for {before} classes, and "
                        f"the data have {count}: write one for each, and one for no object."
                    )
                node.loss_cls.class_weight = [weights[0]] * count + [background]


def _check_phrases(split: CocoSplit) -> None:
    """Refuse classes that a model which reads their names cannot tell apart."""
    phrases: dict[str, str] = {}
    for name in split.classes:
        phrase = clean_label_name(name).strip().lower()
        if phrase in phrases:
            raise UserError(
                f"the classes {phrases[phrase]!r} and {name!r} of {split.annotation_file} are both "
                f"{phrase!r} to the model, which reads their names without brackets and in small "
                "letters: give them names that differ in words."
            )
        phrases[phrase] = name


def _queries(model: ConfigDict) -> int | None:
    """Most objects that a model of queries finds in a picture; None for other models."""
    counts = [node.get(key) for node in walk(model) for key in ("num_queries", "num_proposals")]
    return min((count for count in counts if isinstance(count, int)), default=None)


def _raise_max_detections(test_cfg: ConfigDict | None, limit: int) -> None:
    test_cfg = test_cfg or {}
    for node in (test_cfg, test_cfg.get("rcnn") or {}, test_cfg.get("rpn") or {}):
        for key in ("max_per_img", "max_per_image", "topk"):  # Mask2Former's, CenterNet's
            if 0 <= node.get(key, -1) < limit:  # below 0: no limit
                node[key] = limit


def _loader(cfg: Config, split: str) -> Loader | None:
    """What the config loads the pictures of a split with; None if it has no such step."""
    for step in walk(cfg[f"{split}_dataloader"].dataset):
        kind = class_of(step, TRANSFORMS, cfg.get("default_scope"))
        if kind is not None and issubclass(kind, LoadImageFromFile):
            # Some subclasses load something else.
            return None if issubclass(kind, LoadImageFromNDArray) else picture_loader(step)
    return None


def _usual_side(split: CocoSplit) -> int:
    """Median of the longer sides of a split's pictures, in pixels."""
    return round(median(max(size) for size in split.annotations.sizes.values()))


def _check_annotations(cfg: Config, splits: tuple[str, ...]) -> None:
    for split in splits:
        for dataset in leaf_datasets(cfg[f"{split}_dataloader"].dataset):
            file = annotation_file(dataset)
            if "://" not in file and not os.path.isfile(file):
                raise UserError(
                    f"there is no data set: {cfg.filename} wants {file}; give a COCO-format folder "
                    "with --data DIR, or use the built-in pictures with --demo."
                )
