"""Training with weights that are sharded over the ranks (FSDP).

The rest of the package knows only the functions here, which take any model.
"""

from mmsnnet.engine.sharding.fsdp_strategy import FSDPStrategy
from mmsnnet.engine.sharding.sharded_model import (
    gathered,
    is_sharded,
    named_modules,
    named_parameters,
    parameter_shapes,
    refuse_stock_sharding,
    run_batches,
    state_shapes,
)
from mmsnnet.engine.sharding.stitched_fully_sharded_data_parallel import StitchedFullyShardedDataParallel

__all__ = [
    "FSDPStrategy",
    "StitchedFullyShardedDataParallel",
    "gathered",
    "is_sharded",
    "named_modules",
    "named_parameters",
    "parameter_shapes",
    "refuse_stock_sharding",
    "run_batches",
    "state_shapes",
]
