"""mmseg's preprocessor for images of any number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models import SegDataPreProcessor as _SegDataPreProcessor

from mmsnnet.errors import SettingError
from mmsnnet.registry import MODELS


@MODELS.register_module()
class SegDataPreProcessor(_SegDataPreProcessor):
    """mmseg's ``SegDataPreProcessor`` with a mean and a deviation for each of any number of channels.

    Args:
        mean, std: one value for each channel of the images as they are loaded, or one for all.
        kwargs: as of mmseg's; ``bgr_to_rgb`` and ``rgb_to_bgr`` are for three channels.

    Raises:
        SettingError: ``mean`` and ``std`` have different numbers of values, or channels are to be swapped that are not
            three.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs: Any) -> None:
        super().__init__(mean=None, std=None, **kwargs)
        if len(mean) != len(std) or not len(mean):
            raise SettingError(
                f"data_preprocessor.mean has {len(mean)} values and std {len(std)}: give one for each channel, or one"
            )
        if self._channel_conversion and len(mean) not in (1, 3):
            raise SettingError(
                f"data_preprocessor: bgr_to_rgb and rgb_to_bgr swap the channels of images of three, and mean has "
                f"{len(mean)} values: leave them out"
            )
        self._enable_normalize = True
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), False)
