from mmsnnet.models.wrappers.stitched_data_parallel import StitchedDataParallel
from mmsnnet.models.wrappers.stitched_fully_sharded_data_parallel import StitchedFullyShardedDataParallel

__all__ = ["StitchedDataParallel", "StitchedFullyShardedDataParallel"]
