"""mmseg's preprocessor for images with any number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models import SegDataPreProcessor as _SegDataPreProcessor

from mmsnnet.errors import SettingError
from mmsnnet.registry import MODELS


@MODELS.register_module()
class SegDataPreProcessor(_SegDataPreProcessor):
    """mmseg's ``SegDataPreProcessor`` for any number of channels, each with its mean and deviation.

    Args:
        mean, std: one value for each channel of the loaded images, or one for all.
        kwargs: as of mmseg's; ``bgr_to_rgb`` and ``rgb_to_bgr`` need three channels.

    Raises:
        SettingError: ``mean`` and ``std`` have different numbers of values, or channels are to be swapped although
            there are not three.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs: Any) -> None:
        super().__init__(mean=[0.0], std=[1.0], **kwargs)  # mmseg takes 1 or 3 values; the buffers follow below
        if len(mean) != len(std) or not len(mean):
            raise SettingError(
                f"data_preprocessor.mean has {len(mean)} values and std {len(std)}: give one for each channel, or one"
            )
        if (kwargs.get("bgr_to_rgb") or kwargs.get("rgb_to_bgr")) and len(mean) not in (1, 3):
            raise SettingError(
                f"data_preprocessor: bgr_to_rgb and rgb_to_bgr need images with three channels, but mean has "
                f"{len(mean)} values: leave them out"
            )
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
