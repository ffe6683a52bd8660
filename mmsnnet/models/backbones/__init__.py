from mmsnnet.models.backbones.stitched_vit import StitchedViT, find_stitched_backbone

__all__ = ["StitchedViT", "find_stitched_backbone"]
