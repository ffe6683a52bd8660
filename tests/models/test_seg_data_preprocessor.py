"""Preprocessing of images of any number of channels."""

from typing import Any

import pytest
import torch
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmsnnet.errors import SettingError


def build(**config: Any) -> Any:
    return MODELS.build(dict(type="mmsnnet.SegDataPreProcessor", size=(8, 8), **config))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_each_channel_is_normalised_by_its_own_values(channels: int) -> None:
    mean, std = [10.0 * (c + 1) for c in range(channels)], [2.0 + c for c in range(channels)]
    images = torch.arange(channels * 12, dtype=torch.uint8).reshape(channels, 3, 4)
    out = build(mean=mean, std=std)(dict(inputs=[images], data_samples=[SegDataSample()]), training=True)["inputs"]
    for channel in range(channels):
        expected = (images[channel].double() - mean[channel]) / std[channel]
        torch.testing.assert_close(out[0, channel, :3, :4].double(), expected, rtol=1e-6, atol=1e-6)
        assert not out[0, channel, 3:].any() and not out[0, channel, :, 4:].any()


def test_one_value_serves_all_channels() -> None:
    images = torch.full((5, 8, 8), 7, dtype=torch.uint8)
    data = dict(inputs=[images], data_samples=[SegDataSample()])
    assert build(mean=[5.0], std=[2.0])(data, training=True)["inputs"].unique().tolist() == [1.0]


def test_three_channels_are_as_in_mmseg() -> None:
    config = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True)
    stock = MODELS.build(dict(type="mmseg.SegDataPreProcessor", size=(8, 8), **config))
    images = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    found = (
        one(dict(inputs=[images.clone()], data_samples=[SegDataSample()]), training=True)["inputs"]
        for one in (build(**config), stock)
    )
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(mean=[1.0] * 4, std=[1.0] * 3), "mean has 4 values and std 3"),
        (dict(mean=[], std=[]), "mean has 0 values"),
        (dict(mean=[1.0] * 4, std=[1.0] * 4, bgr_to_rgb=True), "three channels, but mean has 4"),
    ],
)
def test_settings_that_do_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build(**config)
