from mmsnnet.engine.strategies.fsdp_strategy import FSDPStrategy

__all__ = ["FSDPStrategy"]
