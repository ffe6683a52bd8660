"""Attention with windows and a relative position bias, against timm and against matrix algebra."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import RelPosBias
from timm.layers.pos_embed_rel import gen_relative_position_index
from torch import Tensor, nn

from mmsnnet.stitching import Anchor, create_anchor
from mmsnnet.stitching.anchors.attention import position_index, resize_table, table_rows

MakeAnchor = Callable[..., Anchor]
MakeImages = Callable[..., Tensor]
CPU = torch.device("cpu")


def run(anchor: Anchor, images: Tensor) -> list[Tensor]:
    """The output tokens of each block, in the layout of the whole image."""
    return [features.to(anchor.layout()).data for _, features in anchor.run(anchor.stem(images))]


def windows(anchor: Anchor) -> tuple[int, ...]:
    return tuple(anchor.layout(block).window for block in range(anchor.depth))


def attend(block: torch.nn.Module, tokens: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """A block's attention branch in plain matrix algebra; ``bias`` (heads, N, N) is added to the logits."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv
    weights = (query @ key.transpose(-2, -1) / attn.head_dim**0.5 + bias).softmax(-1)
    return attn.proj((weights @ value).transpose(1, 2).flatten(2))


# The bias


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (4, 2)])
def test_the_index_is_timms(grid: tuple[int, int], prefix: int) -> None:
    assert torch.equal(position_index(grid, prefix, CPU), gen_relative_position_index(grid, class_token=prefix == 1))
    assert int(position_index(grid, prefix, CPU).max()) == table_rows(grid, prefix) - 1


def test_the_index_by_hand() -> None:
    """Grid 1 x 2, two prefix tokens: offsets -1, 0, 1 are rows 0, 1, 2, then prefix to patch, patch to prefix, prefix
    to prefix."""
    assert position_index((1, 2), 2, CPU).tolist() == [[5, 5, 3, 3], [5, 5, 3, 3], [4, 4, 1, 0], [4, 4, 2, 1]]


@pytest.mark.parametrize("model", ["deit3_small_patch16_224", "vit_tiny_patch16_224", "vit_base_patch16_gap_224"])
@torch.no_grad()
def test_blocks_are_timms_with_its_bias_as_mask(model: str, make_anchor: MakeAnchor, make_images: MakeImages) -> None:
    anchor, images = make_anchor(model=model, img_size=64, rel_pos_bias=True), make_images(2, 64, 64)
    tokens = anchor.stem(images).data
    for block, left in zip(anchor.model.blocks, run(anchor, images), strict=True):
        bias = RelPosBias((4, 4), 2, prefix_tokens=anchor.layout().prefix)
        bias.relative_position_bias_table.copy_(block.attn.relative_position_bias_table)
        plain = block(tokens)
        tokens = block(tokens, attn_mask=bias.get_bias())
        torch.testing.assert_close(left, tokens)
        assert not torch.allclose(plain, tokens, rtol=1e-3)


@torch.no_grad()
def test_a_bias_that_is_zero_changes_nothing(make_images: MakeImages) -> None:
    sizes = dict(embed_dim=32, depth=2, num_heads=2)
    plain, biased = (
        create_anchor("deit3_small_patch16_224", 32, rel_pos_bias=b, **sizes).eval() for b in (False, True)
    )
    missing = biased.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"model.blocks.{block}.attn.relative_position_bias_table" for block in range(2)]
    for size in ((32, 32), (48, 80)):
        for a, b in zip(run(plain, make_images(2, *size)), run(biased, make_images(2, *size)), strict=True):
            torch.testing.assert_close(a, b)


def test_the_bias_is_trained(make_anchor: MakeAnchor, make_images: MakeImages) -> None:
    anchor = make_anchor(rel_pos_bias=True, window_size=1, global_blocks=(1,))
    run(anchor, make_images(2, 32, 32))[-1].square().sum().backward()
    for block in anchor.model.blocks:
        table = block.attn.relative_position_bias_table
        assert table.grad is not None and (table.grad != 0).any(dim=1).float().mean() > 0.6
    assert anchor.model.blocks[0].attn.bias_grid == (1, 1)


