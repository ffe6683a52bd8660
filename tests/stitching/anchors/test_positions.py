"""Stored positions: the grid in a state dict, and resampling when it is loaded."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from mmsnnet.stitching import Anchor
from mmsnnet.stitching.anchors.attention import resize_table
from mmsnnet.stitching.anchors.base import Component

MakeAnchor = Callable[..., Anchor]


def test_the_state_dict_tells_the_grid(make_anchor: MakeAnchor) -> None:
    """If positions are stored. An image that is half a patch larger has one more patch."""
    anchor = make_anchor(img_size=(40, 64))
    assert anchor.state_dict()["grid"].tolist() == [3, 4] and anchor.state_dict()["grid"].dtype == torch.int64
    assert "grid" not in make_anchor(model="vit_small_patch16_dinov3").state_dict()
    biased = make_anchor(img_size=(40, 64), rel_pos_bias=True)
    biased.keep([Component("block", 1)])
    assert biased.state_dict()["grid"].tolist() == [3, 4]
    for kept, cut in (([], biased), ([Component("block", 1)], anchor)):
        cut.keep(kept)
        assert "grid" not in cut.state_dict()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "0."])
def test_a_state_dict_of_another_grid_is_resampled(
    prefix: str, assign: bool, make_anchor: MakeAnchor, caplog: pytest.LogCaptureFixture
) -> None:
    """As in timm, even if the numbers of patches are equal. Tables of windows stay unchanged."""
    settings = dict(rel_pos_bias=True, window_size=4, global_blocks=[1])
    source = make_anchor(img_size=(96, 64), **settings)
    anchor = make_anchor(img_size=(64, 96), **settings)
    weights = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    before = {key: value.clone() for key, value in weights.items()}
    (nn.Sequential(anchor) if prefix else anchor).load_state_dict(weights, strict=True, assign=assign)
    assert weights.keys() == before.keys() and all(torch.equal(weights[key], before[key]) for key in before)
    position = source.model.pos_embed
    expected = resample_abs_pos_embed(position, [4, 6], [6, 4], num_prefix_tokens=0)
    torch.testing.assert_close(anchor.model.pos_embed.data, expected.data)
    name = "relative_position_bias_table"
    one, other = (getattr(a.model.blocks[1].attn, name) for a in (anchor, source))
    torch.testing.assert_close(one.data, resize_table(other, (6, 4), (4, 6)).data)
    assert torch.equal(*(getattr(a.model.blocks[0].attn, name) for a in (anchor, source)))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mmsnnet", "WARNING")
    assert "6 x 4 patches" in record.getMessage() and "4 x 6" in record.getMessage()
    assert anchor.state_dict()["grid"].tolist() == [4, 6]


def test_a_state_dict_of_the_same_grid_or_none_is_loaded_as_it_is(
    make_anchor: MakeAnchor, caplog: pytest.LogCaptureFixture
) -> None:
    source, anchor = (make_anchor(img_size=(96, 64), rel_pos_bias=True) for _ in range(2))
    weights = source.state_dict()
    anchor.load_state_dict(weights, strict=True)
    assert torch.equal(anchor.model.pos_embed, source.model.pos_embed)
    del weights["grid"]
    turned = make_anchor(img_size=(64, 96), rel_pos_bias=True)
    turned.load_state_dict(weights, strict=True)
    assert torch.equal(turned.model.pos_embed, source.model.pos_embed) and not caplog.records
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.pos_embed"):
        make_anchor(img_size=64).load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*: "grid"'):
        anchor.load_state_dict(weights | {"grid": torch.zeros(3)})
