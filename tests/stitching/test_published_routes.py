"""Every route of the spaces that SN-Net published, against a walk over timm's own modules."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mmsnnet.stitching import StitchedNetwork, StitchSpace, create_anchor
from tests.stitching.published.walk import FAMILIES, layer_sizes, read, walk

# Narrow anchors of the published depths; timm's arguments.
NARROW: dict[str, tuple[dict[str, Any], ...]] = dict(
    deit_ti_s_b=tuple(dict(embed_dim=16 * n, num_heads=n) for n in (1, 2, 3)),
    swin_ti_s_b=tuple(dict(embed_dim=8 * n, num_heads=(n, 2 * n, 4 * n, 8 * n)) for n in (1, 1, 2)),
    resnet18_resnet50=(dict(channels=(8, 12, 16, 20)), dict(channels=(4, 6, 8, 10))),
    resnet18_swin_ti=(dict(channels=(8, 12, 16, 20)), dict(embed_dim=8, num_heads=(1, 2, 4, 8))),
    levit_192_256=tuple(dict(embed_dim=(16 * n, 24 * n, 32 * n), num_heads=(2, 3, 4), key_dim=8) for n in (1, 2)),
)
CLASSES = 10


@dataclass(frozen=True)
class Published:
    """A published space: its routes, our network, and timm's models and plain weights that hold the same values."""

    routes: list[dict[str, Any]]
    network: StitchedNetwork
    models: list[nn.Module]
    layers: dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move weights and running statistics off their start, so that each of them counts."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer), alpha=0.5)


@cache
def build(family: str) -> Published:
    torch.manual_seed(0)
    published = read(family)
    names, stages = zip(*((anchor["timm"], anchor["depths"]) for anchor in published["anchors"]), strict=True)
    skip = tuple(stage for stage in range(len(stages[0])) if stage not in published["stitched_stages"])
    models, anchors = [], []
    for name, narrow in zip(names, NARROW[family], strict=True):
        model = timm.create_model(name, num_classes=CLASSES, **narrow).eval()
        randomise(model)
        anchor = create_anchor(name, 224, classifier=True, num_classes=CLASSES, **narrow)
        anchor.model.load_state_dict(model.state_dict())
        models.append(model)
        anchors.append(anchor)
    network = StitchedNetwork(anchors, StitchSpace.sliding_window(stages, skip), rank=0).eval()
    layers = {}
    for name, (stage, *ends) in layer_sizes(published).items():
        wide, narrow = (anchors[end].widths[sum(stages[end][: stage + 1]) - 1] for end in reversed(ends))
        layers[name] = torch.randn(wide, narrow) / narrow**0.5, torch.randn(wide)
    for stitch, route in zip(network.space, published["stitches"], strict=True):
        for key in stitch.layers:
            network.layer(key).set_base(*layers[route["layer"]])
    return Published(published["stitches"], network, models, layers)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_route_gives_the_logits_of_a_walk_over_timms_modules(family: str) -> None:
    """And no two routes give the same: a wrong block, layer or norm would show."""
    space, images = build(family), torch.randn(1, 3, 224, 224)
    found = []
    for stitch, route in zip(space.network.space, space.routes, strict=True):
        logits = space.network.classify(images, stitch)
        assert stitch.id == route["id"] and logits.shape == (1, CLASSES)
        assert distance(logits, walk(space.models, route, space.layers, images)) <= 1e-6, stitch
        found.append(logits)
    for one, logits in enumerate(found):
        assert all(distance(logits, other) > 1e-3 for other in found[:one])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_walk_over_a_whole_anchor_is_timms_forward(family: str) -> None:
    space, images = build(family), torch.randn(1, 3, 224, 224)
    for model, route in zip(space.models, space.routes, strict=False):
        assert distance(walk(space.models, route, space.layers, images), model(images)) <= 1e-6


@torch.no_grad()
def test_the_published_walk_skips_the_final_norm_where_a_plain_vit_crosses() -> None:
    """The head's input is then what leaves the last block; a norm that is an identity makes no difference."""
    space, images = build("deit_ti_s_b"), torch.randn(2, 3, 224, 224)
    alone, crossing = space.routes[2], space.routes[-1]
    norm = space.models[-1].norm
    for route in (alone, crossing):
        applied, skipped = (walk(space.models, route, space.layers, images, final_norm=n) for n in (True, False))
        space.models[-1].norm = nn.Identity()
        without = walk(space.models, route, space.layers, images)
        space.models[-1].norm = norm
        assert torch.equal(skipped, applied if route is alone else without)
        assert distance(applied, without) > 1e-3
