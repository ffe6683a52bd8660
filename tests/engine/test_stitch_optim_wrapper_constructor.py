"""Each trainable parameter is in one group, with the learning rate and the decay of its place."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

import mmsnnet.engine.optimizers.stitch_optim_wrapper_constructor as module
from mmsnnet.models import StitchedBackbone
from mmsnnet.registry import MODELS

Make = Callable[..., Any]
LR, DECAY = 2.0, 0.5


class Detector(nn.Module):
    """A backbone, a neck and a head under names of their own: no toolbox's model."""

    def __init__(self, backbone: StitchedBackbone) -> None:
        super().__init__()
        self.trunk = backbone
        self.neck = nn.Sequential(nn.Conv2d(48, 8, 1), nn.GroupNorm(2, 8))
        self.query = nn.Module()
        self.query.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.query.content = nn.Parameter(torch.zeros(1, 4, 8))


def build(model: nn.Module, optimizer: dict[str, Any] | None = None, **paramwise: Any) -> OptimWrapper:
    config = dict(
        type="OptimWrapper",
        constructor="mmsnnet.StitchOptimWrapperConstructor",
        optimizer=optimizer or dict(type="SGD", lr=LR, weight_decay=DECAY),
        paramwise_cfg=paramwise or None,
    )
    return build_optim_wrapper(model, config)


def settings(model: nn.Module, wrapper: OptimWrapper) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter that is in a group, by its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    pairs = [(names[p], group) for group in wrapper.optimizer.param_groups for p in group["params"]]
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name: (group["lr"], group["weight_decay"]) for name, group in pairs}


@pytest.fixture(params=["plain", "bias and windows", "tokens and layer scale", "learned rotations", "frozen"])
def backbone(request: pytest.FixtureRequest, make_backbone: Make) -> StitchedBackbone:
    anchors = {
        "bias and windows": dict(rel_pos_bias=True, window_size=1),
        "learned rotations": dict(model="vit_base_patch16_rope_mixed_ape_224"),
        "tokens and layer scale": dict(reg_tokens=2, init_values=1.0, pre_norm=True),
    }.get(request.param, {})
    frozen = dict(frozen_stages=2, frozen_anchors=(0,)) if request.param == "frozen" else {}
    return make_backbone(small=anchors, large=anchors, **frozen)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_every_trainable_parameter_is_in_one_group(backbone: StitchedBackbone, rate: float) -> None:
    model = Detector(backbone)
    found = settings(model, build(model, layer_decay_rate=rate))
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_is_not_decayed(backbone: StitchedBackbone) -> None:
    """By the names that timm gives to matrices and kernels: all else is spared."""
    model = Detector(backbone)
    decayed = {name for name, (_, decay) in settings(model, build(model)).items() if decay}
    kernels = ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "patch_embed.proj.weight")
    others = (".lora_A", ".lora_B", "neck.0.weight", "query.content")
    expected = {name for name, p in model.named_parameters() if name.endswith((*kernels, *others)) and p.requires_grad}
    assert decayed == expected and "query.content" in decayed


def test_each_part_has_its_rate(make_backbone: Make) -> None:
    model = Detector(make_backbone())
    found = settings(model, build(model, anchor_lr_mult=0.1, stitching_lr_mult=10.0, head_lr_mult=5.0))
    rates = {"anchors": set(), "layers": set(), "": set()}
    for name, (lr, _) in found.items():
        part = name.split(".")[2] if name.startswith("trunk.network.") else ""
        rates[part].add(round(lr, 9))
    assert rates == {"anchors": {0.2}, "layers": {20.0}, "": {10.0}}


def test_without_options_all_rates_are_the_optimizers(make_backbone: Make) -> None:
    model = Detector(make_backbone())
    assert {lr for lr, _ in settings(model, build(model)).values()} == {LR}


