"""The parameters that a stitch trains are those of the parts that its forward runs."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from torch import Tensor, nn

from mmsnnet.stitching import Component, Stitch
from mmsnnet.stitching.route_parts import AnchorPart, classifier_parts, part_parameters, tap_parts

EVA = dict(model="vit_small_patch16_rope_mixed_224", num_heads=2)
BACKBONES: dict[str, dict[str, Any]] = {
    "taps": dict(out_indices=dict(train=(0, 1, 3), test=(3,))),
    "nothing after the last tap": dict(out_indices=(1,)),
    "logits": dict(num_classes=5),
    "a skipped norm": dict(num_classes=5, scheme="sliding_window", skip_final_norm=True, small=dict(depth=4)),
    "full weights, one way": dict(rank=0, scheme="one_way", out_indices=(1, 3)),
    "bias and windows": dict(large=dict(rel_pos_bias=True, window_size=2, global_blocks=(1, 3))),
    "learned rotary positions": dict(small=EVA, large=EVA, num_classes=5),
    "norms of taps": dict(norm_taps=True, out_indices=(1, 3)),
    "frozen stages": dict(frozen_stages=2, out_indices=(1, 3)),
    "a frozen anchor": dict(frozen_anchors=(1,), out_indices=(1, 3)),
    "checkpointing": dict(with_cp=True, out_indices=(1, 3)),
}


def draw(backbone: Any, stitch: Stitch) -> None:
    """Make the next forward draw this stitch."""
    backbone.draws = next(n for n in count() if backbone.sampler().draw(n) == stitch.id)


def total(output: Any) -> Tensor:
    return output.square().sum() if isinstance(output, Tensor) else sum(tap.square().sum() for tap in output)


@pytest.mark.parametrize("settings", BACKBONES.values(), ids=BACKBONES.keys())
def test_what_a_stitch_trains_is_what_gets_a_gradient(
    settings: dict[str, Any], make_backbone: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    backbone = make_backbone(**settings)
    for stitch in backbone.space:
        draw(backbone, stitch)
        backbone.zero_grad()
        loss = total(backbone(make_images(1)))
        if loss.requires_grad:  # a frozen anchor alone trains nothing
            loss.backward()
        trained = backbone.trained_parameters(stitch)
        assert len(set(trained)) == len(trained)
        assert set(trained) == {parameter for parameter in backbone.parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["taps", "logits", "learned rotary positions", "checkpointing"])
def test_gradients_arrive_in_the_reverse_order_of_use(
    name: str, make_backbone: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    backbone = make_backbone(**BACKBONES[name])
    arrived: list[nn.Parameter] = []
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived.append)
    for stitch in backbone.space:
        draw(backbone, stitch)
        arrived.clear()
        total(backbone(make_images(1))).backward()
        if backbone.num_classes is None:
            parts = tap_parts(backbone.space, stitch, backbone.out_indices)
        else:
            parts = classifier_parts(stitch)
        part_of = {p: part for part in dict.fromkeys(parts) for p in part_parameters(backbone.network, part)}
        in_order = list(dict.fromkeys(part_of[parameter] for parameter in arrived))
        expected = dict.fromkeys(part_of[parameter] for parameter in backbone.trained_parameters(stitch))
        assert in_order == list(reversed(expected))


def test_a_part_has_its_frozen_parameters_too(make_backbone: Callable[..., Any]) -> None:
    backbone = make_backbone(frozen_anchors=(0, 1))
    assert part_parameters(backbone.network, AnchorPart(0, Component("block", 1)))
    assert backbone.trained_parameters(backbone.space["L"]) == ()
    crossing = backbone.network.layer(backbone.space["S0-L2"].layers[0])
    assert set(backbone.trained_parameters(backbone.space["S0-L2"])) == set(crossing.parameters()) - {crossing.weight}
