from mmsnnet.engine.runner.stitch_loops import StitchTestLoop, StitchValLoop

__all__ = ["StitchTestLoop", "StitchValLoop"]
