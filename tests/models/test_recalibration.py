"""Statistics of batch norms for one stitch: those of torch's own training mode, and nothing else changes."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsnnet.errors import SettingError
from mmsnnet.models.recalibration import batch_norms, norm_statistics, recalibrate
from mmsnnet.registry import MODELS
from tests.models.test_staged_backbone import PAIRS

SIZE = 64


def make(pair: str = "resnet", **settings: Any) -> Any:
    """A classifier in evaluation mode, with statistics that differ from their start, under dropout and drop path."""
    torch.manual_seed(0)
    anchors = [dict(anchor, drop_rate=0.5, drop_path_rate=0.5) for anchor in PAIRS[pair]]
    backbone = dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=SIZE, rank=2, flops_step=1e5, **settings)
    model = MODELS.build(dict(type="mmsnnet.StitchedClassifier", backbone=backbone, num_classes=4))
    for layer in model.backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
        nn.init.normal_(layer.lora_B, std=0.1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.eval()


def make_batches(number: int, size: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [dict(inputs=torch.randn(size, 3, SIZE, SIZE, generator=generator) + index) for index in range(number)]


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def by_name(model: nn.Module, statistics: Mapping[_BatchNorm, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, ...]]:
    return {name: statistics[norm] for name, norm in norms_of(model).items() if norm in statistics}


def equal(one: dict[str, tuple[Tensor, ...]], other: dict[str, tuple[Tensor, ...]]) -> bool:
    return one.keys() == other.keys() and all(all(map(torch.equal, one[name], other[name])) for name in one)


@torch.no_grad()
def trained_norms(model: nn.Module, stitch: Any, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of all that enters each batch norm, where those alone are in torch's training mode."""
    model = copy.deepcopy(model)
    model.backbone.set_stitch(stitch)
    entered: dict[str, list[Tensor]] = {}
    for name, norm in norms_of(model).items():
        norm.train()
        norm.register_forward_pre_hook(lambda _, args, name=name: entered.setdefault(name, []).append(args[0]))
    for batch in batches:
        model(**batch)
    rows = {name: torch.cat([x.double().transpose(0, 1).flatten(1) for x in xs], 1) for name, xs in entered.items()}
    return {name: (row.mean(1), row.var(1)) for name, row in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["resnet", "resnet_swin"])
