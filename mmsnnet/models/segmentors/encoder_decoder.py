"""mmseg's segmentors for images whose sides are no multiple of the patch size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmseg.models import BaseSegmentor, segmentors
from mmseg.utils import stack_batch
from torch import Tensor

from mmsnnet.registry import MODELS


class _WholePatches(BaseSegmentor):
    """Pad images to whole patches before the backbone, and crop the heads' outputs.

    A backbone pads images itself, and its maps then cover the padded image. mmseg's heads resize their logits to the
    size of the image, which squeezes predictions: with patches of 16, the backbone makes an image of 500 pixels 512
    wide. Here the whole segmentor sees the padded image: images (B, C, H, W) become (B, C, H', W'), where H' and W' are
    the backbone's ``padded_size``, and logits (B, K, H', W') become (B, K, H, W). This holds for every head, whole
    images, windows of slide inference and images smaller than a window. Images of whole patches run as in mmseg.

    In training, label maps are padded with the decode head's ``ignore_index``, which losses leave out. A backbone
    without ``padded_size`` gets images unchanged.
    """

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        height, width = inputs.shape[-2:]
        padded = self._padded_size(inputs)
        # An exported program for images of any size pads all of them, some by 0 pixels.
        if isinstance(height, int) and padded == (height, width):
            return super().encode_decode(inputs, batch_img_metas)
        inputs = F.pad(inputs, (0, padded[1] - width, 0, padded[0] - height))
        # The mode of inference decides to which of these heads resize.
        metas = [{**meta, "img_shape": padded, "pad_shape": padded} for meta in batch_img_metas]
        return super().encode_decode(inputs, metas)[..., :height, :width]

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        padded = self._padded_size(inputs)
        if padded != inputs.shape[-2:]:
            inputs, data_samples = stack_batch(
                list(inputs), data_samples, size=padded, seg_pad_val=self._label_of_padding()
            )
        return super().loss(inputs, data_samples)

    def _label_of_padding(self) -> int:
        return self.decode_head.ignore_index

    def _padded_size(self, inputs: Tensor) -> torch.Size:
        size = (inputs.shape[-2], inputs.shape[-1])
        return torch.Size(self.backbone.padded_size(size) if hasattr(self.backbone, "padded_size") else size)


@MODELS.register_module()
class EncoderDecoder(_WholePatches, segmentors.EncoderDecoder):
    """mmseg's ``EncoderDecoder``, for images of any size; see :class:`_WholePatches`."""


@MODELS.register_module()
class CascadeEncoderDecoder(_WholePatches, segmentors.CascadeEncoderDecoder):
    """mmseg's ``CascadeEncoderDecoder``, for images of any size; see :class:`_WholePatches`."""

    def _label_of_padding(self) -> int:
        return self.decode_head[-1].ignore_index


@MODELS.register_module()
class DepthEstimator(_WholePatches, segmentors.DepthEstimator):
    """mmseg's ``DepthEstimator``, for images of any size; see :class:`_WholePatches`."""

    def _label_of_padding(self) -> int:
        return 0  # marks pixels without a measurement
