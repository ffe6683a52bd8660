"""The backbone: draws, taps, and mmengine's conventions."""

import copy
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.runner import load_checkpoint, save_checkpoint
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedBackbone, find_stitched_backbone
from mmsnnet.registry import MODELS
from mmsnnet.stitching import (
    Stitch,
    StitchedNetwork,
    StitchSampler,
    StitchSpace,
    UnknownStitchError,
    count_flops,
    flops_bins,
    spread,
)
from mmsnnet.stitching.anchors.base import STEM

Config = Callable[..., dict[str, Any]]
MakeBackbone = Callable[..., StitchedBackbone]
MakeImages = Callable[..., Tensor]
MakeSegmentor = Callable[..., Any]

DEEPER = dict(small=dict(depth=3), large=dict(depth=6), out_indices=(1, 5))
TINY = dict(model="vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2)


class Route(nn.Module):
    """One route of a network as a module."""

    def __init__(self, network: StitchedNetwork, stitch: Stitch, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.stitch, self.out_indices = network, stitch, out_indices

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images, self.stitch, self.out_indices)


def draw(backbone: StitchedBackbone, n: int) -> list[int]:
    """The ids of the stitches of ``n`` training iterations."""
    ids = []
    for _ in range(n):
        backbone.train()(torch.zeros(1, 3, 32, 32))
        ids.append(backbone.drawn.id)
    return ids


def count_calls(backbone: StitchedBackbone) -> Counter[str]:
    """Count the runs of each block and stitching layer: ``L2`` is block 2 of the large anchor."""
    calls: Counter[str] = Counter()
    parts = dict(backbone.network.layers.items())
    for index, name in enumerate("SL"):
        parts |= {f"{name}{i}": block for i, block in enumerate(backbone.network.anchor(index).model.blocks)}
    for name, module in parts.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def same_weights(module: nn.Module, expected: dict[str, Tensor]) -> bool:
    state = module.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in expected.items() if name in state)


@pytest.mark.parametrize("toolbox", ["mmseg", "mmdet"])
def test_every_toolbox_finds_it(toolbox: str, backbone_config: Config, make_images: MakeImages) -> None:
    backbone = importlib.import_module(f"{toolbox}.registry").MODELS.build(backbone_config())
    assert type(backbone) is StitchedBackbone
    assert [m.shape for m in backbone.eval()(make_images())] == [(2, 48, 2, 2)]


