from mmsnnet.models.backbones.stitched_vit import StitchedViT, Taps, find_stitched_backbone

__all__ = ["StitchedViT", "Taps", "find_stitched_backbone"]