def test_layers_decay_inside_each_anchor(make_backbone: Make) -> None:
    """Depths 2 and 4, by hand: the last block has one power of the rate, the one before it two, the stem the most."""
    tiny = dict(rel_pos_bias=True, pre_norm=True)
    model = Detector(make_backbone(small=tiny, large=tiny))
    found = settings(model, build(model, layer_decay_rate=0.5, anchor_lr_mult=3.0, head_lr_mult=7.0))
    expected = [
        {"stem": 0.75, "0": 1.5, "1": 3.0},
        {"stem": 0.1875, "0": 0.375, "1": 0.75, "2": 1.5, "3": 3.0},
    ]
    for index, by_layer in enumerate(expected):
        prefix = f"trunk.network.anchors.{index}.model."
        inside = {name.removeprefix(prefix): lr for name, (lr, _) in found.items() if name.startswith(prefix)}
        assert {"pos_embed", "cls_token", "norm_pre.weight", "blocks.1.attn.relative_position_bias_table"} <= set(
            inside
        )
        for name, lr in inside.items():
            layer = name.split(".")[1] if name.startswith("blocks.") else "stem"
            assert lr == pytest.approx(by_layer[layer]), name
    assert {lr for name, (lr, _) in found.items() if ".network.layers." in name} == {LR}
    assert {lr for name, (lr, _) in found.items() if not name.startswith("trunk.")} == {7.0 * LR}


def test_a_classifier_ends_in_a_head_and_its_norm_in_the_last_layer(make_backbone: Make) -> None:
    model = make_backbone(num_classes=3)
    found = settings(model, build(model, layer_decay_rate=0.5, head_lr_mult=10.0))
    for index, depth in enumerate((2, 4)):
        prefix = f"network.anchors.{index}.model."
        assert found[f"{prefix}head.weight"] == (10 * LR, DECAY)
        assert found[f"{prefix}head.bias"] == (10 * LR, 0.0)
        assert found[f"{prefix}norm.weight"] == (LR, 0.0)
        assert found[f"{prefix}blocks.{depth - 1}.mlp.fc1.weight"] == (LR / 2, DECAY)


def test_groups_are_few_and_in_one_order(make_backbone: Make) -> None:
    models = [Detector(make_backbone()) for _ in range(2)]
    wrappers = [build(model, head_lr_mult=10.0) for model in models]
    # Two anchors, stitching layers, head, each with and without decay.
    assert [len(wrapper.optimizer.param_groups) for wrapper in wrappers] == [8, 8]
    # With layers: (stem + 2 blocks) + (stem + 4 blocks) + stitching layers + head.
    assert len(build(models[0], layer_decay_rate=0.9).optimizer.param_groups) == 2 * (3 + 5 + 1 + 1)
    order = [
        [name for group in wrapper.optimizer.param_groups for name in map(names.__getitem__, group["params"])]
        for wrapper, names in zip(
            wrappers, [{p: n for n, p in model.named_parameters()} for model in models], strict=True
        )
    ]
    assert order[0] == order[1]


def test_a_resumed_optimizer_finds_its_state(make_backbone: Make) -> None:
    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.05)
    first, second = (Detector(make_backbone()) for _ in range(2))
    before, after = (build(model, optimizer, layer_decay_rate=0.7) for model in (first, second))
    for number, (_, parameter) in enumerate(first.named_parameters()):
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float(number + 1))
    before.optimizer.step()
    after.load_state_dict(before.state_dict())
    names = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        if parameter.requires_grad:
            moments = [w.optimizer.state[p]["exp_avg"] for w, p in ((before, parameter), (after, names[name]))]
            assert torch.equal(*moments), name
    assert settings(first, before) == settings(second, after)


def test_a_wrapped_model_and_a_segmentor(make_segmentor: Make) -> None:
    model = make_segmentor()
    plain = settings(model, build(model, head_lr_mult=10.0))
    wrapped = settings(model, build(nn.DataParallel(model), head_lr_mult=10.0))
    assert plain == wrapped
    assert plain["decode_head.conv_seg.weight"] == plain["auxiliary_head.conv_seg.weight"] == (10 * LR, DECAY)
    assert {decay for name, (_, decay) in plain.items() if ".bn." in name} == {0.0}


def test_where_the_optimizer_sets_no_decay_its_own_holds(make_backbone: Make) -> None:
    model = Detector(make_backbone())
    found = settings(model, build(model, dict(type="AdamW", lr=1.0)))
    assert found["neck.0.weight"] == (1.0, 0.01) and found["neck.0.bias"] == (1.0, 0.0)


# Adaptive gradient clipping


def agc(model: nn.Module, factor: float = 0.01, **settings: Any) -> OptimWrapper:
    config = dict(
        type="OptimWrapper",
        constructor="mmsnnet.StitchOptimWrapperConstructor",
        optimizer=dict(type="SGD", lr=1.0),
        clip_grad=dict(type="agc", clip_factor=factor),
    )
    return build_optim_wrapper(model, config | settings)


