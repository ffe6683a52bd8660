import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.models.backbones import StitchedViT, find_stitched_backbone
from mmsnnet.models.cost import model_costs

__all__ = ["StitchedViT", "find_stitched_backbone", "model_costs"]
