from mmsnnet.models.wrappers.stitched_data_parallel import StitchedDataParallel

__all__ = ["StitchedDataParallel"]
