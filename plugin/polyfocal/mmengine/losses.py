"""The losses as MMEngine knows them."""

from mmengine.logging import MessageHub
from mmengine.registry import MODELS as MMENGINE_MODELS

from polyfocal import losses
from polyfocal.errors import UserError
from polyfocal.registry import MODELS


class CyclicalFocalLoss(losses.CyclicalFocalLoss):
    """:class:`polyfocal.losses.CyclicalFocalLoss` that follows MMEngine's Runner by itself.

    The progress is ``iter / (max_iters - 1)`` of the current MessageHub, where the Runner
    publishes both for epoch-based and iteration-based training, after a resume too. Nothing is
    stored in the module, so that copies of it (EMA) and replicas (DistributedDataParallel) agree.
    :meth:`set_progress` takes precedence.
    """

    def progress(self) -> float:
        """The part of the training that is done.

        Raises:
            UserError: no Runner has published it and nobody has set it.
        """
        if self._progress is not None:
            return self._progress
        hub = MessageHub.get_current_instance()
        iteration, max_iters = hub.get_info("iter"), hub.get_info("max_iters")
        if iteration is None or max_iters is None:
            raise UserError(
                "CyclicalFocalLoss finds no training progress in MMEngine's MessageHub: train with"
                " MMEngine's Runner, or call set_progress(iteration / max(1, max_iterations - 1))"
                " on the loss before each step"
            )
        return iteration / max(1, max_iters - 1)


# In the root registry too: with custom_imports=dict(imports=['polyfocal.mmdet']) the bare name is
# found from every OpenMMLab scope. A framework's own class of that name, such as mmdet's
# FocalLoss, comes first there; polyfocal.FocalLoss always means ours.
for _loss in (
    losses.FocalLoss,
    losses.Poly1FocalLoss,
    losses.Poly1CrossEntropyLoss,
    losses.PolyNLoss,
    losses.GaussianPoly1FocalLoss,
    CyclicalFocalLoss,
):
    MODELS.register_module(module=_loss)
    MMENGINE_MODELS.register_module(module=_loss)