def by_unit(tensor: torch.Tensor) -> torch.Tensor:
    """The norm of each row, kernel of an output channel, or vector."""
    return tensor.detach().flatten(1).norm(dim=1) if tensor.ndim > 1 else tensor.detach().norm()[None]


@pytest.mark.parametrize("counts", [1, 3])
def test_adaptive_clipping_bounds_each_unit_by_its_weights(make_backbone: Make, counts: int) -> None:
    """Of the mean gradient over accumulated passes, in one step; a parameter without a gradient stays."""
    torch.manual_seed(0)
    model = Detector(make_backbone())
    wrapper = agc(model, accumulative_counts=counts)
    wrapper.initialize_count_status(model, 0, counts)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("query")}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    slopes = {
        name: torch.randn_like(p) * 10.0 ** torch.randint(-7, 3, p.shape[:1]).view(-1, *[1] * (p.ndim - 1))
        for name, p in trained.items()
    }
    for _ in range(counts):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        wrapper.update_params(sum((slopes[name] * p).sum() for name, p in trained.items()))
    clipped = kept = 0
    for name, parameter in model.named_parameters():
        moved = before[name] - parameter.detach()
        if name not in trained:
            assert not moved.any()
            continue
        limit = 0.01 * by_unit(before[name]).clamp(min=1e-3)
        exceeds = by_unit(slopes[name]) > limit
        found = by_unit(moved)
        assert torch.allclose(found[exceeds], limit[exceeds], rtol=1e-2, atol=1e-6), name
        assert torch.allclose(found[~exceeds], by_unit(slopes[name])[~exceeds], rtol=1e-2, atol=1e-6), name
        clipped, kept = clipped + int(exceeds.sum()), kept + int((~exceeds).sum())
    assert clipped > 100 and kept > 100


def test_adaptive_clipping_in_mixed_precision_compares_unscaled_gradients(make_backbone: Make) -> None:
    from mmengine.optim import AmpOptimWrapper
    from torch.amp import GradScaler

    steps = []
    for scale in (None, 2.0**10):
        torch.manual_seed(0)
        model = Detector(make_backbone())
        with pytest.MonkeyPatch.context() as patch:
            # mmengine asks for a GPU, but torch's scaler runs on a CPU too.
            patch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
            wrapper = agc(model, type="OptimWrapper" if scale is None else "AmpOptimWrapper")
        if scale is not None:
            assert isinstance(wrapper, AmpOptimWrapper)
            wrapper.loss_scaler = GradScaler("cpu", init_scale=scale)
        wrapper.update_params(model.neck[0].weight.square().sum())
        steps.append(model.neck[0].weight.detach().clone())
    torch.testing.assert_close(*steps)


def test_clipping_of_mmengines_types_stays(make_backbone: Make) -> None:
    wrapper = agc(Detector(make_backbone()), clip_grad=dict(max_norm=2.0))
    assert wrapper.clip_func is torch.nn.utils.clip_grad_norm_ and wrapper.clip_grad_kwargs == dict(max_norm=2.0)


@pytest.mark.parametrize(
    "setting",
    [
        dict(type="agc"),
        dict(type="agc", clip_factor=0.0),
        dict(type="agc", clip_factor="0.01"),
        dict(type="agc", clip_factor=True),
        dict(type="agc", clip_factor=0.01, max_norm=1.0),
    ],
)
def test_adaptive_clipping_takes_one_number(make_backbone: Make, setting: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"optim_wrapper\.clip_grad of type 'agc' takes .* clip_factor, a number above 0"
    ):
        agc(Detector(make_backbone()), clip_grad=setting)


# timm's lists


