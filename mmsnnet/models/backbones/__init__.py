from mmsnnet.models.backbones.find_backbone import find_stitched_backbone
from mmsnnet.models.backbones.stitched_backbone import StitchedBackbone
from mmsnnet.models.backbones.taps import Taps

__all__ = ["StitchedBackbone", "Taps", "find_stitched_backbone"]
