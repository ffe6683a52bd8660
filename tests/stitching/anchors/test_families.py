"""The families of docs/anchors.md: each model as an anchor against timm's own forward, and each row as a network.

The models are timm's own, made narrow and shallow; their patches, prefix tokens, norms, MLPs, positions and native
sizes are those of the real ones.
"""

import math
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from torch import Tensor, nn

from mmsnnet.stitching import (
    Anchor,
    Features,
    NormalEquations,
    StitchedNetwork,
    StitchSpace,
    cost_model,
    count_flops,
    create_anchor,
    load_pretrained,
)
from mmsnnet.stitching.anchors.staged import ADAPTERS, staged_adapter
from mmsnnet.stitching.stitch import Stitch

REPOSITORY = Path(__file__).parents[3]
spec = spec_from_file_location("benchmarks_anchors", REPOSITORY / "benchmarks/anchors.py")
assert spec is not None and spec.loader is not None
table = module_from_spec(spec)
spec.loader.exec_module(table)

Randomise = Callable[[nn.Module], None]
MakeImages = Callable[..., Tensor]

TINY = dict(embed_dim=32, depth=2, num_heads=2)
TAPS = (0, 1)
MODELS = sorted({model for family in table.FAMILIES for model in family.models})
OTHER_PATCHES = sorted({(m, f.patch_size) for f in table.FAMILIES for m in f.models if f.patch_size is not None})


def name_of(family: Any) -> str:
    return "+".join(family.models)


def native_size(model: str) -> tuple[int, int]:
    """The image size (height, width) of a model's weights."""
    return tuple(timm.get_pretrained_cfg(model).input_size[1:])


@pytest.fixture
def make_reference(randomise: Randomise) -> Callable[..., nn.Module]:
    """``make_reference(model)``: timm's model, made by timm alone, none of its weights at its initial value."""

    def make(model: str, **kwargs: Any) -> nn.Module:
        reference = timm.create_model(model, **TINY, **kwargs).eval()
        randomise(reference)
        return reference

    return make


def timms_taps(reference: nn.Module, images: Tensor) -> list[Tensor]:
    """The block outputs of timm's model: tokens (B, N, C), prefix tokens first."""
    prefix = reference.num_prefix_tokens > 0
    taps = reference.forward_intermediates(
        images, indices=list(TAPS), return_prefix_tokens=prefix, output_fmt="NLC", intermediates_only=True
    )
    return [torch.cat([tap[1], tap[0]], dim=1) if prefix else tap for tap in taps]


def tokens(network: StitchedNetwork, images: Tensor, stitch: Stitch) -> tuple[Tensor, ...]:
    return tuple(tap.data for tap in network.taps(images, stitch, TAPS))


