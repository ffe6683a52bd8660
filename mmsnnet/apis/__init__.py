from mmsnnet.apis.config import load_config
from mmsnnet.apis.model import build_model

__all__ = ["build_model", "load_config"]