@torch.no_grad()
def test_a_bias_that_falls_with_the_distance_does_so_at_every_size() -> None:
    """A table that is linear in the offset stays linear when it is resized, its ends and centre included."""
    rows = torch.arange(-3.0, 4).reshape(7, 1).expand(7, 5).reshape(35, 1)
    prefix = torch.tensor([[10.0], [11.0], [12.0]])
    resized = resize_table(torch.cat([rows, prefix]), (4, 3), (7, 3))
    assert resized.shape == (table_rows((7, 3), 1), 1)
    offsets = resized[:-3].reshape(13, 5)
    torch.testing.assert_close(offsets[[0, 6, 12]], torch.tensor([-3.0, 0, 3]).reshape(3, 1).expand(3, 5))
    assert (offsets.diff(dim=0) > 0).all() and torch.equal(resized[-3:], prefix)


@torch.no_grad()
def test_another_input_size_runs_with_the_resized_table(make_anchor: MakeAnchor, make_images: MakeImages) -> None:
    anchor, images = make_anchor(depth=1, img_size=32, rel_pos_bias=True), make_images(2, 48, 80)
    block = anchor.model.blocks[0]
    table = resize_table(block.attn.relative_position_bias_table, (2, 2), (3, 5))
    bias = table[position_index((3, 5), 1, CPU)].permute(2, 0, 1)
    tokens = anchor.stem(images).data
    tokens = tokens + block.ls1(attend(block, tokens, bias))
    expected = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    torch.testing.assert_close(run(anchor, images)[0], expected)


@pytest.mark.parametrize("window_size", [None, 2])
def test_autocast_with_a_bias(window_size: int | None, make_anchor: MakeAnchor, make_images: MakeImages) -> None:
    anchor, images = (
        make_anchor(rel_pos_bias=True, window_size=window_size, global_blocks=window_size and ()),
        make_images(2, 48, 48),
    )
    exact = run(anchor, images)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(anchor, images)[-1]
    rough.float().square().sum().backward()
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1 * exact.detach().abs().max().item())


# Windows


