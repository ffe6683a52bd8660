from timm.optim import Lamb

from mmsnnet.engine.optimizers.stitch_optim_wrapper_constructor import StitchOptimWrapperConstructor
from mmsnnet.registry import OPTIMIZERS

# timm's LAMB (arXiv 1904.00962) for configs: optimizer=dict(type="mmsnnet.Lamb", ...).
OPTIMIZERS.register_module(module=Lamb)

__all__ = ["Lamb", "StitchOptimWrapperConstructor"]
