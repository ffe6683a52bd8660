"""The second stage of the initialisation: layers alone learn an anchor's final features."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsnnet.errors import SettingError
from mmsnnet.stitching import NormalEquations, Refinement, StitchedNetwork
from mmsnnet.stitching.network import evaluation_mode
from mmsnnet.stitching.refinement import route_errors

MakeNetwork = Callable[..., StitchedNetwork]


@pytest.fixture
def solved(make_network: MakeNetwork, make_images: Callable[..., Tensor]) -> StitchedNetwork:
    network = make_network()
    equations = NormalEquations(network)
    equations.add(make_images(4))
    equations.solve()
    return network.train()


def errors(network: StitchedNetwork, images: Tensor) -> dict[str, float]:
    stitches = [stitch for stitch in network.space if stitch.layers]
    with evaluation_mode(network), torch.no_grad():
        return {stitch.name: float(error) for stitch, error in route_errors(network, images, stitches)}


def test_the_error_is_that_of_final_features(solved: StitchedNetwork, make_images: Callable[..., Tensor]) -> None:
    images = make_images(3)
    found = errors(solved, images)
    solved.eval()
    with torch.no_grad():
        for stitch in solved.space:
            if not stitch.layers:
                continue
            *_, last = solved.walk(images, stitch)
            *_, whole = solved.walk(images, solved.space.anchors[last.anchor])
            route, target = last.projected[()].data, whole.projected[()].data
            expected = (route - target).square().sum() / target.square().sum()
            assert found[stitch.name] == pytest.approx(float(expected), rel=1e-5)


def test_only_layers_change_and_errors_fall(solved: StitchedNetwork, make_images: Callable[..., Tensor]) -> None:
    images = make_images(4)
    before, weights = errors(solved, images), {name: p.clone() for name, p in solved.named_parameters()}
    trained = {name: p.requires_grad for name, p in solved.named_parameters()}
    refinement = Refinement(solved, steps=60, lr=3e-3)
    for _ in range(60):
        refinement.step(images)
    refinement.finish()
    after = errors(solved, images)
    assert sum(after.values()) < 0.9 * sum(before.values())
    changed = {name for name, p in solved.named_parameters() if not torch.equal(p, weights[name])}
    assert changed and all(name.startswith("layers.") and name.endswith(("weight", "bias")) for name in changed)
    assert {name: p.requires_grad for name, p in solved.named_parameters()} == trained
    assert all(p.grad is None for p in solved.parameters()) and solved.training


def test_hooks_of_wrappers_do_not_run(solved: StitchedNetwork, make_images: Callable[..., Tensor]) -> None:
    """Wrappers for distributed training take every accumulated gradient for one of a training step."""

    def fail(parameter: Tensor) -> None:
        raise AssertionError("a gradient was accumulated")

    for parameter in solved.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(fail)
    Refinement(solved, steps=1).step(make_images(2))


def test_the_same_seed_gives_the_same_layers(make_network: MakeNetwork, make_images: Callable[..., Tensor]) -> None:
    images, weights = make_images(2), []
    for _ in range(2):
        torch.manual_seed(5)
        network = make_network()
        for layer in network.layers.values():
            layer.set_base(torch.full_like(layer.weight, 0.01), torch.zeros_like(layer.bias))
        refinement = Refinement(network, steps=5, seed=3)
        torch.rand(7)  # global draws do not matter
        for _ in range(5):
            refinement.step(images)
        weights.append(torch.cat([p.detach().flatten() for p in network.layers.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert len(weights[0].unique()) > 10


def test_every_route_gets_its_turn(solved: StitchedNetwork) -> None:
    refinement = Refinement(solved, steps=1, stitches_per_step=3)
    crossing = len(refinement.crossing)
    drawn = [stitch.id for _ in range(crossing) for stitch in refinement._next()]
    assert set(drawn) == {stitch.id for stitch in refinement.crossing}
    assert all(2 <= drawn.count(id_) <= 4 for id_ in set(drawn))


def test_what_is_not_initialised_is_refused(make_network: MakeNetwork) -> None:
    network = make_network()
    for layer in network.layers.values():
        layer.initialized = False
    with pytest.raises(ValueError, match="initialised"):
        Refinement(network, steps=1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(steps=0), "steps must be a whole number of at least 1, got 0"),
        (dict(steps=1, lr=float("nan")), "lr must be a finite number above 0, got nan"),
        (dict(steps=1, stitches_per_step=1.5), "stitches_per_step must be a whole number of at least 1, got 1.5"),
        (dict(steps=1, seed="0"), "seed must be a whole number, got '0'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], text: str, solved: StitchedNetwork) -> None:
    with pytest.raises(SettingError, match=f"^Refinement.{re.escape(text)}$"):
        Refinement(solved, **settings)
