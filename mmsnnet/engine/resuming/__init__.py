"""Compare a checkpoint with the run that resumes from it.

State is compared with state, so that it does not matter how a config is written: weights by name and shape, classes,
optimizer, schedules. Facts and settings that leave no state are recorded in the checkpoint. Each difference has one
verdict: the run is refused, or it goes on with the checkpoint's value, or with the config's.
"""

from mmsnnet.engine.resuming.difference import Difference, Verdict, noted
from mmsnnet.engine.resuming.optimizers import compare_optimizers, lay_out_states, named_wrappers
from mmsnnet.engine.resuming.records import (
    EPOCH_BEGAN,
    RECORD,
    check_progress,
    compare_classes,
    compare_records,
    compare_seed,
    describe_run,
)
from mmsnnet.engine.resuming.schedules import compare_progress, compare_schedules, drop_functions
from mmsnnet.engine.resuming.settings import compare_settings
from mmsnnet.engine.resuming.weights import compare_averages, compare_weights, summarize_partial_load

__all__ = [
    "EPOCH_BEGAN",
    "RECORD",
    "Difference",
    "Verdict",
    "check_progress",
    "compare_averages",
    "compare_classes",
    "compare_optimizers",
    "compare_progress",
    "compare_records",
    "compare_schedules",
    "compare_seed",
    "compare_settings",
    "compare_weights",
    "describe_run",
    "drop_functions",
    "lay_out_states",
    "named_wrappers",
    "noted",
    "summarize_partial_load",
]
