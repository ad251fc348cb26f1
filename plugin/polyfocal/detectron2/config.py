"""The keys that the adapter's classes read from a yaml config."""

from detectron2.config import CfgNode


def add_polyfocal_config(cfg: CfgNode) -> None:
    """Add the keys of :mod:`polyfocal.detectron2` to a config, as Detectron2's projects do.

    ``CLS_LOSS`` in ``MODEL.RETINANET``, ``MODEL.ROI_BOX_HEAD``, ``MODEL.ROI_MASK_HEAD`` and
    ``MODEL.RPN``: a dictionary with the ``type`` of a loss and its keywords, as in an MMDetection
    config; and ``MODEL.ROI_BOX_HEAD.PRIOR_PROB``, see
    :class:`polyfocal.detectron2.FastRCNNOutputLayers`.

    Example:
        >>> cfg = get_cfg()
        >>> add_polyfocal_config(cfg)
        >>> cfg.merge_from_file("configs/detectron2/retinanet_poly1.yaml")
    """
    for part in ("RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RPN"):
        cfg.MODEL[part].CLS_LOSS = CfgNode(new_allowed=True)
    cfg.MODEL.ROI_BOX_HEAD.PRIOR_PROB = 0.01
