from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models.decode_heads import DPTHead
from mmseg.models.utils import resize
from mmseg.utils import SampleList
from torch import Tensor, nn

from mmsnnet.models.backbones import Taps
from mmsnnet.registry import MODELS


@MODELS.register_module()
class DPTDepthHead(DPTHead):
    """DPT (arXiv 2103.13413) for depth: mmseg's ``DPTHead`` with one bounded output.

    Four taps, from the shallowest to the deepest, each a map (B, C, h, w) with its class token (B, C), give a depth map
    (B, 1, 8h, 8w), which has half the image's side at patch size 16. For the loss and for predictions it is resized to
    the ground truth and to the image. Depth is ``min_depth + (max_depth - min_depth) * sigmoid(x)``, in the unit of the
    ground truth, usually metres. The sigmoid keeps each prediction in the range, so its logarithm is finite. With a
    ReLU, the half of the pixels that starts below zero would get no gradient.

    Ground truth outside (``min_depth``, ``max_depth``) counts as not measured: losses get 0 there.

    Args:
        in_channels: the width of the taps, which is that of the largest anchor.
        channels: channels of the fusion blocks.
        post_process_channels: channels of the four reassembled maps.
        readout_type: use of the class token: ``'project'`` joins it to each patch and projects back, ``'add'`` adds it,
            ``'ignore'`` omits it.
        min_depth, max_depth: the range, with 0 < ``min_depth`` < ``max_depth``.
        loss_decode: one loss or several of positive prediction and target (B, 1, H, W); by default the scale-invariant
            log loss with a warm-up of 100 iterations.
        kwargs: as of mmseg's ``DPTHead``.

    Raises:
        ValueError: the range is empty, or starts at or below zero.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 256,
        post_process_channels: Sequence[int] = (96, 192, 384, 768),
        readout_type: str = "project",
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        loss_decode: dict | Sequence[dict] | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 < min_depth < max_depth:
            raise ValueError(f"DPTDepthHead: 0 < min_depth < max_depth must hold, got {min_depth} and {max_depth}")
        taps = len(post_process_channels)
        super().__init__(
            embed_dims=in_channels,
            post_process_channels=list(post_process_channels),
            readout_type=readout_type,
            in_channels=[in_channels] * taps,
            in_index=list(range(taps)),
            input_transform="multiple_select",
            channels=channels,
            num_classes=1,
            threshold=0.0,  # for binary segmentation, so unused; mmseg warns of one channel without it
            dropout_ratio=0.0,  # depth is a regression: dropout would shift the mean of the last layer's input
            loss_decode=loss_decode or dict(type="mmsnnet.SILogLoss", warm_up_iters=100),
            **kwargs,
        )
        self.min_depth = min_depth
        self.max_depth = max_depth

    def forward(self, inputs: Taps) -> Tensor:
        """Depth map (B, 1, 8h, 8w) from four taps, always in float32.

        Raises:
            ValueError: there are no class tokens, and the readout is not ``'ignore'``.
        """
        tokens = inputs.class_tokens
        if tokens is None:
            if self.reassemble_blocks.readout_type != "ignore":
                raise ValueError(
                    f"DPTDepthHead: readout_type={self.reassemble_blocks.readout_type!r} needs class tokens, but the "
                    "anchors have none: set decode_head.readout_type='ignore', or take other anchors"
                )
            tokens = (None,) * len(inputs)
        depth = super().forward(list(zip(inputs, tokens, strict=True)))
        return self.min_depth + (self.max_depth - self.min_depth) * depth.float().sigmoid()

    def loss_by_feat(self, depth: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """The losses by name, from depth (B, 1, h, w) and the samples' ``gt_depth_map``."""
        target = torch.stack([sample.gt_depth_map.data for sample in batch_data_samples])
        target = torch.where((target > self.min_depth) & (target < self.max_depth), target, 0.0)
        depth = resize(depth, size=target.shape[2:], mode="bilinear", align_corners=self.align_corners)
        losses: dict[str, Tensor] = {}
        for loss in self.loss_decode if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]:
            name = str(loss.loss_name)
            losses[name] = losses.get(name, 0.0) + loss(depth, target)
        return losses
