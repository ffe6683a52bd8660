"""Features: conversion between layouts, maps, rows and class tokens."""

import pytest
import torch
from torch import nn

from mmsnnet.stitching import Features, Layout

GRIDS = [(4, 4), (3, 5), (1, 7)]


def make(grid: tuple[int, int], prefix: int = 2, width: int = 6) -> Features:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, prefix + grid[0] * grid[1], width, generator=generator)
    return Features(tokens, Layout(prefix, has_class_token=prefix > 0), grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("windows", [(2,), (3,), (2, 3), (3, 0, 2)])
def test_windows_and_back_changes_nothing(grid: tuple[int, int], prefix: int, windows: tuple[int, ...]) -> None:
    """A prefix token is the mean of equal copies."""
    features = make(grid, prefix)
    there = features
    for window in windows:
        there = there.to(Layout(prefix, prefix > 0, window))
        assert there.layout.window == window and there.grid == grid
        torch.testing.assert_close(there.map(), features.map(), rtol=0, atol=0)
        torch.testing.assert_close(there.rows(), features.rows())
    torch.testing.assert_close(there.to(features.layout).data, features.data)


def test_the_same_layout_costs_nothing() -> None:
    features = make((4, 4))
    assert features.to(Layout(2, True)) is features


@pytest.mark.parametrize("window", [0, 2])
def test_a_projection_is_the_layers_whatever_the_layout(window: int) -> None:
    features, layer = make((3, 5)), nn.Linear(6, 4)
    projected = features.to(Layout(2, True, window)).project(layer)
    assert projected.layout == Layout(2, True, window)
    torch.testing.assert_close(projected.rows(), layer(features.rows()))


def test_maps_and_class_tokens_by_hand() -> None:
    data = torch.arange(14.0).reshape(1, 7, 2)
    features = Features(data, Layout(prefix=1, has_class_token=True), (2, 3))
    assert features.map().tolist() == [[[[2, 4, 6], [8, 10, 12]], [[3, 5, 7], [9, 11, 13]]]]
    assert features.map().is_contiguous()
    token = features.class_token()
    assert token.tolist() == [[0, 1]]
    token.zero_()  # a head may work in place
    assert data[0, 0].tolist() == [0, 1]
    assert Features(data, Layout(prefix=1), (2, 3)).class_token() is None  # a register is no class token


def test_other_prefix_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 prefix tokens .* 1 are expected"):
        make((2, 2)).to(Layout(1, True))