def saved(reference: nn.Module, folder: Path) -> str:
    torch.save(reference.state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")


def assert_taps(actual: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) == len(TAPS)
    for tokens, reference in zip(actual, expected, strict=True):
        assert reference.std() > 0.05
        torch.testing.assert_close(tokens, reference, rtol=1e-5, atol=1e-5)


# Each anchor alone


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_an_anchor_alone_gives_what_timms_model_gives(
    model: str, make_reference: Callable[..., nn.Module], make_images: MakeImages, tmp_path: Path
) -> None:
    reference = make_reference(model)
    size = native_size(model)
    anchor = create_anchor(model, size, **TINY)
    assert load_pretrained(anchor, saved(reference, tmp_path)).resized == ()
    network = StitchedNetwork([anchor], StitchSpace.single(2)).eval()
    (stitch,) = network.space

    images = make_images(1, *size)
    assert_taps(tokens(network, images, stitch), timms_taps(reference, images))

    # A network for the native size takes a rectangular image as timm's dynamic model does.
    patch = anchor.patch_size[0]
    dynamic = timm.create_model(model, **TINY, dynamic_img_size=True).eval()
    dynamic.load_state_dict(reference.state_dict())
    images = make_images(1, 5 * patch, 3 * patch)
    assert_taps(tokens(network, images, stitch), timms_taps(dynamic, images))


def assert_the_same_at(
    model: str, img_size: tuple[int, int], options: dict[str, int], reference: nn.Module, folder: Path, images: Tensor
) -> None:
    """Asserts that the anchor's blocks give at ``img_size`` what timm's give after timm's ``set_input_size``."""
    anchor = create_anchor(model, img_size, **TINY, **options)
    load_pretrained(anchor, saved(reference, folder))
    network = StitchedNetwork([anchor], StitchSpace.single(TINY["depth"])).eval()
    (stitch,) = network.space
    reference.set_input_size(img_size, options.get("patch_size"))
    assert_taps(tokens(network, images, stitch), timms_taps(reference, images))


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_an_anchor_for_a_rectangle_gives_what_timms_model_gives(
    model: str, make_reference: Callable[..., nn.Module], make_images: MakeImages, tmp_path: Path
) -> None:
    reference = make_reference(model)
    patch = reference.patch_embed.patch_size[0]
    size = (4 * patch, 7 * patch)
    assert_the_same_at(model, size, {}, reference, tmp_path, make_images(2, *size))


@pytest.mark.parametrize(("model", "patch"), OTHER_PATCHES)
@torch.no_grad()
def test_an_anchor_with_another_patch_size_gives_what_timms_model_gives(
    model: str, patch: int, make_reference: Callable[..., nn.Module], make_images: MakeImages, tmp_path: Path
) -> None:
    size = (4 * patch, 6 * patch)
    assert_the_same_at(model, size, dict(patch_size=patch), make_reference(model), tmp_path, make_images(2, *size))


# Each row


class Route(nn.Module):
    """The taps of one route, as a module to be counted."""

    def __init__(self, network: StitchedNetwork, stitch: Stitch, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.stitch, self.out_indices = network, stitch, out_indices

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images, self.stitch, self.out_indices)


def narrowed(family: Any, randomise: Randomise) -> StitchedNetwork:
    """The network of a row with widths 32, 48, ..., all anchors of depth 2 but for the last, of depth 4; for 3 x 4
    patches."""
    patch = family.patch_size or timm.create_model(family.models[-1], **TINY).patch_embed.patch_size[0]
    depths = [*[2] * (len(family.models) - 1), 4]
    anchors = [
        create_anchor(
            model, (3 * patch, 4 * patch), **TINY | dict(embed_dim=32 + 16 * index, depth=depth), **family.options
        )
        for index, (model, depth) in enumerate(zip(family.models, depths, strict=True))
    ]
    network = StitchedNetwork(anchors, StitchSpace.two_way(depths), rank=2)
    randomise(network)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("family", table.FAMILIES, ids=name_of)
def test_all_stitches_of_a_row(family: Any, randomise: Randomise, make_images: MakeImages) -> None:
    network = narrowed(family, randomise).eval()
    size = network.anchor(0).img_size
    width = network.anchor(-1).width
    taps = (1, 3)

    equations = NormalEquations(network)
    equations.add(make_images(4, *size))
    equations.solve()
    assert network.initialized

    images = make_images(1, *size, seed=1)
    for stitch in network.space:
        maps = network(images, stitch, taps)
        assert [tuple(tap.shape) for tap in maps] == [(1, width, 3, 4)] * 2
        assert all(tap.isfinite().all() for tap in maps)
        torch.stack([tap.square().mean() for tap in maps]).sum().backward()
    # Between them the stitches train everything that trains, and nothing is left over.
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.isfinite().all())) == parameter.requires_grad, name

    last = network.space[max(stitch.id for stitch in network.space)]
    route = Route(network.merged(), last, taps).requires_grad_(True)
    cost = cost_model(network, size).stitch(last, taps)
    assert cost.flops == count_flops(route, images)
    route.zero_grad(set_to_none=True)
    torch.stack([tap.square().mean() for tap in route(images)]).sum().backward()
    assert cost.params == sum(p.numel() for p in route.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", (*table.FAMILIES, *table.STAGED), ids=name_of)
def test_the_models_of_a_row_see_the_same_pixels(family: Any) -> None:
    """Anchors of one network share one preprocessor; and the weights that a row names are there."""
    assert len({table.normalisation(model) for model in family.models}) == 1
    for model in family.models:
        assert model in timm.list_pretrained(model.split(".")[0] + ".*")


@pytest.mark.parametrize(
    "model",
    [
        "maxvit_tiny_tf_224",
        "samvit_base_patch16_224",
        "beit_base_patch16_224",
        "beitv2_base_patch16_224",
        "vit_relpos_small_patch16_224",
    ],
)
def test_what_the_page_calls_no_anchor_is_refused(model: str) -> None:
    with pytest.raises(TypeError, match="an anchor is a plain ViT"):
        create_anchor(model, 224)


def test_positions_that_training_varies_are_refused() -> None:
    with pytest.raises(ValueError, match="an anchor's rotary positions are those of its grid"):
        create_anchor("vit_base_patch16_sapiens2", 64, **TINY, num_kv_heads=1)


# Rotary positions


def rotated(heads: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """DINOv3's rotary positions (arXiv 2508.10104) on queries or keys (B, heads, N, D), as complex numbers:
    coordinates of patches from -1 to 1, rows in the first half of the frequencies, columns in the second; prefix tokens
    stay as they are."""
    height, width = grid
    half = heads.shape[-1] // 2
    periods = 100.0 ** (torch.arange(half // 2) / (half // 2))
    y, x = (2 * (torch.arange(side) + 0.5) / side - 1 for side in grid)
    of_rows = (y[:, None] / periods)[:, None, :].expand(height, width, -1)
    of_columns = (x[:, None] / periods)[None, :, :].expand(height, width, -1)
    turns = torch.cat([of_rows, of_columns], dim=-1).flatten(0, 1)
    numbers = torch.complex(heads[..., :half], heads[..., half:])
    turned = numbers[..., prefix:, :] * torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
    numbers = torch.cat([numbers[..., :prefix, :], turned], dim=-2)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def dinov3_block(block: nn.Module, tokens: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """A block of DINOv3 S, B or L, written out."""
    layer_norm = nn.functional.layer_norm
    x = layer_norm(tokens, tokens.shape[-1:], block.norm1.weight, block.norm1.bias, eps=1e-5)
    query, key, value = (x @ block.attn.qkv.weight.T).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    query, key = rotated(query, grid, prefix), rotated(key, grid, prefix)
    weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    attended = (weights @ value).transpose(1, 2).flatten(2)
    tokens = tokens + block.gamma_1 * (attended @ block.attn.proj.weight.T + block.attn.proj.bias)
    x = layer_norm(tokens, tokens.shape[-1:], block.norm2.weight, block.norm2.bias, eps=1e-5)
    hidden = nn.functional.gelu(x @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return tokens + block.gamma_2 * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)


@pytest.fixture
def make_rotary(randomise: Randomise) -> Callable[[str], Anchor]:
    """``make_rotary(model)``: a tiny anchor for 4 x 4 patches."""

    def make(model: str) -> Anchor:
        anchor = create_anchor(model, 64, **TINY).eval()
        randomise(anchor)
        return anchor

    return make


def leaving(anchor: Anchor, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """The output of each block."""
    return [left.data for _, left in anchor.run(Features(tokens, anchor.layout(), grid))]


@pytest.mark.parametrize("grid", [(4, 4), (2, 4), (4, 2)])
@torch.no_grad()
def test_dinov3_turns_patches_by_their_place_and_leaves_prefix_tokens(
    grid: tuple[int, int], make_rotary: Callable[[str], Anchor], make_images: MakeImages
) -> None:
    anchor = make_rotary("vit_small_patch16_dinov3")
    expected = tokens = anchor.stem(make_images(2, 16 * grid[0], 16 * grid[1])).data
    for index, actual in enumerate(leaving(anchor, tokens, grid)):
        expected = dinov3_block(anchor.block(index), expected, grid, anchor.layout().prefix)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        "vit_small_patch16_dinov3",
        "eva02_small_patch14_224",
        "vit_small_patch16_rope_mixed_224",
        "vit_pe_spatial_tiny_patch16_512",
    ],
)
@torch.no_grad()
def test_the_same_tokens_on_another_grid_are_another_image(model: str, make_rotary: Callable[[str], Anchor]) -> None:
    """Rotary positions know the grid, where absolute ones are in the tokens; one grid leaves nothing behind for the
    next."""
    anchor = make_rotary(model)
    tokens = torch.randn(1, anchor.layout().prefix + 8, anchor.width)
    wide, tall, again = (leaving(anchor, tokens, grid)[-1] for grid in ((2, 4), (4, 2), (2, 4)))
    assert (wide - tall).abs().max() > 1e-3
    assert torch.equal(wide, again)


@torch.no_grad()
def test_learned_rotations_are_each_blocks_own(make_rotary: Callable[[str], Anchor]) -> None:
    anchor = make_rotary("vit_small_patch16_rope_mixed_224")
    tokens = torch.randn(1, anchor.layout().prefix + 8, anchor.width)
    before = leaving(anchor, tokens, (2, 4))
    anchor.model.rope.freqs[:, 1] += 1.0
    after = leaving(anchor, tokens, (2, 4))
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


# The page


@pytest.fixture(scope="module")
def page() -> list[str]:
    return (REPOSITORY / "docs/anchors.md").read_text().splitlines()


def test_the_page_has_the_rows_that_are_checked(page: list[str]) -> None:
    """In their order, and no other stitches."""
    rows = [line.split(" | ")[:2] for line in page if "`, `" in line and line.startswith("| ")]
    assert rows == [
        [f"| {family.name}", ", ".join(f"`{model}`" for model in family.models)]
        for family in (*table.FAMILIES, *table.STAGED)
    ]


# A pair, and three anchors with rotary positions.
CHEAP_ROWS = ("deit_tiny_patch16_224.fb_in1k", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m")


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in table.FAMILIES if f.models[0] in CHEAP_ROWS], ids=name_of)
def test_the_rows_are_what_the_command_prints(family: Any, page: list[str]) -> None:
    assert table.row(family) in page


CHEAP = [pair for pair in table.STAGED if pair.name in ("ConvNeXt V2", "LeViT")]


@pytest.mark.slow
@pytest.mark.parametrize("pair", CHEAP, ids=name_of)
def test_the_rows_of_hierarchical_models_are_what_the_command_prints(pair: Any, page: list[str]) -> None:
    assert table.staged_row(pair) in page


@pytest.mark.slow
def test_what_the_command_prints_has_run_across_every_stage() -> None:
    (pair,) = (pair for pair in CHEAP if pair.name == "LeViT")
    ran: set[tuple[str, int]] = set()
    for scheme, network in table.staged_networks(pair).items():
        with patch.object(network, "classify", wraps=network.classify) as classify:
            assert table.run_crossings(network, pair.size) == {0, 1, 2}
        for (_, stitch), _ in classify.call_args_list:
            ran |= {(scheme, int(key.source_block) // 4) for key in stitch.layers}
    assert ran == {(scheme, stage) for scheme in ("two_way", "one_way", "sliding_window") for stage in range(3)}


def test_every_adapter_of_hierarchical_models_has_a_row() -> None:
    assert {staged_adapter(model) for pair in table.STAGED for model in pair.models} == set(ADAPTERS)


@pytest.mark.parametrize("name", table.NORMALISATIONS)
def test_the_normalisations_are_what_the_command_prints(name: str, page: list[str]) -> None:
    assert table.normalisation_row(name) in page
