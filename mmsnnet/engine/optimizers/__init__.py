from mmsnnet.engine.optimizers.lamb import Lamb
from mmsnnet.engine.optimizers.stitch_optim_wrapper_constructor import StitchOptimWrapperConstructor

__all__ = ["Lamb", "StitchOptimWrapperConstructor"]