@pytest.mark.parametrize(
    ("anchor", "spared"),
    [
        (
            dict(model="swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
            ["attn.relative_position_bias_table"],
        ),
        (
            dict(model="swinv2_tiny_window8_256", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
            ["attn.cpb_mlp.0.weight", "attn.cpb_mlp.2.weight", "attn.logit_scale"],
        ),
        (
            dict(model="levit_128", embed_dim=(32, 48, 64), depth=(1, 1, 1), num_heads=(1, 2, 2), key_dim=16),
            ["attn.attention_biases", "attn_downsample.attention_biases"],
        ),
        (
            dict(model="vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2, reg_tokens=2, rel_pos_bias=True),
            ["cls_token", "pos_embed", "reg_token", "attn.relative_position_bias_table"],
        ),
        (dict(model="convnext_tiny", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)), []),
    ],
    ids=lambda value: value["model"] if isinstance(value, dict) else "",
)
def test_what_timm_exempts_is_not_decayed(anchor: dict[str, Any], spared: list[str]) -> None:
    size = 256 if anchor["model"].startswith("swinv2") else 224
    backbone = MODELS.build(dict(type="mmsnnet.StitchedViT", anchors=[anchor], img_size=size))
    found = settings(backbone, build(backbone))
    several = {name for name, p in backbone.named_parameters() if p.ndim > 1}
    exempt = {name for name in several if found[name][1] == 0.0}
    assert exempt == {name for name in several if name.endswith(tuple(spared))} if spared else not exempt
    assert all(any(name.endswith(end) for name in exempt) for end in spared)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "train.log"
    logger = MMLogger.get_instance("groups", log_file=str(path))
    yield path
    for handler in logger.handlers:
        handler.close()
    MMLogger._instance_dict.pop("groups")


def test_the_table(make_backbone: Make, log: Path) -> None:
    model = Detector(make_backbone())
    build(model, stitching_lr_mult=10.0)
    rows = [line.split() for line in log.read_text().splitlines()]
    assert ["part", "lr", "weight", "decay", "tensors", "parameters"] in rows
    # The neck's kernel (48 x 8) and the query's content (4 x 8).
    assert ["head", "2", "0.5", "2", "416"] in rows
    # Two layers each way between blocks of widths 32 and 48, of rank 2: A and B together have 2 * (32 + 48) weights.
    layers = len(model.trunk.space.layers)
    assert ["stitching", "layers", "20", "0.5", str(2 * layers), str(160 * layers)] in rows
    build(model, layer_decay_rate=0.5)
    rows = [line.split() for line in log.read_text().splitlines()]
    assert ["part", "layer", "lr", "weight", "decay", "tensors", "parameters"] in rows
    patches = 32 * 3 * 16 * 16
    assert ["anchor", "0", "stem", "0.25", "0.5", "1", f"{patches:,}"] in rows
    assert any(row[:5] == ["anchor", "1", "block", "3", "1"] for row in rows)


def test_only_the_main_process_prints_it(make_backbone: Make, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_main_process", lambda: False)
    build(Detector(make_backbone()))
    assert "Groups of parameters" not in log.read_text()


@pytest.mark.parametrize(
    ("paramwise", "error", "message"),
    [
        (
            dict(custom_keys={}),
            ValueError,
            "unknown key 'custom_keys'.*anchor_lr_mult, stitching_lr_mult, head_lr_mult, layer_decay_rate",
        ),
        (dict(head_lr_mult="10"), TypeError, "head_lr_mult must be a number, got '10'"),
        (dict(head_lr_mult=True), TypeError, "head_lr_mult must be a number, got True"),
        (dict(anchor_lr_mult=0), ValueError, "anchor_lr_mult must be above 0, got 0"),
        (dict(stitching_lr_mult=float("nan")), ValueError, "stitching_lr_mult must be above 0, got nan"),
        (dict(layer_decay_rate=1.5), ValueError, "layer_decay_rate must be above 0 and at most 1, got 1.5"),
    ],
)
def test_options_out_of_range(make_backbone: Make, paramwise: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(Detector(make_backbone()), **paramwise)


def test_a_rate_is_needed(make_backbone: Make) -> None:
    with pytest.raises(ValueError, match=r"optim_wrapper\.optimizer has no lr"):
        build(Detector(make_backbone()), dict(type="AdamW"))


def test_fused_sgd_with_momentum_is_refused(make_backbone: Make) -> None:
    """But for one anchor alone, of which each step trains all."""
    fused = dict(type="SGD", lr=LR, momentum=0.9, fused=True)
    with pytest.raises(ValueError, match=r"foreach=True in optim_wrapper\.optimizer, or leave out fused"):
        build(Detector(make_backbone()), fused)
    for allowed in (fused | dict(momentum=0.0), fused | dict(fused=None, foreach=True)):
        build(Detector(make_backbone()), allowed)
    build(make_backbone(only="L"), fused)


def test_a_stitched_backbone_is_needed() -> None:
    with pytest.raises(TypeError, match=r"mmsnnet\.StitchedViT"):
        build(nn.Linear(2, 2))
