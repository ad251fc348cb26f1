"""Experiments of Detectron2's yaml configs."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
)
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from torch import nn

from polyfocal import efficientnet
from polyfocal.data.evaluation import USUAL_LIMIT
from polyfocal.detectron2.config import (
    LOSS_PARTS,
    add_polyfocal_config,
    check_losses_are_read,
)
from polyfocal.detectron2.data import CocoEvaluator
from polyfocal.detectron2.experiment import (
    KEYPOINTS,
    PIXELS,
    TINY_BATCH,
    Data,
    Evaluations,
    Experiment,
    PlacedLoss,
    Recipe,
    Settings,
    available,
    default_output_dir,
    periods,
)
from polyfocal.detectron2.small import rate_factor
from polyfocal.errors import UserError
from polyfocal.losses import LOSSES, ClassificationLoss

_FEWER = 8  # of proposals and samples
# Those of Detectron2, in which the small profile has another backbone.
_PYRAMIDS = ("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")


class YamlExperiment(Experiment):
    """See :class:`polyfocal.detectron2.experiment.Experiment`.

    Raises:
        UserError: The file cannot be read as a config of Detectron2.
    """

    STEPS = "SOLVER.MAX_ITER"
    BATCH = "SOLVER.IMS_PER_BATCH"
    OUTPUT = "OUTPUT_DIR"
    RATE = "SOLVER.BASE_LR"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cfg = get_cfg()
        add_polyfocal_config(self.cfg)
        self._profile = ""
        try:
            # As Detectron2 reads it: its own RetinaNet's yaml holds Python code.
            self.cfg.merge_from_file(str(path))
        except Exception as error:  # of yaml, of yacs' assertions, of missing bases
            raise UserError(
                f"{path} cannot be read as a config: {' '.join(str(error).split())}."
            ) from error

    @property
    def has_masks(self) -> bool:
        return self.cfg.MODEL.MASK_ON

    @property
    def needs_more(self) -> str:
        model = self.cfg.MODEL
        if model.META_ARCHITECTURE not in META_ARCH_REGISTRY:
            return ""  # which stops the training by itself
        architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
        if issubclass(architecture, (SemanticSegmentor, PanopticFPN)):
            return PIXELS
        return KEYPOINTS if model.KEYPOINT_ON and issubclass(architecture, GeneralizedRCNN) else ""

    def use_tiny_profile(self, side: int) -> None:
        self._shrink(side, "tiny")
        model = self.cfg.MODEL
        model.PIXEL_STD = [57.375, 57.12, 58.395]
        model.BACKBONE.FREEZE_AT = 0
        model.RESNETS.DEPTH = 18
        model.RESNETS.RES2_OUT_CHANNELS = 64
        model.RESNETS.NORM = "BN"

    def use_small_profile(self, side: int) -> None:
        efficientnet.weights_file()
        self._shrink(side, "small")
        model = self.cfg.MODEL
        model.BACKBONE.NAME = model.BACKBONE.NAME.replace("_resnet_", "_lite0_").replace(
            "build_", "build_polyfocal_"
        )
        model.PIXEL_MEAN, model.PIXEL_STD = (
            [efficientnet.PIXEL_MEAN] * 3,
            [efficientnet.PIXEL_STD] * 3,
        )
        self.cfg.INPUT.FORMAT = "RGB"

    def _shrink(self, side: int, profile: str) -> None:
        """Everything but the backbone: the same sizes as in the profiles of a LazyConfig."""
        self._profile = profile
        cfg, model = self.cfg, self.cfg.MODEL
        fits = model.BACKBONE.NAME.endswith("resnet_fpn_backbone")
        if not fits or (profile == "small" and model.BACKBONE.NAME not in _PYRAMIDS):
            name = {"tiny": "a ResNet-18", "small": "EfficientNet-Lite0"}[profile]
            raise UserError(
                f"the {profile} profile makes the backbone {name} with FPN; MODEL.BACKBONE.NAME of"
                f" {self.path} is {model.BACKBONE.NAME}."
            )
        model.WEIGHTS = ""
        model.FPN.OUT_CHANNELS //= 4
        model.FPN.NORM = model.RETINANET.NORM = model.ROI_MASK_HEAD.NORM = "GN"
        model.RETINANET.NUM_CONVS = model.ROI_MASK_HEAD.NUM_CONV = 2
        model.ROI_MASK_HEAD.CONV_DIM //= 4
        model.ROI_BOX_HEAD.FC_DIM //= 4
        model.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = model.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 1
        model.ROI_HEADS.BATCH_SIZE_PER_IMAGE //= _FEWER
        for key in (
            "BATCH_SIZE_PER_IMAGE",
            "PRE_NMS_TOPK_TRAIN",
            "PRE_NMS_TOPK_TEST",
            "POST_NMS_TOPK_TRAIN",
            "POST_NMS_TOPK_TEST",
        ):
            model.RPN[key] //= _FEWER
        cfg.INPUT.MIN_SIZE_TRAIN = (side,)
        cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = side
        cfg.DATALOADER.NUM_WORKERS = 1
        cfg.SOLVER.IMS_PER_BATCH = TINY_BATCH
        cfg.SOLVER.BASE_LR = 1e-3
        cfg.SOLVER.WEIGHT_DECAY = 0.05
        cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
        cfg.SOLVER.WARMUP_FACTOR = 0.05
        cfg.SEED = 0

    def use_data(self, data: Data) -> None:
        cfg = self.cfg
        if data.train:
            cfg.DATASETS.TRAIN = (data.train,)
        # Reads polygons and run-length encodings alike.
        cfg.INPUT.MASK_FORMAT = "bitmask"
        cfg.DATASETS.TEST = (data.val,)
        cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = data.num_classes
        if data.max_dets > USUAL_LIMIT:
            cfg.TEST.DETECTIONS_PER_IMAGE = max(cfg.TEST.DETECTIONS_PER_IMAGE, data.max_dets)
            cfg.MODEL.RPN.POST_NMS_TOPK_TEST = max(cfg.MODEL.RPN.POST_NMS_TOPK_TEST, data.max_dets)

    def no_flip(self) -> None:
        self.cfg.INPUT.RANDOM_FLIP = "none"

    def finish(self, options: Sequence[str], data: Data | None = None, *, tiny: bool) -> None:
        super().finish(options, data, tiny=tiny)
        check_losses_are_read(self.cfg)
        for key in ("PRECISE_BN", "AUG"):
            if self.cfg.TEST[key].ENABLED:
                raise UserError(
                    f"{self.path} has TEST.{key}.ENABLED True, which this tool does not do: write"
                    " False, or train with Detectron2's DefaultTrainer."
                )
        before = self.recipe()
        try:
            self.cfg = DefaultTrainer.auto_scale_workers(self.cfg, comm.get_world_size())
        except AssertionError as error:
            raise UserError(
                f"{self.path} has SOLVER.IMS_PER_BATCH {before.batch}: expected a multiple of"
                f" SOLVER.REFERENCE_WORLD_SIZE, {self.cfg.SOLVER.REFERENCE_WORLD_SIZE}."
            ) from error
        recipe = self.recipe()
        if recipe != before:
            self.notes.append(
                f"scaled to {comm.get_world_size()} processes, as SOLVER.REFERENCE_WORLD_SIZE asks:"
                f" {recipe.steps} steps of {recipe.batch} pictures, learning rate {recipe.rate:g}."
            )

    def override(self, options: Sequence[str]) -> set[str]:
        if len(options) % 2:
            raise UserError(
                f"overrides of a yaml config are KEY value pairs, got {' '.join(options)}."
            )
        for key, value in zip(options[::2], options[1::2], strict=True):
            try:
                self.cfg.merge_from_list([key, value])
            except Exception as error:  # of yacs: assertions, types
                raise UserError(
                    f"{key} {value} does not fit {self.path}: {' '.join(str(error).split())}."
                ) from error
        return set(options[::2])

    def recipe(self) -> Recipe:
        solver = self.cfg.SOLVER
        return Recipe(solver.MAX_ITER, solver.IMS_PER_BATCH, solver.BASE_LR)

    def use_steps(self, steps: int, planned: int, given: set[str]) -> None:
        solver, scale = self.cfg.SOLVER, steps / planned
        evaluation, checkpoint = periods(steps)
        # Of two milestones that fall together one is left, and none is at the very end.
        milestones = dict.fromkeys(round(step * scale) for step in solver.STEPS)
        follow = {
            self.STEPS: steps,
            "SOLVER.STEPS": tuple(step for step in milestones if 0 < step < steps),
            "SOLVER.WARMUP_ITERS": steps // 20
            if self._profile
            else round(solver.WARMUP_ITERS * scale),
            "TEST.EVAL_PERIOD": evaluation,
            "SOLVER.CHECKPOINT_PERIOD": checkpoint,
        }
        for key, value in follow.items():
            if key not in given:
                self.cfg.merge_from_list([key, value])

    def losses(self) -> Iterator[PlacedLoss]:
        heads = {"RETINANET": "dense", "ROI_BOX_HEAD": "box", "ROI_MASK_HEAD": "mask head"}
        for part in LOSS_PARTS:
            settings = self.cfg.MODEL[part].CLS_LOSS
            kind = LOSSES.get(str(settings.get("type")).removeprefix("polyfocal."))
            if kind is not None:
                head = heads.get(part, "proposal head")
                yield PlacedLoss(f"MODEL.{part}.CLS_LOSS", settings, kind, head)

    def datasets(self) -> tuple[list[str], list[str]]:
        return list(self.cfg.DATASETS.TRAIN), list(self.cfg.DATASETS.TEST)

    def settings(self) -> Settings:
        cfg = self.cfg
        return Settings(
            output_dir=default_output_dir(cfg.OUTPUT_DIR, self.path),
            weights=cfg.MODEL.WEIGHTS,
            max_iter=cfg.SOLVER.MAX_ITER,
            eval_period=cfg.TEST.EVAL_PERIOD,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            max_to_keep=2 if self._profile else 100,
            log_period=20,
            amp=cfg.SOLVER.AMP.ENABLED,
            device=available(cfg.MODEL.DEVICE),
            seed=cfg.SEED,
            ddp={"broadcast_buffers": False},
            cudnn_benchmark=cfg.CUDNN_BENCHMARK,
            float32_precision=cfg.FLOAT32_PRECISION,
        )

    def dump(self) -> str:
        return self.cfg.dump()

    def build_model(self) -> nn.Module:
        # build_model puts the model on this device, and the run on its own.
        cfg = self.cfg.clone()
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
        asked = [part for part in LOSS_PARTS if cfg.MODEL[part].CLS_LOSS]
        built = sum(isinstance(module, ClassificationLoss) for module in model.modules())
        if built < len(asked):
            keys = ", ".join(f"MODEL.{part}.CLS_LOSS" for part in asked)
            raise UserError(
                f"{self.path} has {keys}, but a {type(model).__name__} with {built} losses of"
                " polyfocal was built: one of its classes does not read its CLS_LOSS."
            )
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if not self._profile:
            return build_optimizer(self.cfg, model)
        # Detectron2 knows no other optimizer than SGD in yaml.
        solver = self.cfg.SOLVER
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            lr_factor_func=rate_factor if self._profile == "small" else None,
        )
        return torch.optim.AdamW(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(self.cfg, optimizer)

    def build_train_loader(self) -> Iterable[Any]:
        return build_detection_train_loader(self.cfg)

    def build_evaluations(self) -> Evaluations:
        return {
            name: (build_detection_test_loader(self.cfg, name), self._evaluators(name))
            for name in self.cfg.DATASETS.TEST
        }

    def _evaluators(self, name: str) -> list[DatasetEvaluator]:
        kind, most = MetadataCatalog.get(name).evaluator_type, self.cfg.TEST.DETECTIONS_PER_IMAGE
        if kind == "lvis":
            return [LVISEvaluator(name, max_dets_per_image=most)]
        if kind != "coco":
            raise UserError(
                f"the data set {name!r} is evaluated as {kind}, which this tool does not do: train"
                " with Detectron2's own tools/train_net.py, where the losses work too."
            )
        evaluators: list[DatasetEvaluator] = [CocoEvaluator(name, max(most, USUAL_LIMIT))]
        if self.cfg.MODEL.KEYPOINT_ON:
            sigmas = self.cfg.TEST.KEYPOINT_OKS_SIGMAS
            evaluators.append(COCOEvaluator(name, ("keypoints",), kpt_oks_sigmas=sigmas))
        return evaluators
