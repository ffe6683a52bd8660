"""Backbones of hierarchical anchors: stages as taps, channels of each map, shared prefixes, one stitch alone, and
training that is the same recomputed, resumed and compiled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from mmsnnet.apis.model import check_channels
from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedBackbone
from mmsnnet.registry import MODELS
from mmsnnet.stitching.anchors.base import STEM

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = dict(
    swin=(
        dict(
            model="swin_tiny_patch4_window7_224",
            embed_dim=16,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8),
            drop_path_rate=0.0,
        ),
        dict(
            model="swin_tiny_patch4_window7_224",
            embed_dim=24,
            depths=(2, 2, 3, 2),
            num_heads=(1, 2, 4, 8),
            drop_path_rate=0.0,
        ),
    ),
    resnet=(
        dict(model="resnet18", layers=(1, 1, 2, 1), channels=(16, 24, 32, 40)),
        dict(model="resnet18", layers=(2, 2, 3, 2), channels=(24, 48, 96, 192)),
    ),
    resnet_swin=(
        dict(model="resnet18", layers=(1, 1, 2, 1), channels=(16, 24, 32, 40)),
        dict(
            model="swin_tiny_patch4_window7_224",
            embed_dim=24,
            depths=(2, 2, 3, 2),
            num_heads=(1, 2, 4, 8),
            drop_path_rate=0.0,
        ),
    ),
)
CHANNELS = (24, 48, 96, 192)


def make(pair: str, img_size: Any = 64, **settings: Any) -> StitchedBackbone:
    torch.manual_seed(0)
    anchors = [dict(anchor) for anchor in PAIRS[pair]]
    backbone = MODELS.build(
        dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=img_size, rank=2, flops_step=1e5, **settings)
    )
    for layer in backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
        if layer.rank:
            nn.init.normal_(layer.lora_B)
    return backbone.eval()


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_maps_are_those_of_stages_in_the_widths_of_the_largest_anchor(pair: str) -> None:
    backbone = make(pair, (64, 96))
    assert backbone.channels == CHANNELS and backbone.out_indices == (1, 3, 6, 8)
    x = torch.randn(2, 3, 64, 96)
    for stitch in backbone.space:
        backbone.set_stitch(stitch)
        maps = backbone(x)
        assert [tuple(m.shape) for m in maps] == [(2, c, 16 >> i, 24 >> i) for i, c in enumerate(CHANNELS)]
        assert maps.class_tokens is None and all(m.is_contiguous() for m in maps)
    assert [m.shape for m in backbone.zeros(x)] == [m.shape for m in maps]
    costs = backbone.costs()
    assert costs[0].flops < costs[1].flops and len(costs) == len(backbone.space)


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_shared_prefixes_change_nothing(pair: str) -> None:
    assert_shared_prefixes_change_nothing(make(pair, out_indices=(1, 3)))


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_shared_prefixes_change_no_logits(pair: str) -> None:
    """Where crossings share a layer, too."""
    backbone = make(pair, scheme="sliding_window", num_classes=5)
    assert len(backbone.space.layers) < len(backbone.space) - 2
    assert_shared_prefixes_change_nothing(backbone)


def assert_shared_prefixes_change_nothing(backbone: StitchedBackbone) -> None:
    x = torch.randn(2, 3, 64, 64)
    order, alone = backbone.prefix_order(backbone.space), {}
    for stitch in order:
        backbone.set_stitch(stitch)
        alone[stitch.id] = backbone(x)
    with backbone.reuse_prefixes(order):
        for stitch in order:
            backbone.set_stitch(stitch)
            assert all(map(torch.equal, backbone(x), alone[stitch.id]))


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_one_stitch_alone_gives_the_same_logits(pair: str) -> None:
    settings = dict(scheme="sliding_window", num_classes=5)
    backbone, x = make(pair, **settings), torch.randn(2, 3, 64, 64)
    weights = backbone.state_dict()
    for stitch in backbone.space.stitches[::2]:
        backbone.set_stitch(stitch)
        alone = make(pair, only=stitch.name, **settings)
        alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
        assert len(alone.state_dict()) < len(weights) and torch.equal(alone(x), backbone(x))


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_one_stitch_alone_is_that_of_the_whole(pair: str) -> None:
    backbone, x = make(pair, out_indices=dict(train=(2, 3), test=(3,))), torch.randn(2, 3, 64, 64)
    for stitch in backbone.space.stitches[2::5]:
        backbone.set_stitch(stitch)
        alone = make(pair, out_indices=dict(train=(2, 3), test=(3,)), only=stitch.name)
        weights = backbone.state_dict()
        alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
        skipped, expected = backbone(x)
        assert skipped is None and torch.equal(alone(x)[1], expected)
    assert backbone.taps.as_setting(backbone.taps.places) == (2, 3)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_training_step_reaches_what_the_drawn_stitch_uses(pair: str) -> None:
    backbone = make(pair).train()
    sum(one.square().mean() for one in backbone(torch.randn(2, 3, 64, 64))).backward()
    reached = {p for p in backbone.parameters() if p.grad is not None}
    used = set(backbone.trained_parameters(backbone.drawn))
    # The bias of a convolution before a batch norm has a gradient, too, of zero.
    assert reached == used


class Model(BaseModel):
    """A backbone whose maps are pushed towards zero."""

    def __init__(self, backbone: StitchedBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: list[Tensor], mode: str = "loss") -> dict[str, Tensor]:
        return dict(loss=sum(one.square().mean() for one in self.backbone(torch.stack(inputs))))


def train(backbone: StitchedBackbone, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """The state dict after four iterations of three stitches each, with a checkpoint after every second one."""
    generator = torch.Generator().manual_seed(0)
    runner = Runner(
        Model(backbone),
        str(folder),
        train_dataloader=dict(
            batch_size=2,
            dataset=[dict(inputs=torch.randn(3, 64, 64, generator=generator)) for _ in range(8)],
            sampler=dict(type="InfiniteSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=4, stitches_per_step=3),
        optim_wrapper=dict(
            type="OptimWrapper",
            optimizer=dict(type="AdamW", lr=1e-3),
            constructor="mmsnnet.StitchOptimWrapperConstructor",
        ),
        default_hooks=dict(checkpoint=dict(type="mmsnnet.AtomicCheckpointHook", interval=2, by_epoch=False)),
        experiment_name=folder.name,
        default_scope="mmengine",
        log_level="ERROR",
        **settings,
    )
    runner.train()
    return runner.model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_training_is_the_same_recomputed_and_resumed(pair: str, tmp_path: Path) -> None:
    """To the bit, with the statistics of batch norms and with several stitches a step."""
    start = {name: value.clone() for name, value in make(pair).state_dict().items()}
    whole = train(make(pair), tmp_path / "whole")
    recomputed = train(make(pair, with_cp=True), tmp_path / "recomputed")
    resumed = train(make(pair), tmp_path / "resumed", load_from=str(tmp_path / "whole/iter_2.pth"), resume=True)
    assert int(whole["backbone.draws"]) == 12
    for other in (recomputed, resumed):
        assert other.keys() == whole.keys() and all(torch.equal(other[name], value) for name, value in whole.items())
    moved = {name for name, value in start.items() if not torch.equal(whole[f"backbone.{name}"], value)}
    assert any("downsample" in name for name in moved)
    assert pair == "swin" or any("running_var" in name for name in moved)


@pytest.fixture
def own_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("with_cp", [False, True], ids=["", "with_cp"])
@pytest.mark.parametrize("pair", ["swin", "resnet"])
def test_compiled_blocks_train_the_same(pair: str, with_cp: bool, own_compiler: None) -> None:
    plain = make(pair, with_cp=with_cp).train()
    compiled = make(pair, with_cp=with_cp, compile=dict(backend="eager")).train()
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        x = torch.randn(2, 3, 64, 64)
        for backbone in (plain, compiled):
            backbone.zero_grad()
            sum(one.square().mean() for one in backbone(x)).backward()
        assert compiled.drawn == plain.drawn
        for found, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
            assert (found.grad is None) == (expected.grad is None)
            assert found.grad is None or torch.equal(found.grad, expected.grad)
    assert all(map(torch.equal, compiled.buffers(), plain.buffers()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_sizes_at_which_two_classes_round_differently_are_refused() -> None:
    small, large = PAIRS["resnet"][0], dict(model="convnext_tiny", dims=CHANNELS, depths=(2, 2, 3, 2))
    backbone = MODELS.build(dict(type="mmsnnet.StitchedViT", anchors=[small, large], img_size=64)).eval()
    for layer in backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
    with torch.no_grad():
        assert [m.shape[-1] for m in backbone(torch.zeros(1, 3, 64, 96))] == [24, 12, 6, 3]
        with pytest.raises(
            SettingError, match=r"images of 64 x 90: what leaves block 0 of anchor 0.* are maps of 16 x 23 and 16 x 22"
        ):
            backbone(torch.zeros(1, 3, 64, 90))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(out_indices=(4,)), r"out_indices are stages of the largest anchor, 0 to 3; got \[4\]"),
        (dict(out_indices=()), "at least one stage"),
        (dict(frozen_stages=5), "frozen_stages is -1 to 4, a number of the largest anchor's stages; got 5"),
        (dict(norm_taps=True, num_classes=5), "gives logits instead of maps: leave out norm_taps"),
        (dict(scheme="one_way", skip_stages=(1,)), "only scheme='sliding_window' skips stages"),
        (dict(anchors=[PAIRS["swin"][0], dict(model="vit_tiny_patch16_224", depth=12)]), "stages do not correspond"),
        (dict(anchors=[PAIRS["swin"][0], dict(PAIRS["swin"][1], patch_size=8)]), "agree in strides"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MODELS.build(dict(type="mmsnnet.StitchedViT", anchors=list(PAIRS["swin"]), img_size=64) | settings)


@pytest.mark.parametrize(
    ("reader", "setting", "fits"),
    [
        ("decode_head", dict(in_channels=list(CHANNELS), in_index=[0, 1, 2, 3]), True),
        ("decode_head", dict(in_channels=192, in_index=3), True),
        ("decode_head", dict(in_channels=192), True),
        ("decode_head", dict(in_channels=list(CHANNELS)), True),
        ("decode_head", dict(in_channels=96), False),
        ("decode_head", dict(in_channels=[16, 48, 96, 192], in_index=[0, 1, 2, 3]), False),
        ("decode_head", dict(in_channels=192, in_index=4), False),
        ("auxiliary_head", dict(in_channels=96, in_index=2), True),
        ("auxiliary_head", dict(in_channels=192, in_index=2), False),
        ("neck", dict(in_channels=list(CHANNELS)), True),
        ("neck", dict(in_channels=list(CHANNELS[1:])), False),
        ("neck", dict(in_channels=192), False),
    ],
)
def test_heads_and_necks_are_compared_with_the_channels_of_their_maps(
    reader: str, setting: dict[str, Any], fits: bool
) -> None:
    config = Config(dict(model={reader: setting}))
    if fits:
        check_channels(config, make("swin"))
    else:
        with pytest.raises(ValueError, match=rf"model\.{reader}\.in_channels is .* have 24, 48, 96, 192 channels"):
            check_channels(config, make("swin"))


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_norms_of_taps_normalise_the_channels_of_every_route(pair: str) -> None:
    indices = dict(train=(0, 2, 3), test=(2, 3))
    backbone, raw = make(pair, out_indices=indices, norm_taps=True), make(pair, out_indices=indices)
    weights = raw.state_dict()
    assert backbone.state_dict().keys() - weights.keys() == {
        f"tap_norms.{stage}.{name}" for stage in (0, 2, 3) for name in ("weight", "bias")
    }
    backbone.load_state_dict(weights, strict=False)
    for norm in backbone.tap_norms.values():
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 64, 64)
    for stitch in backbone.space:
        for one in (backbone, raw):
            one.set_stitch(stitch)
        skipped, *maps = backbone(x)
        assert skipped is None and all(m.is_contiguous() for m in maps)
        for stage, normed, m in zip((2, 3), maps, raw(x)[1:], strict=True):
            norm = backbone.tap_norms[str(stage)]
            centred = m - m.mean(1, keepdim=True)
            scaled = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
            expected = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
            assert torch.allclose(normed, expected, atol=1e-4)


@pytest.mark.parametrize("pair", PAIRS)
def test_norms_of_taps_are_counted_trained_and_extracted(pair: str) -> None:
    indices = dict(train=(1, 2, 3), test=(1, 3))
    backbone, raw = make(pair, out_indices=indices, norm_taps=True), make(pair, out_indices=indices)
    places = {1: 48 * 8 * 8, 2: 96 * 4 * 4, 3: 192 * 2 * 2}  # fvcore counts 5 operations a value
    for costs, bare, stages in (
        (backbone.costs(), raw.costs(), (1, 3)),
        (backbone.training_costs(), raw.training_costs(), (1, 2, 3)),
    ):
        for id_, cost in costs.items():
            assert cost.flops - bare[id_].flops == 5 * sum(places[stage] for stage in stages)
            assert cost.params - bare[id_].params == 2 * sum(CHANNELS[stage] for stage in stages)
    backbone.train()
    sum((one * torch.randn_like(one)).sum() for one in backbone(torch.randn(2, 3, 64, 64))).backward()
    reached = {parameter for parameter in backbone.parameters() if parameter.grad is not None}
    assert reached == set(backbone.trained_parameters(backbone.drawn)) >= set(backbone.tap_norms.parameters())

    chosen = backbone.eval().space.stitches[2]
    backbone.set_stitch(chosen)
    alone = make(pair, out_indices=(1, None, 3), norm_taps=True, only=chosen.name)
    weights = backbone.state_dict()
    alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), backbone.reuse_prefixes([chosen]):
        for one, expected in zip(alone(x), backbone(x), strict=True):
            assert one is expected is None or torch.equal(one, expected)


@pytest.mark.parametrize(("frozen", "blocks"), [(-1, (0, 0)), (0, (0, 0)), (1, (1, 2)), (2, (2, 4)), (4, (5, 9))])
@pytest.mark.parametrize("pair", PAIRS)
def test_frozen_stages_are_whole_stages_of_each_anchor(pair: str, frozen: int, blocks: tuple[int, int]) -> None:
    backbone = make(pair, frozen_stages=frozen)
    for index, first in enumerate(blocks):
        anchor = backbone.network.anchor(index)
        trained = {c for c in anchor.components if any(p.requires_grad for p in anchor.parameters_of(c))}
        assert (STEM in trained) == (frozen < 0)
        assert {c.block for c in trained if c.role == "block"} == set(range(first, anchor.depth))


def test_batch_norms_in_evaluation_mode_keep_their_statistics_and_train_their_weights() -> None:
    backbone = make("resnet", norm_eval=True, frozen_stages=1).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert any(norm.weight.requires_grad for norm in norms) and not all(norm.weight.requires_grad for norm in norms)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    x = torch.randn(2, 3, 64, 64)
    maps = backbone(x)
    sum(one.square().mean() for one in maps).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    assert any(norm.weight.grad is not None for norm in norms)
    stitch = backbone.drawn
    backbone.eval().set_stitch(stitch)
    with torch.no_grad():
        assert all(map(torch.equal, maps, backbone(x)))  # no other layer of a ResNet depends on the mode
    without = make("resnet").train()
    assert all(module.training for module in without.modules())


def test_a_whole_anchor_alone_keeps_nothing_of_the_other() -> None:
    """Batch norms of a dropped stem have buffers, which no device could take."""
    backbone = make("resnet", only="S")
    assert not any(tensor.is_meta for tensor in (*backbone.parameters(), *backbone.buffers()))
    assert not any(name.startswith("network.anchors.1") for name in backbone.state_dict())
    assert all(one.isfinite().all() for one in backbone.to("cpu").eval()(torch.zeros(1, 3, 64, 64)))
