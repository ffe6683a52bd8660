"""``SimpleFeaturePyramid``: levels for detection heads from the single map of a plain ViT."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mmsnnet.registry import MODELS

# Layer norm over the channels of a map, for the norm_cfg of heads: the toolboxes have none.
MODELS.register_module(name="LayerNorm2d", module=LayerNorm2d)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): every level comes from the last map.

    The backbone's last map (B, in_channels, h, w) gives ``num_outs`` maps (B, out_channels, h * scale, w * scale), from
    the finest to the coarsest; uneven sizes are rounded up. One deconvolution makes the level of twice the map's size,
    two with layer norm and GELU between them that of four times, max pooling that of half the size. A 1x1 and a 3x3
    convolution follow, each with layer norm over the channels. Coarser levels subsample the last one, as in FPN.

    Args:
        in_channels: channels of the last map.
        out_channels: channels of each level.
        scales: sizes of the levels relative to the map, among 4, 2, 1 and 0.5; with patches of 16 these are the strides
            4, 8, 16 and 32.
        num_outs: number of levels: those of ``scales`` and coarser ones, each half as large as the one before.
        init_cfg: as of any mmengine module.

    Raises:
        ValueError: a scale is none of the four, or ``num_outs`` is too small.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int = 5,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if num_outs < len(scales):
            raise ValueError(f"num_outs must be at least {len(scales)}, the number of scales; got {num_outs}")
        self.num_outs = num_outs
        self.levels = nn.ModuleList(_level(in_channels, out_channels, scale) for scale in scales)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``num_outs`` levels from the last map (B, in_channels, h, w); the other maps are ignored."""
        levels = [level(maps[-1]) for level in self.levels]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)


def _level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    layers, channels = _resize(in_channels, scale)
    return nn.Sequential(
        *layers,
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def _resize(channels: int, scale: float) -> tuple[list[nn.Module], int]:
    """Layers that resize a map to ``scale`` times its size, and the number of their output channels."""
    if scale == 0.5:
        return [nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)], channels
    if scale not in (1, 2, 4):
        raise ValueError(f"each of SimpleFeaturePyramid's scales must be 4, 2, 1 or 0.5; got {scale}")
    layers: list[nn.Module] = []
    while scale > 1:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels, scale = channels // 2, scale / 2
    return layers, channels
