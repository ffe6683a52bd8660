from mmsnnet.models.backbones import StitchedViT, find_stitched_backbone
from mmsnnet.models.cost import model_costs

__all__ = ["StitchedViT", "find_stitched_backbone", "model_costs"]
