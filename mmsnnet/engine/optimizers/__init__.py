from mmsnnet.engine.optimizers.stitch_optim_wrapper_constructor import StitchOptimWrapperConstructor

__all__ = ["StitchOptimWrapperConstructor"]
