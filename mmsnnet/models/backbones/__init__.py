from mmsnnet.models.backbones.stitched_backbone import StitchedBackbone, Taps, find_stitched_backbone

__all__ = ["StitchedBackbone", "Taps", "find_stitched_backbone"]
