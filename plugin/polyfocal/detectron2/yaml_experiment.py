"""Experiments of Detectron2's yaml configs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from polyfocal.detectron2.config import add_polyfocal_config
from polyfocal.detectron2.data import CocoEvaluator
from polyfocal.detectron2.experiment import (
    TINY_BATCH,
    TINY_EPOCHS,
    Data,
    Experiment,
    Settings,
    available,
    default_output_dir,
    iterations,
    passes_on_coco,
    periods,
)
from polyfocal.errors import UserError

_FEWER = 8  # of proposals and samples


class YamlExperiment(Experiment):
    """See :class:`polyfocal.detectron2.experiment.Experiment`.

    Raises:
        UserError: The file cannot be read as a config of Detectron2.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cfg = get_cfg()
        add_polyfocal_config(self.cfg)
        self._tiny = False
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

    def use_tiny_profile(self, side: int) -> None:
        self._tiny = True
        cfg, model = self.cfg, self.cfg.MODEL
        if not model.BACKBONE.NAME.endswith("resnet_fpn_backbone"):
            raise UserError(
                "the tiny profile makes the backbone a ResNet-18 with FPN; MODEL.BACKBONE.NAME of"
                f" {self.path} is {model.BACKBONE.NAME}."
            )
        # The same sizes as in the tiny profile of a LazyConfig.
        model.WEIGHTS = ""
        model.PIXEL_STD = [57.375, 57.12, 58.395]
        model.BACKBONE.FREEZE_AT = 0
        model.RESNETS.DEPTH = 18
        model.RESNETS.RES2_OUT_CHANNELS = 64
        model.RESNETS.NORM = "BN"
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

    def use_data(self, data: Data, *, tiny: bool) -> None:
        cfg, solver = self.cfg, self.cfg.SOLVER
        epochs = TINY_EPOCHS if tiny else passes_on_coco(solver.MAX_ITER, solver.IMS_PER_BATCH)
        if data.train:
            cfg.DATASETS.TRAIN = (data.train,)
            before = solver.MAX_ITER
            solver.MAX_ITER = iterations(data.num_train, solver.IMS_PER_BATCH, epochs)
            scale = solver.MAX_ITER / before
            solver.STEPS = tuple(round(step * scale) for step in solver.STEPS)
            solver.WARMUP_ITERS = (
                solver.MAX_ITER // 20 if tiny else round(solver.WARMUP_ITERS * scale)
            )
            cfg.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD = periods(solver.MAX_ITER)
            self.notes.append(
                f"{solver.MAX_ITER} steps are {epochs:.0f} passes over {data.num_train} pictures"
                " with objects; SOLVER.MAX_ITER N changes that."
            )
        # Reads polygons and run-length encodings alike.
        cfg.INPUT.MASK_FORMAT = "bitmask"
        cfg.DATASETS.TEST = (data.val,)
        cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = data.num_classes
        cfg.TEST.DETECTIONS_PER_IMAGE = max(cfg.TEST.DETECTIONS_PER_IMAGE, data.max_dets)
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = max(cfg.MODEL.RPN.POST_NMS_TOPK_TEST, data.max_dets)

    def no_flip(self) -> None:
        self.cfg.INPUT.RANDOM_FLIP = "none"

    def override(self, options: Sequence[str]) -> None:
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
            max_to_keep=2 if self._tiny else 100,
            log_period=20,
            amp=cfg.SOLVER.AMP.ENABLED,
            device=available(cfg.MODEL.DEVICE),
            seed=cfg.SEED,
            ddp={"broadcast_buffers": False},
        )

    def dump(self) -> str:
        return self.cfg.dump()

    def build_model(self) -> nn.Module:
        # build_model puts the model on this device, and the run on its own.
        cfg = self.cfg.clone()
        cfg.MODEL.DEVICE = "cpu"
        return build_model(cfg)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if not self._tiny:
            return build_optimizer(self.cfg, model)
        # Detectron2 knows no other optimizer than SGD in yaml.
        solver = self.cfg.SOLVER
        params = get_default_optimizer_params(model, weight_decay_norm=solver.WEIGHT_DECAY_NORM)
        return torch.optim.AdamW(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return build_lr_scheduler(self.cfg, optimizer)

    def build_train_loader(self) -> Iterable[Any]:
        return build_detection_train_loader(self.cfg)

    def build_test_loader(self) -> Iterable[Any]:
        return build_detection_test_loader(self.cfg, self.cfg.DATASETS.TEST[0])

    def build_evaluator(self) -> DatasetEvaluator:
        return CocoEvaluator(self.cfg.DATASETS.TEST[0], self.cfg.TEST.DETECTIONS_PER_IMAGE)
