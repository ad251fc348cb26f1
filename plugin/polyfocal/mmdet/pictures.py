"""Pictures of predictions beside the ground truth."""

from pathlib import Path

import mmcv
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from polyfocal.data.files import free_name
from polyfocal.mmengine.objects import unwrapped

_NUM_PICTURES = 12
_SCORE_THRESHOLD = 0.3  # of the drawn detections
_DRAWN_SIDE = 480  # pixels


@torch.no_grad()
def draw_predictions(runner: Runner) -> Path:
    """Pictures of the val split: the ground truth on the left, the predictions on the right."""
    dataset = runner.val_dataloader.dataset
    folder = Path(runner.work_dir) / "predictions"
    folder.mkdir(exist_ok=True)
    runner.visualizer.dataset_meta = dataset.metainfo
    model = unwrapped(runner.model)
    model.eval()
    taken: set[str] = set()  # pictures in two folders may have one name
    for index in range(0, len(dataset), -(-len(dataset) // _NUM_PICTURES)):
        (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        path = dataset.get_data_info(index)["img_path"]  # a pipeline need not pack it
        image = mmcv.imread(path, channel_order="rgb")
        # The names of the classes need room.
        factor = max(1, _DRAWN_SIDE // max(image.shape[:2]))
        for instances in (sample.gt_instances, sample.pred_instances):
            if "bboxes" in instances:  # a pipeline may leave the ground truth out
                _enlarge(instances, factor)
        runner.visualizer.add_datasample(
            name=str(index),
            image=mmcv.imrescale(image, factor),
            data_sample=sample,
            pred_score_thr=_SCORE_THRESHOLD,
            out_file=str(folder / f"{free_name(Path(path).stem, taken)}.png"),
        )
    return folder


def _enlarge(instances: InstanceData, factor: int) -> None:
    instances.bboxes = instances.bboxes * factor
    if "masks" in instances:
        masks = instances.masks
        if not isinstance(masks, torch.Tensor):
            masks = masks.to_tensor(torch.bool, instances.bboxes.device)
        instances.masks = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
