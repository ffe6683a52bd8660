"""timm's LAMB (arXiv 1904.00962) for configs: ``optimizer=dict(type="mmsnnet.Lamb", ...)``."""

from timm.optim import Lamb

from mmsnnet.registry import OPTIMIZERS

OPTIMIZERS.register_module(module=Lamb)

__all__ = ["Lamb"]
