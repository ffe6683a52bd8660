"""Compilation of blocks: the same results, few variants, and no silent fallback."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from mmsnnet.stitching import Stitch, StitchedNetwork, cost_model
from mmsnnet.stitching.compilation import StochasticDepth

pytestmark = pytest.mark.slow

MakeImages = Callable[..., Tensor]
MakeNetwork = Callable[..., StitchedNetwork]

EVA = dict(model="eva02_tiny_patch14_224", img_size=28)
WINDOWS = dict(img_size=64, window_size=3, global_blocks=(1,), rel_pos_bias=True)


class Counting:
    """The backend ``aot_eager``, with counts of compilations and of runs."""

    def __init__(self) -> None:
        self.variants = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.variants += 1
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run


@pytest.fixture(autouse=True)
def own_compiler() -> Iterator[None]:
    """Reset dynamo's cache and limits around each test."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def step(network: StitchedNetwork, images: Tensor, stitch: Stitch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The map of a route and the gradients of all parameters."""
    network.zero_grad()
    (actual,) = network(images, stitch, (network.space.depths[-1] - 1,))
    actual.square().mean().backward()
    return actual.detach(), {name: p.grad for name, p in network.named_parameters()}


def assert_same(one: Any, other: Any) -> None:
    (actual, gradients), (expected, wanted) = one, other
    assert torch.equal(actual, expected)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient is None) == (wanted[name] is None), name
        assert gradient is None or torch.equal(gradient, wanted[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "with_cp"),
    [({}, False), ({}, True), (EVA, True), (WINDOWS, False)],
    ids=["plain", "plain-with_cp", "rotary-with_cp", "windows"],
)
def test_compiled_blocks_compute_the_same(
    kind: dict[str, Any], with_cp: bool, make_network: MakeNetwork, make_images: MakeImages
) -> None:
    network = make_network(with_cp=with_cp, **kind).train()
    size = kind.get("img_size", 32)
    images, stitches = make_images(2, size, size), list(network.space)
    expected = [copy.deepcopy(step(network, images, stitch)) for stitch in stitches]
    names = list(network.state_dict())
    counting = Counting()
    network.compile_blocks(backend=counting)
    assert list(network.state_dict()) == names
    for stitch, wanted in zip(stitches, expected, strict=True):
        assert_same(step(network, images, stitch), wanted)
    assert counting.runs > 0
    # One for each anchor, or each anchor's blocks within windows and over the whole image.
    assert counting.variants == (4 if kind is WINDOWS else 2)


@pytest.mark.slow
def test_every_block_of_a_deep_pair_runs_what_two_variants_have_been_compiled_for(
    make_network: MakeNetwork, make_images: MakeImages
) -> None:
    """For all rates of stochastic depth, and for more blocks than dynamo's limit."""
    network, images = make_network(depths=(12, 24), drop_path_rate=0.2).train(), make_images()
    counting = Counting()
    network.compile_blocks(backend=counting)
    run = 0
    for stitch in network.space.select("S,L,57,80"):
        step(network, images, stitch)
        run += sum(len(segment) for segment in stitch.segments)
        assert counting.runs == run
    assert counting.variants == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for stitch in network.space.anchors:
            step(network, images, stitch)
    assert (counting.variants, counting.runs) == (4, run + 36)
    # Once more for batches of any other size.
    for size in (3, 5):
        for stitch in network.space.anchors:
            step(network, make_images(size), stitch)
    assert (counting.variants, counting.runs) == (6, run + 3 * 36)
    assert not counters["graph_break"]


def test_a_limit_that_is_hit_is_an_error(make_network: MakeNetwork, make_images: MakeImages) -> None:
    """The limit applies to each kind of block separately."""
    network = make_network().train()
    network.compile_blocks(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for stitch in network.space:
            step(network, make_images(2), stitch)
        with pytest.raises(FailOnRecompileLimitHit):
            step(network, make_images(3), network.space["L"])


@pytest.mark.slow
def test_evaluation_runs_as_before(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network(drop_path_rate=0.2), make_images()
    with torch.inference_mode():
        expected = [network(images, stitch, (3,))[0] for stitch in network.space]
        counting = Counting()
        network.compile_blocks(backend=counting)
        actual = [network(images, stitch, (3,))[0] for stitch in network.space]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert counting.variants == 0
    # Who compiles the forward of a model in evaluation mode compiles its blocks.
    large = network.space["L"]
    whole = torch.compile(lambda: network(images, large, (3,))[0], backend=counting)
    with torch.no_grad():
        torch.testing.assert_close(whole(), expected[1])
    assert (counting.variants, counting.runs) == (1, 1)


@pytest.mark.slow
def test_copies_are_not_compiled(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network(drop_path_rate=0.2), make_images()
    costs = cost_model(network, (32, 32))
    counting = Counting()
    network.compile_blocks(backend=counting)
    assert cost_model(network, (32, 32)) == costs
    for other in (copy.deepcopy(network), network.merged(), pickle.loads(pickle.dumps(network))):
        _, gradients = step(other.train(), images, other.space["L"])  # its own, not those of the blocks it is a copy of
        assert all(gradient is not None for name, gradient in gradients.items() if ".1.model.blocks" in name)
        assert all(parameter.grad is None for parameter in network.parameters())
    assert counting.variants == 0
    step(network.train(), images, network.space["L"])
    assert (counting.variants, counting.runs) == (1, 4)


def test_frozen_blocks_run_compiled(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network(drop_path_rate=0.2)
    network.anchor(0).freeze()
    network.train()
    counting = Counting()
    network.compile_blocks(backend=counting)
    assert not any(module.training for module in network.anchor(0).model.modules())
    _, gradients = step(network, make_images(), network.space["S"])
    assert (counting.variants, counting.runs) == (1, 2)
    trained = [name for name, gradient in gradients.items() if gradient is not None]
    assert trained and all(name.startswith("layers.") for name in trained)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [(dict(backend="nonsense"), ValueError, "no backend 'nonsense'; it has"), (dict(speed=1), TypeError, "speed")],
)
def test_unknown_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, make_network: MakeNetwork
) -> None:
    with pytest.raises(error, match=message):
        make_network().compile_blocks(**options)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_stochastic_depth_drops_samples_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    depth, x = StochasticDepth(rate), torch.full((20000, 1, 3), 2.0, dtype=torch.bfloat16)
    kept = depth(x)
    assert kept.dtype == x.dtype and torch.isfinite(kept).all()
    dropped = kept.abs().sum(dim=(1, 2)) == 0
    assert dropped.float().mean().item() == pytest.approx(rate, abs=0.01)
    assert kept[~dropped].unique().tolist() == ([] if rate == 1 else [torch.tensor(2 / (1 - rate)).bfloat16().item()])
    assert depth.eval()(x) is x
    assert not depth.state_dict()
