"""The simple feature pyramid: its levels by hand, by a formula of its own, and what it refuses."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmsnnet.models import SimpleFeaturePyramid


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Of each position over its channels."""
    mean = x.mean(1, keepdim=True)
    spread = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / (spread + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def deconvolve(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """Each position becomes a square of two by two."""
    squares = torch.einsum("bchw,coij->bohiwj", x, layer.weight)
    return squares.flatten(4, 5).flatten(2, 3) + layer.bias[:, None, None]


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """A sum over the shifted copies of a map that is padded with zeros."""
    margin, (height, width) = weight.shape[-1] // 2, x.shape[-2:]
    padded = F.pad(x, (margin,) * 4)
    return sum(
        torch.einsum("bchw,oc->bohw", padded[..., i : i + height, j : j + width], weight[..., i, j])
        for i in range(weight.shape[-1])
        for j in range(weight.shape[-1])
    )


def halve(x: Tensor) -> Tensor:
    """The largest of each square of two by two, or of what there is of it."""
    height, width = x.shape[-2:]
    rows = [[x[..., i : i + 2, j : j + 2].amax((-2, -1)) for j in range(0, width, 2)] for i in range(0, height, 2)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def test_levels_follow_the_paper(randomise: Callable[[nn.Module], None]) -> None:
    neck = SimpleFeaturePyramid(8, 6).double()
    randomise(neck)
    x = torch.randn(2, 8, 3, 4, dtype=torch.double)
    four, two = neck.levels[:2]
    between = layer_norm(deconvolve(x, four[0]), four[1])
    gelu = between * 0.5 * (1 + torch.erf(between / math.sqrt(2)))
    resized = [
        deconvolve(gelu, four[3]),
        deconvolve(x, two[0]),
        x,
        halve(x),
    ]
    expected = []
    for maps, level in zip(resized, neck.levels, strict=True):
        *_, conv1, norm1, conv3, norm3 = level
        assert (conv1.kernel_size, conv3.kernel_size) == ((1, 1), (3, 3))
        expected.append(layer_norm(convolve(layer_norm(convolve(maps, conv1.weight), norm1), conv3.weight), norm3))
    expected.append(expected[-1][..., ::2, ::2])
    found = neck((x,))
    assert [level.shape[1:] for level in found] == [(6, 12, 16), (6, 6, 8), (6, 3, 4), (6, 2, 2), (6, 1, 1)]
    for level, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(level, wanted)


@pytest.mark.parametrize("scale", [1, 0.5])
def test_small_numbers(scale: float) -> None:
    """One position of two channels: norms make them 1 and -1, the last norm's weights 2, 3 and biases 10, 20 do the
    rest. Of the square, max pooling keeps 5 and 4; the mean would be 2 and 4, and the signs the other way."""
    neck = SimpleFeaturePyramid(2, 2, scales=(scale,), num_outs=1)
    *_, conv1, _, conv3, norm = neck.levels[0]
    with torch.no_grad():
        conv1.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        conv3.weight.zero_()
        conv3.weight[:, :, 1, 1] = torch.eye(2)
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([10.0, 20.0]))
    square = torch.tensor([[[0.0, 1.0], [2.0, 5.0]], [[4.0, 4.0], [4.0, 4.0]]])
    image = square if scale == 0.5 else square[:, 1:, 1:]
    (level,) = neck((image[None],))
    torch.testing.assert_close(level, torch.tensor([12.0, 17.0]).view(1, 2, 1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (7, 2), (1, 1)])
def test_sizes_that_do_not_divide_are_rounded_up(size: tuple[int, int]) -> None:
    levels = SimpleFeaturePyramid(8, 4)((torch.zeros(1, 8, *size),))
    strides = (4, 8, 16, 32, 64)
    assert [tuple(level.shape[-2:]) for level in levels] == [
        tuple(math.ceil(side * 16 / stride) for side in size) for stride in strides
    ]


def test_levels_of_a_one_stage_head() -> None:
    levels = SimpleFeaturePyramid(8, 4, scales=(2, 1, 0.5), num_outs=4)((torch.zeros(1, 8, 4, 4),))
    assert [tuple(level.shape) for level in levels] == [(1, 4, 8, 8), (1, 4, 4, 4), (1, 4, 2, 2), (1, 4, 1, 1)]


def test_gradients_reach_every_parameter_and_the_map(randomise: Callable[[nn.Module], None]) -> None:
    neck = SimpleFeaturePyramid(8, 4)
    randomise(neck)
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    sum(level.square().sum() for level in neck((x,))).backward()
    assert x.grad is not None and x.grad.abs().amin() > 0
    assert [name for name, p in neck.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_of_several_maps_the_last_is_read() -> None:
    """Whatever the others are: a backbone with taps for another head serves as it is."""
    neck = SimpleFeaturePyramid(8, 4)
    others, last = [torch.randn(1, 6, 4, 4), torch.randn(1, 8, 4, 4)], torch.randn(1, 8, 4, 4)
    for level, wanted in zip(neck((*others, last)), neck((last,)), strict=True):
        assert torch.equal(level, wanted)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="num_outs"):
        SimpleFeaturePyramid(8, num_outs=3)
    with pytest.raises(ValueError, match=r"4, 2, 1 or 0\.5; got 3"):
        SimpleFeaturePyramid(8, scales=(3,))


def test_it_is_found_from_any_scope() -> None:
    neck = MODELS.build(dict(type="mmsnnet.SimpleFeaturePyramid", in_channels=8))
    assert isinstance(neck, SimpleFeaturePyramid)
    norm = MODELS.build(dict(type="mmsnnet.LayerNorm2d", num_channels=8))
    assert isinstance(norm, nn.LayerNorm) and norm(torch.randn(1, 8, 2, 3)).shape == (1, 8, 2, 3)
