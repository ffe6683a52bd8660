from mmsnnet.engine.runner.stitch_loops import CannotResumeError, StitchTestLoop, StitchValLoop

__all__ = ["CannotResumeError", "StitchTestLoop", "StitchValLoop"]
