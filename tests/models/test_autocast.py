"""Mixed precision: which types there are, on every route alike, and what is left out of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.optim import AmpOptimWrapper
from torch import Tensor

from mmsnnet.stitching import NormalEquations, StitchingLayer
from tests.conftest import gpu

Make = Callable[..., Any]

BFLOAT = dict(device_type="cpu", dtype=torch.bfloat16)
EVA = dict(model="eva02_tiny_patch14_224")
MODELS = {
    "plain": {},
    "bias and windows": dict(small=dict(rel_pos_bias=True), large=dict(rel_pos_bias=True, window_size=1)),
    "rotary": dict(small=EVA, large=EVA, img_size=28),
    "recomputed": dict(with_cp=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_stay_in_full_precision_on_every_route(kind: str, make_backbone: Make, make_images: Make) -> None:
    """As they do in an anchor alone, whose blocks add to them: maps are of one type, wherever a route has been."""
    backbone = make_backbone(**MODELS[kind], out_indices=(1, 3))
    images = make_images(2, *backbone.img_size)
    for stitch in backbone.space:
        expected = backbone.network(images, stitch, (1, 3))
        with torch.autocast(**BFLOAT):
            left = [leaving.projected[()].data.dtype for leaving in backbone.network.walk(images, stitch)]
            found = backbone.network(images, stitch, (1, 3))
        assert {*left, *(tap.dtype for tap in found)} == {torch.float32}
        for tap, exact in zip(found, expected, strict=True):
            assert (tap - exact).norm() < 0.03 * exact.norm()
        sum(tap.square().mean() for tap in found).backward()
    assert {p.grad.dtype for p in backbone.parameters() if p.grad is not None} == {torch.float32}


def test_a_stitching_layer_multiplies_in_half_precision() -> None:
    layer, x = StitchingLayer(32, 48, rank=2), torch.randn(4, 32)
    torch.nn.init.normal_(layer.lora_B)
    with torch.autocast(**BFLOAT):
        found = layer(x)
    expected = layer(x)
    assert found.dtype == expected.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    assert layer.half()(x.half()).dtype == torch.float16


@pytest.mark.slow
def test_draws_do_not_depend_on_autocast(make_backbone: Make, make_images: Make) -> None:
    """FLOPs are counted in the first step, within it."""
    plain, mixed = make_backbone(), make_backbone()
    mixed.load_state_dict(plain.state_dict())
    with torch.autocast(**BFLOAT):
        mixed(make_images())
    plain(make_images())
    assert mixed.sampler() == plain.sampler()
    assert mixed.drawn == plain.drawn


def test_initialisation_sums_and_solves_in_double_precision(make_network: Make, make_images: Make) -> None:
    network = make_network(rank=2)
    solved = []
    for _ in range(2):
        with torch.autocast(**BFLOAT, enabled=bool(solved)):
            equations = NormalEquations(network)
            equations.add(make_images(4, 64, 64))
            assert {total.dtype for total in equations.sums()} == {torch.float64}
            equations.solve()
        solved.append([network.layer(key).weight.clone() for key in network.space.layers])
    for exact, mixed in zip(*solved, strict=True):
        assert mixed.dtype == torch.float32 and torch.isfinite(mixed).all()
        assert (mixed - exact).norm() < 0.5 * exact.norm()


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("clip", [None, dict(max_norm=1.0)], ids=["", "clipped"])
def test_mixed_precision_trains_on_a_gpu(dtype: str, clip: Any, make_backbone: Make, make_images: Make) -> None:
    """With a dynamic loss scale and the fused optimizer: what a stitch does not use has no gradient and stays."""
    backbone = make_backbone().cuda().train()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    wrapper = AmpOptimWrapper(optimizer=optimizer, dtype=dtype, clip_grad=clip and dict(clip))
    for number in range(8):
        before = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
        with wrapper.optim_context(backbone):
            (found,) = backbone(make_images(seed=number).cuda())
            loss: Tensor = found.square().mean()
        wrapper.update_params(loss)
        moved = {name for name, p in backbone.named_parameters() if not torch.equal(p, before[name])}
        used = set(map(id, backbone.trained_parameters(backbone.drawn)))
        assert moved <= {name for name, p in backbone.named_parameters() if id(p) in used}
        if number > 4:  # the first scales may be too large for float16
            assert moved
