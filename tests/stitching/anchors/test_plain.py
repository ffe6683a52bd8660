"""Adapters of plain ViTs: geometry, rotary positions, and models that they refuse."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from mmsnnet.stitching import Anchor, create_anchor
from mmsnnet.stitching.anchors.plain import VisionTransformerAnchor, adapter_of
from mmsnnet.stitching.features import Features

MakeAnchor = Callable[..., Anchor]


@torch.no_grad()
def test_the_position_embedding_is_resampled_to_the_input(
    make_anchor: MakeAnchor, make_images: Callable[..., Tensor]
) -> None:
    """By hand: patches of a padded image, positions resampled from 2 x 2 to 3 x 5, class token first."""
    anchor = make_anchor()
    images = make_images(1, 40, 71)
    model = anchor.model
    patches = model.patch_embed.proj(nn.functional.pad(images, (0, 80 - 71, 0, 48 - 40))).flatten(2).transpose(1, 2)
    grid = model.pos_embed.unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (3, 5), mode="bicubic", antialias=True)
    expected = torch.cat([model.cls_token, patches + grid.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(anchor.stem(images).data, expected)


@torch.no_grad()
def test_rotations_are_those_of_the_grid(make_anchor: MakeAnchor, make_images: Callable[..., Tensor]) -> None:
    """The same patches in the same order on another grid: only positions distinguish them."""
    anchor = make_anchor(model="vit_small_patch16_dinov3")
    tokens = anchor.stem(make_images(1, 32, 64)).data
    grids = ((2, 4), (4, 2), (2, 4))
    left = [list(anchor.run(Features(tokens, anchor.layout(), grid)))[-1][1].data for grid in grids]
    assert not torch.allclose(left[0], left[1], atol=1e-3)
    assert torch.equal(left[0], left[2])


def test_rotations_are_computed_once_for_a_grid(make_anchor: MakeAnchor) -> None:
    anchor = make_anchor(model="vit_small_patch16_dinov3", depth=3)
    calls = []
    embed = anchor.model.rope.get_embed
    anchor.model.rope.get_embed = lambda *args, **kwargs: calls.append(args) or embed(*args, **kwargs)
    features = {grid: Features(torch.randn(1, 11, 32), anchor.layout(), grid) for grid in ((2, 3), (3, 2))}
    with torch.inference_mode():
        list(anchor.run(features[2, 3]))
    anchor.train()
    [(_, left)] = anchor.run(features[2, 3], stop=1)  # what inference kept serves training
    left.data.sum().backward()
    assert len(calls) == 1
    list(anchor.run(features[3, 2]))
    assert len(calls) == 2


def test_learned_rotations_get_gradients(make_anchor: MakeAnchor, make_images: Callable[..., Tensor]) -> None:
    anchor = make_anchor(model="vit_base_patch16_rope_mixed_224")
    for _ in range(2):
        *_, (_, features) = anchor.run(anchor.stem(make_images()))
        features.data.square().sum().backward()
    assert anchor.model.rope.freqs.grad.abs().sum() > 0


def test_rotations_drawn_anew_are_refused(make_anchor: MakeAnchor) -> None:
    with pytest.raises(ValueError, match=r"rope_rescale_coords=1\.0"):
        make_anchor(model="vit_small_patch16_dinov3", rope_rescale_coords=2.0)
    make_anchor(
        model="vit_small_patch16_dinov3", rope_shift_coords=0.0, rope_jitter_coords=1.0, rope_rescale_coords=1.0
    )


@pytest.mark.parametrize("settings", [dict(rel_pos_bias=True), dict(window_size=2, global_blocks=())])
def test_windows_and_bias_need_one_attention(settings: dict[str, object], make_anchor: MakeAnchor) -> None:
    with pytest.raises(ValueError, match="one attention"):
        make_anchor(model="vit_base_patch16_18x2_224", **settings)


@pytest.mark.parametrize("settings", [dict(rel_pos_bias=True), dict(window_size=2)])
def test_windows_and_bias_need_timms_plain_attention(settings: dict[str, object], make_anchor: MakeAnchor) -> None:
    with pytest.raises(ValueError, match=r"vit_small_patch16_dinov3.*VisionTransformer"):
        make_anchor(model="vit_small_patch16_dinov3", **settings)


@pytest.mark.parametrize("name", ["vgg11", "maxvit_tiny_tf_224"])
def test_no_adapter(name: str) -> None:
    with pytest.raises(TypeError, match="plain ViT"):
        create_anchor(name, 64)
    with pytest.raises(TypeError, match="VisionTransformer"):
        adapter_of(timm.create_model(name))


def test_dropping_patches() -> None:
    with pytest.raises(ValueError, match="patch_drop_rate"):
        create_anchor("deit3_small_patch16_224", 32, embed_dim=32, depth=2, num_heads=2, patch_drop_rate=0.5)


def test_a_model_of_one_input_size() -> None:
    model = timm.create_model("deit3_small_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="dynamic_img_size"):
        VisionTransformerAnchor(model)
