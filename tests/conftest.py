"""Builders that the tests share: tiny anchors of timm's families, networks of two of them, images."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmsnnet.stitching import Anchor, StitchedNetwork, StitchSpace, create_anchor


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are quicker on one thread, above all where other work shares the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves no trace in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def make_images() -> Callable[..., Tensor]:
    """``make_images(batch, height, width)``: standard normal images (B, 3, H, W)."""

    def make(
        batch: int = 2, height: int = 32, width: int = 32, seed: int = 0, dtype: torch.dtype | None = None
    ) -> Tensor:
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return make


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Moves every parameter off its initial value, so that layer scale, position embedding and zeros all count."""

    @torch.no_grad()
    def move(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    return move


@pytest.fixture
def make_anchor(randomise: Callable[[nn.Module], None]) -> Callable[..., Anchor]:
    """``make_anchor(depth, width)``: a tiny anchor in evaluation mode; other keywords as for ``create_anchor``."""

    def make(
        depth: int = 2,
        width: int = 32,
        model: str = "deit3_small_patch16_224",
        img_size: int | tuple[int, int] = 32,
        **kwargs: Any,
    ) -> Anchor:
        anchor = create_anchor(model, img_size, embed_dim=width, depth=depth, num_heads=2, **kwargs).eval()
        randomise(anchor)
        return anchor

    return make


@pytest.fixture
def make_network(
    make_anchor: Callable[..., Anchor], randomise: Callable[[nn.Module], None]
) -> Callable[..., StitchedNetwork]:
    """``make_network(depths, widths)``: a two-way network in evaluation mode whose layers all differ from zero."""

    def make(
        depths: tuple[int, int] = (2, 4),
        widths: tuple[int, int] = (32, 48),
        rank: int = 2,
        with_cp: bool = False,
        **kwargs: Any,
    ) -> StitchedNetwork:
        anchors = [make_anchor(depth, width, **kwargs) for depth, width in zip(depths, widths, strict=True)]
        network = StitchedNetwork(anchors, StitchSpace.two_way(depths), rank=rank, with_cp=with_cp).eval()
        randomise(network.layers)
        return network

    return make
