from mmsnnet.engine.runner.resume import CannotResumeError
from mmsnnet.engine.runner.stitch_loops import StitchTestLoop, StitchValLoop

__all__ = ["CannotResumeError", "StitchTestLoop", "StitchValLoop"]
