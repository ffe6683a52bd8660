"""The stitching layer: a linear map with a low-rank update, merged without touching the original."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mmsnnet.stitching import StitchingLayer

RANKS = [0, 1, 4]


def filled(rank: int, alpha: float = 1.0) -> StitchingLayer:
    """A layer of 6 to 10 channels whose parameters are all away from zero."""
    layer = StitchingLayer(6, 10, rank, alpha)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (1, 1.0), (4, 1.0), (4, 3.0)])
def test_against_a_dense_layer(rank: int, alpha: float) -> None:
    layer = filled(rank, alpha).double()
    update = layer.lora_B @ layer.lora_A * (alpha / rank) if rank else 0.0
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (layer.weight + update).T + layer.bias)
    torch.testing.assert_close(layer.merged_weight(), layer.weight + update)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_update_starts_at_none(rank: int) -> None:
    layer = StitchingLayer(6, 10, rank)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not layer.lora_B.any() and layer.lora_A.any()
    assert layer.lora_A.shape == (rank, 6) and layer.lora_B.shape == (10, rank)
    assert layer.lora_A.abs().max() <= 6**-0.5  # Kaiming-uniform with a = sqrt(5): U(-1/sqrt(in), 1/sqrt(in))


@pytest.mark.parametrize(("rank", "trained"), [(0, {"weight", "bias"}), (4, {"bias", "lora_A", "lora_B"})])
def test_where_the_gradient_flows(rank: int, trained: set[str]) -> None:
    layer = filled(rank)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()} == trained
    assert x.grad is not None and x.grad.any()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == trained


def test_a_step_changes_the_update_but_not_the_base() -> None:
    layer = StitchingLayer(6, 10, rank=4)
    layer.set_base(torch.randn(10, 6), torch.randn(10))
    before = snapshot(layer)
    for _ in range(2):  # in the first step A has no gradient, as B is still zero
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        optimizer.zero_grad()
        layer(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
    after = snapshot(layer)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"bias", "lora_A", "lora_B"}


@pytest.mark.parametrize("rank", RANKS)
def test_merged_computes_the_same_and_leaves_the_original(rank: int) -> None:
    layer = filled(rank)
    layer.set_base(layer.weight, layer.bias)
    before = snapshot(layer)
    merged = layer.merged()
    x = torch.randn(3, 6)
    torch.testing.assert_close(merged(x), layer(x))
    assert merged.rank == 0 and set(merged.state_dict()) == {"weight", "bias"} and merged.initialized
    with torch.no_grad():
        merged.weight.zero_()
        merged.bias.zero_()
    assert same(before, snapshot(layer)) and layer.rank == rank


@pytest.mark.parametrize("rank", RANKS)
def test_state_dict_round_trip(rank: int) -> None:
    layer, other = filled(rank), filled(rank)
    assert not other.initialized
    other.load_state_dict(layer.state_dict())
    assert same(snapshot(layer), snapshot(other)) and other.initialized
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), other(x))


def test_initialized_by_set_base_or_loading_only() -> None:
    layer = StitchingLayer(6, 10, rank=4)
    assert not layer.initialized and not layer.merged().initialized
    weight, bias = torch.randn(10, 6), torch.randn(10)
    layer.set_base(weight.double(), bias.double())
    assert layer.initialized and torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
    assert layer.weight.dtype == torch.float32

    other = StitchingLayer(6, 10, rank=4)
    other.load_state_dict({"lora_A": layer.lora_A, "lora_B": layer.lora_B}, strict=False)
    assert not other.initialized
    nn.ModuleDict({"a": other}).load_state_dict({f"a.{k}": v for k, v in layer.state_dict().items()})
    assert other.initialized


def test_a_load_that_fails_does_not_initialize() -> None:
    layer = StitchingLayer(6, 10, rank=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(StitchingLayer(8, 10, rank=4).state_dict())
    assert not layer.initialized


def test_deepcopy_is_independent() -> None:
    layer = filled(4)
    layer.set_base(layer.weight, layer.bias)
    twin = copy.deepcopy(layer)
    assert same(snapshot(layer), snapshot(twin)) and twin.initialized and not twin.weight.requires_grad
    with torch.no_grad():
        twin.lora_B.zero_()
    assert layer.lora_B.all()


def test_negative_rank() -> None:
    with pytest.raises(ValueError, match="-1"):
        StitchingLayer(6, 10, rank=-1)