@pytest.mark.parametrize("number", [1, 3])
def test_statistics_are_those_of_all_that_enters_a_norm_in_training_mode(pair: str, number: int) -> None:
    model, batches = make(pair), make_batches(number)
    stitches = [stitch for stitch in model.backbone.space if stitch.name != "L" or pair == "resnet"][::3]
    found = recalibrate(model, stitches, batches)
    assert list(found) == stitches
    for stitch in stitches:
        own, expected = by_name(model, found[stitch]), trained_norms(model, stitch, batches)
        assert own.keys() == expected.keys()  # the norms on the route, and no other
        for name in own:
            for value, wanted in zip(own[name], expected[name], strict=True):
                torch.testing.assert_close(value, wanted.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_batch_gives_what_torch_updates() -> None:
    """With ``momentum=1`` torch's update forgets what was before."""
    model, [batch] = make(), make_batches(1)
    stitch = model.backbone.space.stitches[-1]
    trained = copy.deepcopy(model)
    trained.backbone.set_stitch(stitch)
    for norm in norms_of(trained).values():
        norm.train().momentum = 1.0
    trained(**batch)
    for name, (mean, variance) in by_name(model, recalibrate(model, [stitch], [batch])[stitch]).items():
        norm = norms_of(trained)[name]
        torch.testing.assert_close(mean, norm.running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(variance, norm.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["resnet", "resnet_swin"])
def test_shared_prefixes_change_no_bit(pair: str) -> None:
    model, batches = make(pair), make_batches(2)
    stitches = model.backbone.space.stitches
    shared, apart = recalibrate(model, stitches, batches), recalibrate(model, stitches, batches, prefix_reuse=False)
    for stitch in stitches:
        assert equal(by_name(model, shared[stitch]), by_name(model, apart[stitch]))
    some = stitches[3:5]
    alone = [recalibrate(model, [stitch], batches)[stitch] for stitch in some]
    for stitch, statistics in zip(some, alone, strict=True):
        assert equal(by_name(model, shared[stitch]), by_name(model, statistics))
    different = [norm for norm in shared[stitches[0]] if norm in shared[stitches[-1]]]
    assert pair != "resnet" or not equal(
        *(by_name(model, {n: shared[s][n] for n in different}) for s in stitches[::21])
    )


@pytest.mark.slow
@torch.no_grad()
def test_stitches_with_their_own_statistics_share_prefixes() -> None:
    """The statistics of a norm depend on the route up to it alone, so cached features serve all stitches."""
    model, batches = make(), make_batches(2)
    backbone, images = model.backbone, torch.randn(2, 3, SIZE, SIZE)
    order = backbone.prefix_order(backbone.space)
    found, alone, shared = recalibrate(model, order, batches), {}, {}
    for stitch in order:
        backbone.set_stitch(stitch)
        with norm_statistics(found[stitch]):
            alone[stitch] = model(images)
    with backbone.reuse_prefixes(order):
        for stitch in order:
            backbone.set_stitch(stitch)
            with norm_statistics(found[stitch]):
                shared[stitch] = model(images)
    assert all(torch.equal(alone[stitch], shared[stitch]) for stitch in order)
    backbone.set_stitch(order[5])
    assert not torch.equal(model(images), alone[order[5]])


def test_the_model_stays_as_it_is() -> None:
    model = make().train()
    model.backbone.network.anchor(0).freeze()
    backbone, stitch = model.backbone, model.backbone.stitch
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = recalibrate(model, backbone.space.stitches[:4], make_batches(2))
    assert set(norms_of(backbone.network.anchor(0)).values()) <= set(found[backbone.space["S"]])  # frozen ones, too
    with norm_statistics(found[backbone.space["S"]]):
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"{name}.{part}"
        for name in by_name(model, found[backbone.space["S"]])
        for part in ("running_mean", "running_var")
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes and backbone.stitch is stitch
    assert not any(norm._forward_pre_hooks for norm in batch_norms(model))
    assert torch.equal(torch.get_rng_state(), random)  # neither dropout nor stochastic depth has drawn

    def fail() -> Any:
        yield from make_batches(1)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        recalibrate(model, backbone.space.stitches[:4], fail())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(norm._forward_pre_hooks for norm in batch_norms(model)) and backbone.stitch is stitch


def test_synchronised_norms_need_no_other_rank() -> None:
    model, batches = make(), make_batches(2)
    stitches = model.backbone.space.stitches[::7]
    expected = [by_name(model, one) for one in recalibrate(model, stitches, batches).values()]
    model = convert_sync_batchnorm(model).eval()
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(model))
    assert all(map(equal, expected, [by_name(model, one) for one in recalibrate(model, stitches, batches).values()]))


class Pyramid(nn.Module):
    """A model whose head runs one norm on several maps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.norm = model.backbone, nn.BatchNorm2d(1)
        self.entered: list[Tensor] = []

    def forward(self, inputs: Tensor, mode: str) -> None:
        logits = self.backbone(inputs)
        for size in (1, 2):  # of one channel: (B, 1, 2, 2) and (B, 1, 1, 2)
            self.entered.append(logits[:, None, : 4 // size].reshape(len(inputs), 1, -1, 2) * size)
            self.norm(self.entered[-1])


def test_a_norm_that_runs_on_several_maps_has_the_statistics_of_all() -> None:
    model = Pyramid(make()).eval()
    first, second = model.backbone.space.stitches[:2]
    found = recalibrate(model, [first, second], make_batches(2))
    order = model.backbone.prefix_order([first, second])
    for place, stitch in enumerate(order):  # of each of two batches, the order has each stitch once, with two maps
        entered = [model.entered[2 * call + level].flatten() for call in (place, 2 + place) for level in (0, 1)]
        values = torch.cat(entered).double()
        mean, variance = found[stitch][model.norm]
        torch.testing.assert_close(mean, values.mean()[None].float())
        torch.testing.assert_close(variance, values.var()[None].float())


def test_what_cannot_be_recalibrated() -> None:
    model = make("swin")
    with pytest.raises(SettingError, match="no BatchNorm, so there is nothing to recalibrate"):
        recalibrate(model, model.backbone.space.stitches, [])
    model = make()
    image = dict(inputs=torch.randn(1, 3, 32, 32))  # whose last maps are one pixel
    with pytest.raises(SettingError, match="one value of each channel"):
        recalibrate(model, model.backbone.space.stitches[:1], [image])