# Draws


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("out_indices", [(1, 5), dict(train=(1, 5), test=(1,))])
def test_training_draws_over_bins_of_the_flops_of_training(
    seed: int, out_indices: Any, make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    backbone = make_backbone(**DEEPER | dict(out_indices=out_indices, seed=seed, flops_step=1.5e5))
    images, merged = make_images(1), backbone.network.merged()
    bins = flops_bins({s.id: count_flops(Route(merged, s, (1, 5)), images) for s in backbone.space}, 1.5e5)
    assert 1 < len(bins) < len(backbone.space)
    sampler = StitchSampler(bins, seed)
    seen = set()
    for n in range(40):
        assert backbone.draws == n
        maps = backbone(images)
        assert backbone.drawn.id == sampler.draw(n)
        expected = backbone.network(images, backbone.drawn, (1, 5))
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
        seen.add(backbone.drawn.id)
    assert len(seen) > 5


def test_evaluation_mode_draws_nothing(make_backbone: MakeBackbone, make_images: MakeImages) -> None:
    backbone = make_backbone().eval()
    backbone(make_images())
    assert backbone.draws == 0 and backbone.drawn is None


@pytest.mark.slow
def test_ranks_draw_the_same(make_backbone: MakeBackbone) -> None:
    """For all weights and random states."""
    one, other = make_backbone(**DEEPER), make_backbone(**DEEPER)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    ids = draw(one, 20)
    torch.manual_seed(7)
    assert draw(other, 20) == ids
    assert draw(make_backbone(**DEEPER, seed=1), 20) != ids


def test_draws_is_neither_parameter_nor_buffer(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    draw(backbone, 3)
    state = backbone.state_dict()
    assert state["draws"].device.type == "cpu" and state["draws"].item() == 3
    tensors = {name for named in (backbone.named_parameters(), backbone.named_buffers()) for name, _ in named}
    assert state.keys() - tensors == {"draws", "network.anchors.0.grid", "network.anchors.1.grid"}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch", "mmengine"])
def test_a_resumed_backbone_goes_on_as_if_never_interrupted(
    way: str, make_segmentor: MakeSegmentor, tmp_path: Path
) -> None:
    first, second = make_segmentor(**DEEPER), make_segmentor(**DEEPER)
    expected = draw(copy.deepcopy(first.backbone), 20)
    ids = draw(first.backbone, 8)
    path = str(tmp_path / "iter_8.pth")
    if way == "torch":
        torch.save(first.backbone.state_dict(), path)
        state = torch.load(path, weights_only=True)
        second.backbone.load_state_dict(state)
        assert "draws" in state
    else:
        save_checkpoint(dict(meta={}, state_dict=first.state_dict()), path)
        load_checkpoint(second, path, map_location="cpu", strict=True)
        assert same_weights(second, first.state_dict())
    assert second.backbone.draws == 8
    assert ids + draw(second.backbone, 12) == expected


def test_weights_without_draws_leave_the_count(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    draw(backbone, 2)
    state = backbone.state_dict()
    del state["draws"]
    backbone.load_state_dict(state)
    assert backbone.draws == 2


@pytest.mark.slow
def test_a_deep_copy_counts_for_itself(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone(**DEEPER)
    draw(backbone, 3)
    twin = copy.deepcopy(backbone)
    ids = draw(twin, 4)
    assert (backbone.state_dict()["draws"], twin.state_dict()["draws"]) == (3, 7)
    assert draw(backbone, 4) == ids


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The warnings of mmengine's current logger."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize(("flops_step", "count"), [(1e15, 1), (1e4, 0)])
def test_one_bin_alone_is_warned_of(
    flops_step: float, count: int, make_backbone: MakeBackbone, warnings: list[str]
) -> None:
    draw(make_backbone(flops_step=flops_step), 3)
    assert len([message for message in warnings if "flops_step" in message]) == count


def test_one_anchor_alone_is_not_warned_of(warnings: list[str]) -> None:
    draw(StitchedBackbone([TINY], img_size=32), 2)
    assert not warnings


@pytest.mark.slow
def test_another_image_size_than_the_configured_one_is_warned_of_once(
    make_backbone: MakeBackbone, make_images: MakeImages, warnings: list[str]
) -> None:
    backbone = make_backbone()
    for _ in range(2):
        backbone(make_images(1, 32, 48))
    (message,) = warnings
    assert "32 x 48" in message and "img_size" in message and "32 x 32" in message
    make_backbone()(make_images(1, 32, 32))
    backbone.eval()(make_images(1, 64, 64))
    assert len(warnings) == 1


@pytest.mark.slow
@pytest.mark.parametrize("initialized", [False, True])
def test_layers_must_be_initialised_or_loaded_to_train(
    initialized: bool, make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    backbone, images = make_backbone(initialized=False), make_images()
    backbone.eval()(images)
    with pytest.raises(RuntimeError, match=r"mmsnnet\.StitchInitHook"):
        backbone.train()(images)
    assert backbone.draws == 0
    backbone.load_state_dict(make_backbone(initialized=initialized).state_dict())
    backbone(images)
    assert backbone.draws == 1


# Maps


@pytest.mark.parametrize("size", [32, (32, 64)])
@torch.no_grad()
def test_evaluation_mode_runs_the_active_stitch(
    size: Any, make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    backbone = make_backbone(img_size=size, out_indices=(1, 3)).eval()
    outputs = []
    for height, width in ((32, 32), (32, 64), (40, 50)):
        images = make_images(2, height, width)
        for stitch in backbone.space:
            backbone.set_stitch(stitch)
            maps = backbone(images)
            assert [m.shape for m in maps] == [(2, 48, -(-height // 16), -(-width // 16))] * 2
            for got, expected in zip(maps, backbone.network(images, stitch, (1, 3)), strict=True):
                assert torch.equal(got, expected)
            outputs.append(maps[-1])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_stitch_goes_by_id_name_or_itself(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    assert backbone.stitch.name == "L"
    for stitch in backbone.space:
        for key in (stitch.id, str(stitch.id), stitch.name, stitch):
            backbone.set_stitch("L")
            backbone.set_stitch(key)
            assert backbone.stitch == stitch
        assert make_backbone(stitch=stitch.name).stitch == stitch


@pytest.mark.parametrize(
    ("key", "says"),
    [(99, "ids run from 0 to 4.*S0-L2"), ("S9-L9", "names are like S, S0-L2"), (3, "run nothing of the larger")],
)
def test_a_wrong_stitch(key: int | str, says: str, make_backbone: MakeBackbone) -> None:
    backbone = make_backbone(stitch="S")
    with pytest.raises(UnknownStitchError, match=says):
        backbone.set_stitch(key)
    assert backbone.stitch.name == "S"
    with pytest.raises(UnknownStitchError, match=says):
        make_backbone(stitch=key)


@pytest.mark.parametrize("id_", [0, 2])
def test_a_stitch_of_another_space(id_: int, make_backbone: MakeBackbone) -> None:
    """Its id may belong to another route of this space."""
    backbone = make_backbone()
    with pytest.raises(UnknownStitchError):
        backbone.set_stitch(StitchSpace.two_way((3, 6))[id_])
    assert backbone.stitch.name == "L"


@pytest.mark.parametrize(
    ("test", "runs"),
    [
        (
            (1,),
            {"S": "S0 0_0-1_2", "L": "L0 L1", "S0-L2": "S0 0_0-1_2", "L1-S1": "L0 L1"},
        ),
        (
            (3,),
            {
                "S": "S0 S1 0_1-1_4",
                "L": "L0 L1 L2 L3",
                "S0-L2": "S0 0_0-1_2 L2 L3",
                "L1-S1": "L0 L1 1_1-0_1 S1 0_1-1_4",
            },
        ),
        (
            (3, 0),
            {
                "S": "S0 0_0-1_2 S1 0_1-1_4",
                "L": "L0 L1 L2 L3",
                "S0-L2": "S0 0_0-1_2 L2 L3",
                "L1-S1": "L0 L1 1_1-0_1 S1 0_1-1_4",
            },
        ),
    ],
)
def test_evaluation_mode_runs_no_more_than_its_own_taps_need(
    test: tuple[int, ...], runs: dict[str, str], make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    backbone, images = make_backbone(out_indices=dict(train=(0, 1, 3), test=test)), make_images()
    assert all(m is not None for m in backbone(images))
    calls = count_calls(backbone.eval())
    assert {stitch.name for stitch in backbone.space} == runs.keys()
    for name, parts in runs.items():
        backbone.set_stitch(name)
        calls.clear()
        maps = backbone(images)
        assert calls == dict.fromkeys(parts.split(), 1), name
        for index, got in zip((0, 1, 3), maps, strict=True):
            assert (got is None) == (index not in test)
            if got is not None:
                torch.testing.assert_close(got, backbone.network(images, backbone.stitch, (index,))[0])


@pytest.mark.parametrize("out_indices", [(1, 3), dict(train=(1, 3), test=(3,))])
@torch.no_grad()
def test_class_tokens_come_beside_the_maps(
    out_indices: Any, make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    """One for each map, from the same block; None where there is no map."""
    backbone, images = make_backbone(out_indices=out_indices).eval(), make_images(2, 32, 64)
    for stitch in backbone.space:
        backbone.set_stitch(stitch)
        taps = backbone(images)
        assert isinstance(taps, tuple) and len(taps) == len(taps.class_tokens) == 2
        for map_, class_token in zip(taps, taps.class_tokens, strict=True):
            assert (map_ is None) == (class_token is None)
            assert map_ is None or (map_.shape, class_token.shape) == ((2, 48, 2, 4), (2, 48))
    backbone.set_stitch("L")
    model = backbone.network.anchor(1).model
    patches, class_token = model.forward_intermediates(images, intermediates_only=True, return_prefix_tokens=True)[3]
    torch.testing.assert_close(backbone(images)[-1], patches)
    torch.testing.assert_close(backbone(images).class_tokens[-1], class_token[:, 0])


def test_class_tokens_are_trained(make_backbone: MakeBackbone, make_images: MakeImages) -> None:
    backbone = make_backbone(out_indices=(1, 3))
    torch.stack([token.sum() for token in backbone(make_images()).class_tokens]).sum().backward()
    assert any(parameter.grad is not None for parameter in backbone.parameters())


def test_anchors_without_a_class_token(make_backbone: MakeBackbone, make_images: MakeImages) -> None:
    anchor = dict(model="vit_base_patch16_gap_224")
    taps = make_backbone(small=anchor, large=anchor)(make_images())
    assert taps.class_tokens is None and len(taps) == 1


@torch.no_grad()
def test_a_classifiers_backbone_gives_the_logits_of_the_last_anchor(
    make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    backbone, images = make_backbone(num_classes=5), make_images()
    assert backbone(images).shape == (2, 5) and backbone.drawn is not None
    backbone.eval()
    for stitch in backbone.space:
        backbone.set_stitch(stitch)
        assert torch.equal(backbone(images), backbone.network.classify(images, stitch))
    for index, name in enumerate("SL"):
        backbone.set_stitch(name)
        torch.testing.assert_close(backbone(images), backbone.network.anchor(index).model(images))


def test_the_costs_of_a_classifiers_backbone(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone(num_classes=5)
    model = backbone.cost_model()
    expected = {stitch.id: model.classifier(stitch) for stitch in backbone.space}
    assert backbone.costs() == backbone.training_costs() == expected
    assert sorted(id_ for bin_ in backbone.sampler().bins for id_ in bin_) == sorted(expected)


@pytest.mark.parametrize("anchor", [dict(rel_pos_bias=True), dict(window_size=1, global_blocks=(1,))])
def test_anchors_take_windows_and_a_bias(
    anchor: dict[str, Any], make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    backbone = make_backbone(small=anchor, large=anchor)
    attention = backbone.network.anchor(1).block(0).attn
    assert (attention.bias_grid, attention.window) == (((2, 2), 0) if "rel_pos_bias" in anchor else (None, 1))
    for _ in range(4):
        (map_,) = backbone(make_images())
        map_.square().mean().backward()
    assert map_.shape == (2, 48, 2, 2)


@torch.no_grad()
def test_one_anchor_alone_is_the_anchor(make_images: MakeImages) -> None:
    backbone, images = StitchedBackbone([TINY], img_size=32, out_indices=(0, 1)), make_images(2, 32, 48)
    assert [stitch.name for stitch in backbone.space] == ["A"]
    expected = backbone.network.anchor(0).model.forward_intermediates(images, intermediates_only=True)
    for mode in (True, False):
        for got, by_timm in zip(backbone.train(mode)(images), expected, strict=True):
            torch.testing.assert_close(got, by_timm)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast(dtype: torch.dtype, error: float, make_backbone: MakeBackbone, make_images: MakeImages) -> None:
    backbone, images = make_backbone(out_indices=(1, 3)), make_images()
    assert backbone.sampler().bins
    exact, drawn = copy.deepcopy(backbone), set()
    for _ in range(12):
        backbone.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype):
            maps = backbone(images)
            sum(m.float().square().mean() for m in maps).backward()
        for got, reference in zip(maps, exact(images), strict=True):
            assert 0 < (got.float() - reference).norm() < error * reference.norm()
        gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)
        drawn.add(backbone.drawn.name)
    assert drawn == {"S", "L", "S0-L2", "L1-S1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_from_the_first_forward_on(
    dtype: torch.dtype, make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    """The first forward counts the FLOPs for the bins; count and gradients must not affect each other."""
    backbone, images = make_backbone(), make_images()
    expected = draw(copy.deepcopy(backbone), 1)
    with torch.autocast("cpu", dtype):
        maps = backbone(images)
        maps[0].float().square().mean().backward()
    assert backbone.drawn.id == expected[0]
    stem = backbone.network.anchor(backbone.drawn.segments[0].anchor).parameters_of(STEM)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in stem)


# Freezing


def trained(backbone: StitchedBackbone) -> dict[int, set[str]]:
    """The names of each anchor's parameters that take part in training."""
    anchors = [backbone.network.anchor(index) for index in range(2)]
    return {i: {n for n, p in a.model.named_parameters() if p.requires_grad} for i, a in enumerate(anchors)}


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (dict(), (-1, -1)),
        (dict(frozen_stages=0), (0, 0)),
        (dict(frozen_stages=1), (0, 1)),
        (dict(frozen_stages=2), (1, 2)),
        (dict(frozen_stages=3), (1, 3)),
        (dict(frozen_stages=4), (2, 4)),
        (dict(frozen_anchors=(0,)), (2, -1)),
        (dict(frozen_anchors=(1,)), (-1, 4)),
        (dict(frozen_stages=2, frozen_anchors=(0,)), (2, 2)),
        (dict(frozen_anchors=[0, 1]), (2, 4)),
    ],
)
def test_frozen_parts(
    settings: dict[str, Any], first: tuple[int, int], make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    """``first`` blocks of either anchor that are trained; -1: those and the stem."""
    backbone = make_backbone(**settings, small=dict(pos_drop_rate=0.1), large=dict(pos_drop_rate=0.1))
    backbone.eval().train()
    for index, start in enumerate(first):
        model = backbone.network.anchor(index).model
        names = [name for name, _ in model.named_parameters()]
        expected = {n for n in names if start < 0 or (n.startswith("blocks.") and int(n.split(".")[1]) >= start)}
        assert trained(backbone)[index] == expected
        assert model.pos_drop.training == model.patch_embed.training == (start < 0)
        assert [block.training for block in model.blocks] == [b >= start for b in range(len(model.blocks))]

    for stitch in backbone.space:
        maps = backbone.network(make_images(), stitch, (1, 3))
        if any(m.requires_grad for m in maps):
            torch.cat(maps).square().mean().backward()
    for index, names in trained(backbone).items():
        model = backbone.network.anchor(index).model
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names
    for layer in backbone.network.layers.values():
        assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"bias", "lora_A", "lora_B"}


# Pretrained weights


@pytest.fixture
def timm_weights(tmp_path: Path, randomise: Callable[[nn.Module], None]) -> tuple[str, dict[str, Tensor]]:
    """A file of weights that fit the large anchor, as timm writes them, and what is in it."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=4, num_heads=2, num_classes=5)
    randomise(model)
    path = tmp_path / "timm.pth"
    torch.save(model.state_dict(), path)
    return str(path), model.state_dict()


@pytest.mark.parametrize("inside", [False, True])
def test_init_weights_loads_the_anchors_once(
    inside: bool,
    timm_weights: tuple[str, dict[str, Tensor]],
    backbone_config: Config,
    segmentor_config: Config,
) -> None:
    path, weights = timm_weights
    model = MODELS.build((segmentor_config if inside else backbone_config)(large=dict(pretrained=path)))
    backbone = find_stitched_backbone(model)
    small, large = (backbone.network.anchor(index).model for index in range(2))
    before = copy.deepcopy(small.state_dict())
    assert not same_weights(large, weights)
    model.init_weights()
    assert same_weights(large, weights) and same_weights(small, before)

    nn.init.zeros_(large.pos_embed)
    model.init_weights()
    assert not large.pos_embed.any()


def test_one_of_several_models_in_a_file_is_chosen_in_the_config(
    timm_weights: tuple[str, dict[str, Tensor]], backbone_config: Config, tmp_path: Path
) -> None:
    weights, path = timm_weights[1], str(tmp_path / "two.pth")
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"student": weights, "teacher": {f"backbone.{name}": one for name, one in other.items()}}, path)
    with pytest.raises(SettingError, match=r"two\.pth'.* prefix='student\.'\) in a config"):
        MODELS.build(backbone_config(large=dict(pretrained=path))).init_weights()
    for prefix, expected in {"student.": weights, "teacher.backbone.": other, "teacher": other}.items():
        chosen = ConfigDict(source=path, prefix=prefix)  # as a config file has it
        backbone = MODELS.build(backbone_config(large=dict(pretrained=chosen)))
        backbone.init_weights()
        assert same_weights(backbone.network.anchor(1).model, expected)
    backbone = MODELS.build(backbone_config(large=dict(pretrained=dict(source=timm_weights[0]))))
    backbone.init_weights()
    assert same_weights(backbone.network.anchor(1).model, weights)


def test_init_cfg_leaves_pretrained_anchors(
    timm_weights: tuple[str, dict[str, Tensor]], backbone_config: Config
) -> None:
    path, weights = timm_weights
    constant = dict(type="Constant", layer="Linear", val=0.5)
    backbone = MODELS.build(backbone_config(large=dict(pretrained=path), init_cfg=constant))
    backbone.init_weights()
    assert same_weights(backbone.network.anchor(1).model, weights)
    assert (backbone.network.anchor(0).model.blocks[0].mlp.fc1.weight == 0.5).all()


def test_a_checkpoint_of_the_whole_backbone_wins_over_those_of_its_anchors(
    timm_weights: tuple[str, dict[str, Tensor]], backbone_config: Config, make_backbone: MakeBackbone, tmp_path: Path
) -> None:
    whole, path = make_backbone(), str(tmp_path / "whole.pth")
    save_checkpoint(dict(meta={}, state_dict=whole.state_dict()), path)
    config = backbone_config(large=dict(pretrained=timm_weights[0]), init_cfg=dict(type="Pretrained", checkpoint=path))
    backbone = MODELS.build(config)
    backbone.init_weights()
    assert same_weights(backbone, whole.state_dict()) and backbone.network.initialized


def test_the_constructor_reads_no_file(backbone_config: Config, tmp_path: Path) -> None:
    backbone = MODELS.build(backbone_config(small=dict(pretrained=str(tmp_path / "absent.pth"))))
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        backbone.init_weights()


def test_init_weights_reads_what_a_training_run_of_one_anchor_wrote(
    segmentor_config: Config, backbone_config: Config, randomise: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """mmengine keeps the history of the losses beside the weights: objects that ``weights_only`` refuses by itself."""
    config = segmentor_config()
    config["backbone"]["anchors"].pop(0)
    run = MODELS.build(config)
    randomise(run)
    run.backbone.train()(torch.zeros(1, 3, 32, 32))
    hub = MessageHub("one_anchor_run")
    for loss in (1.5, 0.5):
        hub.update_scalar("train/loss", loss)
    hub.update_info("iter", 2)
    path = str(tmp_path / "iter_2.pth")
    history = hub.state_dict()
    assert isinstance(history["log_scalars"]["train/loss"], HistoryBuffer)
    save_checkpoint(dict(meta=dict(iter=2), state_dict=run.state_dict(), message_hub=history), path)
    with pytest.raises(Exception, match="HistoryBuffer"):
        torch.load(path, weights_only=True)

    backbone = MODELS.build(backbone_config(large=dict(pretrained=path)))
    backbone.init_weights()
    assert same_weights(backbone.network.anchor(1).model, run.backbone.network.anchor(0).model.state_dict())
    assert backbone.draws == 0 and not backbone.network.initialized
    with pytest.raises(Exception, match="HistoryBuffer"):
        torch.load(path, weights_only=True)  # what was allowed for that file is allowed no longer


# Errors


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(scheme="three_way"), "two_way, one_way, sliding_window; got 'three_way'"),
        (dict(out_indices=(1, 4)), r"0 to 3; got \[4\]"),
        (dict(out_indices=(-1,)), r"0 to 3; got \[-1\]"),
        (dict(out_indices=dict(train=(1.5,), test=(1.5,))), r"0 to 3; got \[1\.5\]"),
        (dict(out_indices=dict(train=(1,), test=(1, 3))), r"among those of 'train', \(1,\); got \(1, 3\)"),
        (dict(out_indices=dict(train=(1,))), r"dict\(train=\.\.\., test=\.\.\.\).*\['train'\]"),
        (dict(out_indices=dict(train=(1,), test=(1,), val=(1,))), r"dict\(train=\.\.\., test=\.\.\.\).*val"),
        (dict(out_indices=()), "at least one block"),
        (dict(out_indices=dict(train=(1,), test=())), "at least one block"),
        (dict(anchors=[dict(embed_dim=32)]), r"'model', the name of a timm model.*embed_dim"),
        (dict(large=dict(img_size=64)), "img_size is a setting of the backbone"),
        (dict(large=dict(pretrained="")), "pretrained of anchor 'vit_tiny_patch16_224' is empty"),
        (dict(large=dict(pretrained=dict(source=None))), "pretrained of anchor 'vit_tiny_patch16_224' is empty"),
        (dict(large=dict(pretrained=dict(prefix="a."))), "pretrained of anchor 'vit_tiny_patch16_224' is empty"),
        (dict(large=dict(pretrained=dict(source="a", key="b"))), r"dict\(source=\.\.\., prefix=\.\.\.\), got key"),
        (dict(large=dict(in_chans=4)), "must agree in in_chans.*3 and 4"),
        (dict(anchors=[]), r"two anchors.*\(\)"),
        (dict(small=dict(embed_dims=32)), "unknown key 'embed_dims'.*timm.create_model"),
        (dict(small=dict(patch_size=8)), r"patch_size.*\(8, 8\) and \(16, 16\).*one family"),
        (dict(large=dict(reg_tokens=4)), "num_prefix_tokens.*1 and 5.*one family"),
        (dict(small=dict(depth=5)), "smallest to the largest.*5 and 4"),
        (dict(frozen_stages=5), "-1 to 4.*got 5"),
        (dict(frozen_stages=-2), "-1 to 4.*got -2"),
        (dict(frozen_anchors=(0, 2)), r"indices of the 2 anchors; got \(0, 2\)"),
        (dict(frozen_anchors=(-1,)), r"indices of the 2 anchors; got \(-1,\)"),
        (dict(rank=-1), "0 or more, got -1"),
        (dict(num_classes=5, out_indices=(1,)), "gives logits instead of maps: leave out out_indices"),
        (dict(small=dict(num_classes=5)), "num_classes is no key of an anchor"),
        (dict(small=dict(window_size=0)), "at least 1; got 0"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], says: str, backbone_config: Config) -> None:
    arguments = backbone_config(**settings)
    del arguments["type"]
    with pytest.raises(ValueError, match=says):
        StitchedBackbone(**arguments)


@pytest.mark.parametrize("anchors", ["deit3_small_patch16_224", ["deit3_small_patch16_224"], dict(model="vit")])
def test_anchors_that_are_no_list_of_dicts(anchors: Any) -> None:
    with pytest.raises(TypeError, match="anchors is a list of dicts"):
        StitchedBackbone(anchors)


def test_the_backbone_is_found_in_a_wrapped_model(make_segmentor: MakeSegmentor) -> None:
    model = make_segmentor()
    for wrapped in (model, model.backbone, nn.DataParallel(model), nn.Sequential(nn.DataParallel(model))):
        assert find_stitched_backbone(wrapped) is model.backbone


@pytest.mark.parametrize("count", [0, 2])
def test_one_backbone_is_needed(count: int, make_backbone: MakeBackbone) -> None:
    with pytest.raises(TypeError, match=rf"{count} backbones.*set model\.backbone\.type"):
        find_stitched_backbone(nn.Sequential(nn.Linear(1, 1), *(make_backbone() for _ in range(count))))


# A handful of stitches


@pytest.mark.parametrize(("number", "ids"), [(2, [0, 1, 5, 8]), (3, [0, 1, 3, 7, 8]), (9, [0, 1, 3, 5, 7, 8])])
def test_a_spread_over_the_bins(number: int, ids: list[int], make_backbone: MakeBackbone) -> None:
    """By hand: the middle stitches of the bins, anchors left out, are 3, 5, 7 and 8."""
    backbone = make_backbone(small=dict(depth=3), large=dict(depth=3))
    backbone._sampler = StitchSampler(((0, 2, 3), (5,), (1,), (6, 7), (8,)))
    assert [stitch.id for stitch in spread(backbone.space, backbone.sampler().bins, number)] == ids


def test_a_spread_of_few(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    assert set(spread(backbone.space, backbone.sampler().bins)) == set(backbone.space)  # two anchors and two stitches
    assert set(spread(backbone.space, backbone.sampler().bins, 0)) == set(backbone.space.anchors)
    alone = StitchedBackbone([dict(model="vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2)], img_size=32)
    assert [stitch.name for stitch in spread(alone.space, alone.sampler().bins)] == ["A"]


# Prefix reuse


@pytest.mark.parametrize("num_classes", [None, 5])
@pytest.mark.parametrize("order", ["best", "ids"])
@torch.no_grad()
def test_prefix_reuse_changes_nothing(
    order: str, num_classes: int | None, make_backbone: MakeBackbone, make_images: MakeImages
) -> None:
    """Two calls for each stitch, as with a flip. Outside the context and in training mode, nothing changes."""
    taps = dict(out_indices=dict(train=(1, 3), test=(3,))) if num_classes is None else dict(num_classes=5)
    backbone = make_backbone(**taps).eval()
    space, images = backbone.space, make_images()
    stitches = backbone.prefix_order(space) if order == "best" else [stitch.id for stitch in space]
    blocks: list[object] = []
    for anchor in backbone.network.anchors:
        for block in anchor.model.blocks:
            block.register_forward_hook(lambda *_: blocks.append(1))

    def outputs() -> list[Tensor]:
        out = [backbone(batch) for batch in (images, images.flip(-1))]
        return out if num_classes else [x for taps in out for x in (*taps[1:], *taps.class_tokens[1:])]

    expected = {}
    for stitch in stitches:
        backbone.set_stitch(stitch)
        expected[stitch] = outputs()
    alone = len(blocks)
    for _ in range(2):  # batches
        blocks.clear()
        with backbone.reuse_prefixes(stitches):
            for stitch in stitches:
                backbone.set_stitch(stitch)
                assert all(torch.equal(a, b) for a, b in zip(outputs(), expected[stitch], strict=True))
        assert len(blocks) < alone
    blocks.clear()
    outputs()
    assert len(blocks) == 2 * sum(len(segment) for segment in backbone.stitch.segments)


@torch.no_grad()
def test_misuse_of_prefix_reuse(make_backbone: MakeBackbone, make_images: MakeImages) -> None:
    backbone = make_backbone().eval()
    with pytest.raises(UnknownStitchError), backbone.reuse_prefixes(["S", "S9-L9"]):
        pass
    with backbone.reuse_prefixes(["S", "L"]):
        with pytest.raises(RuntimeError, match="already"), backbone.reuse_prefixes(["S"]):
            pass
        backbone.set_stitch("S")
        backbone(make_images())
        backbone.set_stitch("L")
        with pytest.raises(RuntimeError, match="other images"):
            backbone(make_images(seed=1))
        backbone.train()
        backbone(make_images(seed=1))  # which shares nothing
    with backbone.reuse_prefixes(["S"]):  # an error within leaves nothing behind
        pass


@pytest.mark.parametrize("size", [32.0, (32.0, 32), [32, 32], 32])
def test_sizes_may_be_written_as_numbers_of_any_kind(size: Any, make_backbone: Callable[..., StitchedBackbone]) -> None:
    backbone = make_backbone(img_size=size)
    assert backbone.img_size == (32, 32) and all(type(side) is int for side in backbone.img_size)


@pytest.mark.parametrize("size", [32.5, 0, -32, (32,), (32, 32, 3), "32", (32, None)])
def test_what_is_no_size(size: Any, make_backbone: Callable[..., StitchedBackbone]) -> None:
    with pytest.raises(ValueError, match=r"img_size is the height and width"):
        make_backbone(img_size=size)


@pytest.mark.parametrize("indices", [3, dict(train=3, test=3), dict(train=(1, 3), test=3)])
def test_one_tap_need_not_be_a_list(indices: Any, make_backbone: Callable[..., StitchedBackbone]) -> None:
    backbone = make_backbone(out_indices=indices)
    assert backbone.test_out_indices == (3,) and backbone.out_indices[-1] == 3
