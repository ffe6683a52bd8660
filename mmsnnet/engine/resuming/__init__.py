"""Compare a checkpoint with the run that resumes from it.

State is compared with state, so that it does not matter how a config is written: weights by name and shape, classes,
optimizer, schedules. Facts and settings that leave no state are recorded in the checkpoint. Each difference has one
verdict: the run is refused, or it goes on with the checkpoint's value, or with the config's.
"""
