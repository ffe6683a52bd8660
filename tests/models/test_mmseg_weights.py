"""Weights of mmseg's VisionTransformer in an anchor: mmseg's module, names and forward, none of them renamed here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmseg.models.backbones import VisionTransformer
from torch import Tensor

from mmsnnet.models import StitchedBackbone


@pytest.mark.parametrize("patch_bias", [False, True])
@torch.no_grad()
def test_an_anchor_computes_what_mmsegs_model_computes(
    patch_bias: bool, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    """The stem of mmseg's model has no bias by default."""
    size = dict(img_size=32, num_heads=2)
    reference = VisionTransformer(
        **size, embed_dims=32, num_layers=2, qkv_bias=True, patch_bias=patch_bias, norm_cfg=dict(type="LN", eps=1e-6)
    )
    reference.eval()  # returns None
    for parameter in reference.parameters():
        parameter.normal_(std=0.1)
    weights = {f"backbone.{name}": tensor for name, tensor in reference.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "w.pth")

    anchor = dict(model="vit_base_patch16_224", embed_dim=32, depth=2, num_heads=2, pretrained=str(tmp_path / "w.pth"))
    backbone = StitchedBackbone(anchors=[anchor], img_size=32, out_indices=(1,))
    backbone.init_weights()
    images = make_images(2, 32, 32)
    torch.testing.assert_close(backbone.eval()(images)[0], reference(images)[0], rtol=1e-5, atol=1e-5)
