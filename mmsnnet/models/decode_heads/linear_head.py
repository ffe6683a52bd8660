"""``LinearHead``: a linear classifier of patches, as in DINOv2's evaluation (arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

from mmsnnet.registry import MODELS


@MODELS.register_module()
class LinearHead(BaseDecodeHead):
    """Batch norm, dropout and a 1x1 convolution: a map (B, C, h, w) to logits (B, classes, h, w).

    Args:
        in_channels: C of the map that ``in_index`` names; with ``input_transform='resize_concat'``, one number for
            each map, and the maps are concatenated.
        norm_cfg: config of the batch norm.
        kwargs: as of mmseg's ``BaseDecodeHead``, without ``channels``, which follow from ``in_channels``.
    """

    def __init__(
        self, in_channels: int | Sequence[int], norm_cfg: Mapping[str, Any] = {"type": "BN"}, **kwargs: Any
    ) -> None:
        channels = in_channels if isinstance(in_channels, int) else sum(in_channels)
        super().__init__(in_channels, channels, norm_cfg=norm_cfg, **kwargs)
        self.norm = build_norm_layer(norm_cfg, channels)[1]

    def forward(self, inputs: Sequence[Tensor | None]) -> Tensor:
        return self.cls_seg(self.norm(self._transform_inputs(inputs)))
