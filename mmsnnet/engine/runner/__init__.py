from mmsnnet.engine.runner.measured_points import CannotResumeError
from mmsnnet.engine.runner.stitch_loops import StitchTestLoop, StitchValLoop
from mmsnnet.engine.runner.train_loops import StitchEpochBasedTrainLoop, StitchIterBasedTrainLoop

__all__ = [
    "CannotResumeError",
    "StitchEpochBasedTrainLoop",
    "StitchIterBasedTrainLoop",
    "StitchTestLoop",
    "StitchValLoop",
]
