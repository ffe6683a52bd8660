"""The depth head: against DPT written out by hand, its range and its loss, and in mmseg's depth estimator."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmsnnet.models import Taps, model_costs
from mmsnnet.stitching import count_flops

Config = Callable[..., dict[str, Any]]
Randomise = Callable[[nn.Module], None]
WIDTH = 48
HEAD = dict(
    type="mmsnnet.DPTDepthHead",
    in_channels=WIDTH,
    channels=8,
    post_process_channels=(4, 6, 8, 10),
    norm_cfg=dict(type="BN"),
)


def make_taps(batch: int = 2, height: int = 3, width: int = 4, scale: float = 1.0) -> Taps:
    maps = [scale * torch.randn(batch, WIDTH, height, width) for _ in range(4)]
    return Taps(maps, [scale * torch.randn(batch, WIDTH) for _ in range(4)])


def make_samples(*depths: Tensor) -> list[SegDataSample]:
    """Data samples with ground truth (1, H, W), of maps (H, W)."""
    return [SegDataSample(gt_depth_map=PixelData(data=depth[None])) for depth in depths]


@pytest.fixture
def make_head(randomise: Randomise) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        head = MODELS.build(HEAD | settings)
        randomise(head)
        return head

    return make


def dpt(weights: dict[str, Tensor], taps: Taps) -> Tensor:
    """DPT (arXiv 2103.13413, section 3) with the weights of a head without norms, up to what its last layer gives."""

    def conv(x: Tensor, name: str, **settings: Any) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **settings)

    def residual(x: Tensor, name: str) -> Tensor:
        y = conv(x.relu(), f"{name}.conv1.conv", padding=1)
        return x + conv(y.relu(), f"{name}.conv2.conv", padding=1)

    maps = []
    for i, (x, token) in enumerate(zip(taps, taps.class_tokens, strict=True)):
        b, c, h, w = x.shape
        both = torch.cat([x, token[:, :, None, None].expand(b, c, h, w)], dim=1).permute(0, 2, 3, 1)
        read, block = f"reassemble_blocks.readout_projects.{i}.0", "reassemble_blocks.resize_layers"
        x = F.gelu(both @ weights[f"{read}.weight"].T + weights[f"{read}.bias"]).permute(0, 3, 1, 2)
        x = conv(x, f"reassemble_blocks.projects.{i}.conv")
        if i < 2:
            x = F.conv_transpose2d(x, weights[f"{block}.{i}.weight"], weights[f"{block}.{i}.bias"], stride=4 // (i + 1))
        elif i == 3:
            x = conv(x, f"{block}.3", stride=2, padding=1)
        maps.append(conv(x, f"convs.{i}.conv", padding=1))
    out: Tensor | float = 0.0
    for step, x in enumerate(reversed(maps)):
        if step:
            x = F.interpolate(x, size=out.shape[2:], mode="bilinear") if x.shape != out.shape else x
            x = out + residual(x, f"fusion_blocks.{step}.res_conv_unit1")
        x = residual(x, f"fusion_blocks.{step}.res_conv_unit2")
        out = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        out = conv(out, f"fusion_blocks.{step}.project.conv")
    return conv(conv(out, "project.conv", padding=1).relu(), "conv_seg")


@pytest.mark.parametrize("size", [(4, 6), (3, 4), (5, 5)])
@torch.no_grad()
def test_it_is_dpt(size: tuple[int, int], make_head: Callable[..., Any]) -> None:
    head = make_head(norm_cfg=None, min_depth=0.5, max_depth=8.0).eval()
    taps = make_taps(2, *size)
    expected = 0.5 + 7.5 / (1 + torch.exp(-dpt(head.state_dict(), taps)))
    depth = head(taps)
    assert depth.shape == expected.shape and depth.std() > 0
    assert torch.allclose(depth, expected, rtol=1e-4, atol=1e-5)


def test_the_map_is_eight_times_as_large_as_the_taps(make_head: Callable[..., Any]) -> None:
    assert make_head()(make_taps(2, 4, 6)).shape == (2, 1, 32, 48)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_depths_stay_in_range(scale: float, make_head: Callable[..., Any]) -> None:
    depth = make_head()(make_taps(scale=scale))
    assert depth.min() >= 1e-3 and depth.max() <= 10 and depth.log().isfinite().all()


@pytest.mark.parametrize(
    ("x", "expected"), [(0.0, 3.0), (math.log(3), 4.0), (-math.log(3), 2.0), (50.0, 5.0), (-50.0, 1.0)]
)
def test_the_range_worked_out_by_hand(x: float, expected: float, make_head: Callable[..., Any]) -> None:
    """From 1 m to 5 m: the sigmoid of log 3 is three quarters."""
    head = make_head(min_depth=1.0, max_depth=5.0)
    nn.init.zeros_(head.conv_seg.weight)
    nn.init.constant_(head.conv_seg.bias, x)
    assert torch.allclose(head(make_taps()), torch.tensor(expected), rtol=1e-6)


def test_every_pixel_gets_a_gradient_at_the_start() -> None:
    head = MODELS.build(HEAD)
    head.init_weights()
    outputs: list[Tensor] = []
    head.conv_seg.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    depth = head(make_taps())
    outputs[0].retain_grad()
    depth.log().sum().backward()
    assert depth.mean().item() == pytest.approx(5.0, abs=0.2)
    assert (outputs[0].grad > 0.3).all()  # of log(10 sigmoid(x)): 1 - sigmoid(x), about a half


@pytest.mark.parametrize(("readout_type", "matters"), [("project", True), ("add", True), ("ignore", False)])
def test_the_class_token_is_read_out(readout_type: str, matters: bool, make_head: Callable[..., Any]) -> None:
    head, taps = make_head(readout_type=readout_type).eval(), make_taps()
    for tap in range(4):
        changed = Taps(taps, [token + (i == tap) for i, token in enumerate(taps.class_tokens)])
        assert torch.equal(head(taps), head(changed)) is not matters


@pytest.mark.parametrize("readout_type", ["project", "add"])
def test_taps_without_class_tokens(readout_type: str, make_head: Callable[..., Any]) -> None:
    taps = Taps(make_taps(2, 4, 6))
    with pytest.raises(ValueError, match=f"{readout_type}.*'ignore'"):
        make_head(readout_type=readout_type)(taps)
    assert make_head(readout_type="ignore")(taps).shape == (2, 1, 32, 48)


def test_depth_is_float32_under_autocast() -> None:
    head, taps = MODELS.build(HEAD).eval(), make_taps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        depth = head(taps)
    assert depth.dtype == torch.float32 and (depth - head(taps)).abs().mean() < 0.1
    assert not torch.equal(depth, depth.bfloat16().float())


# Loss


def test_the_loss_is_that_of_the_resized_depth(make_head: Callable[..., Any]) -> None:
    head, taps = make_head().eval(), make_taps()
    target = 0.1 + 9.8 * torch.rand(2, 48, 64)
    g = (F.interpolate(head(taps), size=(48, 64), mode="bilinear")[:, 0].log() - target.log()).double()
    losses = head.loss(taps, make_samples(*target), None)
    assert set(losses) == {"loss_silog"}
    expected = math.sqrt(g.var(correction=0).item() + 0.15 * g.mean().item() ** 2)
    assert losses["loss_silog"].item() == pytest.approx(expected, rel=1e-5)


def test_only_depths_in_range_count(make_head: Callable[..., Any]) -> None:
    head, taps = make_head().eval(), make_taps()
    target = 0.1 + 9.8 * torch.rand(2, 48, 64)
    out = torch.rand_like(target) < 0.3
    losses = [
        head.loss(taps, make_samples(*torch.where(out, value, target)), None)["loss_silog"].item()
        for value in (0.0, 1e-3, 10.0, 255.0, math.inf, math.nan, -1.0)
    ]
    assert len(set(losses)) == 1
    assert losses[0] != head.loss(taps, make_samples(*torch.where(out, 5.0, target)), None)["loss_silog"].item()


def test_an_image_without_depth_contributes_nothing(make_head: Callable[..., Any]) -> None:
    head, taps = make_head(norm_cfg=None), make_taps()
    target = 0.1 + 9.8 * torch.rand(48, 64)
    both = head.loss(taps, make_samples(target, torch.zeros(48, 64)), None)["loss_silog"]
    first = Taps([x[:1] for x in taps], [token[:1] for token in taps.class_tokens])
    alone = head.loss(first, make_samples(target), None)["loss_silog"]
    assert both.item() == pytest.approx(alone.item(), rel=1e-6)
    none = head.loss(taps, make_samples(*torch.zeros(2, 48, 64)), None)["loss_silog"]
    none.backward()
    assert none.item() == 0 and all(not p.grad.any() for p in head.parameters() if p.grad is not None)


def test_losses_are_weighted_summed_and_named(make_head: Callable[..., Any]) -> None:
    silog = dict(type="mmsnnet.SILogLoss")
    head = make_head(loss_decode=[silog | dict(loss_weight=2.0), silog, silog | dict(loss_name="loss_other")]).eval()
    losses = head.loss(make_taps(), make_samples(*(1 + torch.rand(2, 48, 64))), None)
    assert set(losses) == {"loss_silog", "loss_other"}
    assert losses["loss_silog"].item() == pytest.approx(3 * losses["loss_other"].item())


@pytest.mark.parametrize("settings", [dict(min_depth=0.0), dict(min_depth=2.0, max_depth=2.0), dict(max_depth=-1.0)])
def test_a_wrong_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 < min_depth < max_depth must hold, got"):
        MODELS.build(HEAD | settings)


# In the depth estimator


@pytest.fixture
def make_estimator(backbone_config: Config, randomise: Randomise) -> Callable[..., Any]:
    """``make_estimator(**test_cfg)``: a tiny stitched depth estimator, its stitching layers initialised."""

    def make(**test_cfg: Any) -> Any:
        model = MODELS.build(
            dict(
                type="mmseg.DepthEstimator",
                data_preprocessor=dict(
                    type="mmseg.SegDataPreProcessor", mean=[127.5] * 3, std=[127.5] * 3, size=(32, 48)
                ),
                backbone=backbone_config(
                    img_size=(32, 48), large=dict(depth=8), small=dict(depth=4), out_indices=(1, 3, 5, 7)
                ),
                decode_head=HEAD,
                test_cfg=ConfigDict(test_cfg or dict(mode="whole")),
            )
        )
        randomise(model)
        for layer in model.backbone.network.layers.values():
            layer.set_base(layer.weight, layer.bias)
        return model

    return make


def predict(model: Any, image: Tensor, ori_shape: tuple[int, int] | None = None) -> Tensor:
    shape = tuple(image.shape[1:])
    sample = SegDataSample(metainfo=dict(ori_shape=ori_shape or shape, img_shape=shape, pad_shape=shape))
    with torch.no_grad():
        (result,) = model.eval().predict(image[None], [sample])
    return result.pred_depth_map.data


FLIP = dict(mode="slide_flip", crop_size=(480, 640), stride=(480, 640))


@pytest.mark.parametrize("size", [(480, 640), (64, 96)])
def test_the_flipped_average_is_taken_over_the_whole_image(
    size: tuple[int, int], make_estimator: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    model, image = make_estimator(**FLIP), make_images(1, *size)[0]
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    depth = predict(model, image)
    assert len(seen) == 2 and torch.equal(seen[0][0], image) and torch.equal(seen[1][0], image.flip(-1))
    assert depth.shape == (1, *size)


def test_a_mirrored_image_gives_the_mirrored_depth(
    make_estimator: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    image = make_images(1, 64, 96)[0]
    flipping, plain = make_estimator(**FLIP), make_estimator()
    assert torch.allclose(predict(flipping, image.flip(-1)), predict(flipping, image).flip(-1), atol=1e-5)
    assert not torch.allclose(predict(plain, image.flip(-1)), predict(plain, image).flip(-1), atol=1e-3)
    plain.load_state_dict(flipping.state_dict())
    mean = (predict(plain, image) + predict(plain, image.flip(-1)).flip(-1)) / 2
    assert torch.allclose(predict(flipping, image), mean, atol=1e-6)


def test_predictions_come_in_the_original_size(
    make_estimator: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    assert predict(make_estimator(**FLIP), make_images(1, 64, 96)[0], ori_shape=(50, 70)).shape == (1, 50, 70)


@pytest.mark.slow
def test_every_stitch_is_trained_with_the_head(make_estimator: Callable[..., Any]) -> None:
    model = make_estimator()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    for _ in range(4):
        samples = make_samples(*(1 + 5 * torch.rand(2, 32, 48)))
        data = model.data_preprocessor(dict(inputs=list(images), data_samples=samples), training=True)
        losses = model.train()(**data, mode="loss")
        assert list(losses) == ["decode.loss_silog"]
        model.zero_grad()
        losses["decode.loss_silog"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decode_head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("stitch", ["S", "L", "S1-L4"])
def test_its_costs_are_counted(stitch: str, make_estimator: Callable[..., Any]) -> None:
    model = make_estimator(**FLIP)
    cost = model_costs(model)[model.backbone.space[stitch].id]
    deployed = copy.deepcopy(model).eval()
    deployed.backbone.network = deployed.backbone.network.merged()
    deployed.backbone.set_stitch(stitch)
    assert cost.flops == count_flops(deployed, torch.zeros(1, 3, 32, 48))
    assert cost.params > sum(p.numel() for p in model.decode_head.parameters())