# With a bias, only at the size that the table is stored for: at others the plain anchor's is resized.
@pytest.mark.parametrize(
    ("size", "rel_pos_bias"), [((64, 64), False), ((64, 64), True), ((48, 64), False), ((16, 33), False)]
)
@pytest.mark.parametrize(
    "model", ["deit3_small_patch16_224", "vit_base_patch16_gap_224", "vit_little_patch16_reg4_gap_256"]
)
@torch.no_grad()
def test_one_window_over_the_image_is_plain_attention(
    model: str, size: tuple[int, int], rel_pos_bias: bool, make_anchor: MakeAnchor, make_images: MakeImages
) -> None:
    windowed = make_anchor(
        depth=3, model=model, img_size=64, window_size=4, global_blocks=(1,), rel_pos_bias=rel_pos_bias
    )
    plain = make_anchor(depth=3, model=model, img_size=64, rel_pos_bias=rel_pos_bias)
    plain.load_state_dict(windowed.state_dict())
    assert (windows(windowed), windows(plain)) == ((4, 0, 4), (0, 0, 0))
    for a, b in zip(run(windowed, make_images(2, *size)), run(plain, make_images(2, *size)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rel_pos_bias", [False, True])
@pytest.mark.parametrize("size", [(64, 32), (48, 80)])
@torch.no_grad()
def test_windows_are_images_of_their_own(
    size: tuple[int, int], rel_pos_bias: bool, make_anchor: MakeAnchor, make_images: MakeImages
) -> None:
    """Each window attends only to its patches and its copy of the class token; cut out by hand."""
    anchor = make_anchor(depth=1, img_size=64, window_size=2, global_blocks=(), rel_pos_bias=rel_pos_bias)
    images, block = make_images(2, *size), anchor.model.blocks[0]
    grid = anchor.grid(size)
    tokens = anchor.stem(images).data
    (left,) = run(anchor, images)
    patches = tokens[:, 1:].unflatten(1, grid)
    actual = left[:, 1:].unflatten(1, grid)
    class_tokens = []
    for top in range(0, grid[0], 2):
        for start in range(0, grid[1], 2):
            window = patches[:, top : top + 2, start : start + 2]
            cut = torch.cat([tokens[:, :1], window.flatten(1, 2)], dim=1)
            bias: Tensor | float = 0.0
            if rel_pos_bias:
                inside = [0, *(1 + 2 * y + x for y in range(window.shape[1]) for x in range(window.shape[2]))]
                bias = block.attn.relative_position_bias_table[position_index((2, 2), 1, CPU)].permute(2, 0, 1)
                bias = bias[:, inside][:, :, inside]
            cut = cut + block.ls1(attend(block, cut, bias))
            cut = cut + block.ls2(block.mlp(block.norm2(cut)))
            torch.testing.assert_close(actual[:, top : top + 2, start : start + 2].flatten(1, 2), cut[:, 1:])
            class_tokens.append(cut[:, 0])
    torch.testing.assert_close(left[:, 0], torch.stack(class_tokens).mean(0))


def test_tokens_are_rearranged_only_where_windows_change(
    make_anchor: MakeAnchor, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmsnnet.stitching import StitchedNetwork, StitchSpace, features

    calls = []
    for name in ("to_windows", "from_windows"):
        original = getattr(features, name)
        monkeypatch.setattr(features, name, lambda *args, n=name, f=original: calls.append(n) or f(*args))
    pair = [
        make_anchor(depth, width, img_size=64, window_size=2, global_blocks=(depth - 1,))
        for depth, width in ((4, 32), (8, 48))
    ]
    assert windows(pair[0]) == (2, 2, 2, 0) and windows(pair[1]) == (2,) * 7 + (0,)
    network = StitchedNetwork(pair, StitchSpace.two_way((4, 8)), rank=2).eval()
    for stitch in network.space:
        calls.clear()
        network(make_images(1, 64, 64), stitch, (7,))
        assert calls == ["to_windows", "from_windows"], str(stitch)


@pytest.mark.parametrize(
    ("depth", "settings", "expected"),
    [
        (12, dict(window_size=14), [2, 5, 8, 11]),
        (24, dict(window_size=14), [5, 11, 17, 23]),
        (6, dict(window_size=3), [0, 2, 3, 5]),
        (4, dict(window_size=3, global_blocks=(3,)), [3]),
        (4, dict(window_size=3, global_blocks=()), []),
    ],
)
def test_which_blocks_are_global(depth: int, settings: dict, expected: list[int], make_anchor: MakeAnchor) -> None:
    anchor = make_anchor(depth, **settings)
    assert [block for block in range(depth) if windows(anchor)[block] == 0] == expected
    assert set(windows(anchor)) <= {0, settings["window_size"]}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(window_size=0), "at least 1; got 0"),
        (dict(global_blocks=(1,)), "needs window_size"),
        (dict(window_size=2, global_blocks=(2,)), r"0 to 1; got \[2\]"),
        (dict(window_size=2, attn_layer="gated"), "attn_layer"),
        (dict(rel_pos_bias=True, attn_layer="gated"), "attn_layer"),
    ],
)
def test_wrong_settings(settings: dict, says: str, make_anchor: MakeAnchor) -> None:
    with pytest.raises(ValueError, match=says):
        make_anchor(**settings)


def test_an_export_leaves_no_tensors_without_values_behind(make_anchor: Callable[..., Anchor]) -> None:
    """The first run of these sizes is the export's: what later runs read from caches must have values."""
    settings = dict(depth=2, rel_pos_bias=True, window_size=3, global_blocks=(1,))
    anchor, images = make_anchor(img_size=64, patch_size=8, **settings), torch.randn(2, 3, 40, 56)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = anchor

        def forward(self, images: Tensor) -> Tensor:
            *_, (_, features) = self.anchor.run(self.anchor.stem(images))
            return features.data

    exported = torch.export.export(Blocks(), (images,)).module()(images)
    later = Blocks()(images)
    assert type(later) is Tensor
    torch.testing.assert_close(exported, later)
