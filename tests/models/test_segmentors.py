"""Predictions of images that are not whole patches: those of the padded image, with the padding cut off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from mmsnnet.models.backbones import StitchedBackbone

# Sizes around whole patches of 16 (the tiny anchors'), also below the window of slide inference and below one patch.
SIZES = [(32, 32), (33, 32), (47, 64), (20, 90), (7, 33)]
NORM = dict(type="BN")
HEADS: dict[str, dict[str, Any]] = {
    "SETRUPHead": dict(num_convs=1, up_scale=4, kernel_size=1),
    "FCNHead": dict(num_convs=1, concat_input=False),
    "UPerHead": dict(in_channels=[48, 48], in_index=[0, 1], pool_scales=(1, 2)),
    "mmsnnet.LinearHead": dict(),
}


@pytest.fixture
def make(segmentor_config: Callable[..., dict[str, Any]], randomise: Callable[..., None]) -> Callable[..., Any]:
    """``make(type, head, **changes)``: a segmentor in evaluation mode, stitched layers and all drawn anew."""

    def build(
        type: str = "mmsnnet.EncoderDecoder", head: str = "SETRUPHead", out_indices: Any = (1, 3), **changes: Any
    ) -> Any:
        config = segmentor_config(out_indices=out_indices)
        common = dict(type=head, in_channels=48, in_index=1, channels=8, num_classes=8, align_corners=False)
        config["decode_head"] = common | dict(norm_cfg=NORM, dropout_ratio=0) | HEADS.get(head, {})
        if head == "mmsnnet.LinearHead":
            del config["decode_head"]["channels"]
        model = MODELS.build(ConfigDict(config | dict(type=type) | changes))
        randomise(model)
        return model.eval()

    return build


def padded(images: Tensor) -> Tensor:
    """Images with zeros at the bottom and on the right, up to whole patches of 16."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % 16, 0, -height % 16))


def metas(images: Tensor) -> list[dict[str, Any]]:
    size = tuple(images.shape[-2:])
    return [dict(img_shape=size, ori_shape=size) for _ in images]


@torch.no_grad()
def same_as_padded(model: Any, images: Tensor) -> bool:
    height, width = images.shape[-2:]
    found = model.inference(images, metas(images))
    expected = model.inference(padded(images), metas(padded(images)))[..., :height, :width]
    assert found.shape[-2:] == (height, width)
    return torch.equal(found, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_predicts_what_it_does_for_the_padded_image(
    head: str, size: tuple[int, int], make: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    assert same_as_padded(make(head=head), make_images(2, *size))


@pytest.mark.parametrize("size", SIZES)
def test_a_window_predicts_what_it_does_padded(
    size: tuple[int, int], make: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    """Windows are not whole patches either, and larger than some of the images."""
    model = make(test_cfg=dict(mode="slide", crop_size=(40, 40), stride=(24, 24)))
    images = make_images(1, *size)
    height, width = size
    with torch.no_grad():
        found = model.inference(images, metas(images))
        total, times = torch.zeros_like(found), torch.zeros(1, 1, height, width)
        # mmseg's windows begin every 24 pixels, and are moved in where they would reach beyond the image.
        rows, columns = (
            [min(start, max(side - 40, 0)) for start in range(0, max(side - 40 + 23, 0) // 24 * 24 + 1, 24)]
            for side in size
        )
        for y in rows:
            for x in columns:
                window = images[..., y : y + 40, x : x + 40]
                whole = model.encode_decode(padded(window), metas(padded(window)))
                down, right = y + window.shape[-2], x + window.shape[-1]
                total[..., y:down, x:right] += whole[..., : down - y, : right - x]
                times[..., y:down, x:right] += 1
    torch.testing.assert_close(found, total / times, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["whole", "slide_flip"])
@pytest.mark.parametrize("size", [(33, 32), (47, 64)])
def test_depth(mode: str, size: tuple[int, int], make: Callable[..., Any], make_images: Callable[..., Tensor]) -> None:
    head = dict(type="mmsnnet.DPTDepthHead", in_channels=48, channels=8, post_process_channels=(4, 8, 8, 16))
    model = make(
        "mmsnnet.DepthEstimator",
        out_indices=(0, 1, 2, 3),
        decode_head=head,
        auxiliary_head=None,
        test_cfg=dict(mode=mode, crop_size=(64, 64), stride=(64, 64)),
    )
    assert same_as_padded(model, make_images(1, *size))


@pytest.mark.parametrize("size", [(33, 47), (48, 32)])
def test_losses_are_those_of_the_padded_images_with_nothing_to_learn_outside(
    size: tuple[int, int], make: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    model = make()
    images = make_images(2, *size)

    def samples(labels: Tensor) -> list[SegDataSample]:
        return [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in labels]

    labels = torch.randint(0, 8, (2, *size), generator=torch.Generator().manual_seed(1))
    outside = F.pad(labels, (0, -size[1] % 16, 0, -size[0] % 16), value=255)
    found, expected = model.loss(images, samples(labels)), model.loss(padded(images), samples(outside))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_depth_outside_of_the_image_is_not_measured(
    make_images: Callable[..., Tensor], make: Callable[..., Any]
) -> None:
    head = dict(type="mmsnnet.DPTDepthHead", in_channels=48, channels=8, post_process_channels=(4, 8, 8, 16))
    model = make("mmsnnet.DepthEstimator", out_indices=(0, 1, 2, 3), decode_head=head, auxiliary_head=None)
    seen: list[Tensor] = []
    model.decode_head.loss = lambda inputs, samples, _: seen.extend(s.gt_depth_map.data for s in samples) or {}
    sample = SegDataSample(gt_depth_map=PixelData(data=torch.ones(1, 20, 30)))
    model.loss(make_images(1, 20, 30), [sample])
    assert seen[0].shape == (1, 32, 32) and seen[0][:, :20, :30].all() and seen[0].sum() == 20 * 30


def test_labels_outside_of_the_image_are_what_the_head_ignores(
    make: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    model = make()
    model.decode_head.ignore_index = model.auxiliary_head.ignore_index = 3
    images, labels = (
        make_images(1, 20, 30),
        torch.randint(0, 3, (1, 20, 30), generator=torch.Generator().manual_seed(1)),
    )
    found = model.loss(images, [SegDataSample(gt_sem_seg=PixelData(data=labels))])
    outside = SegDataSample(gt_sem_seg=PixelData(data=F.pad(labels, (0, 2, 0, 12), value=3)))
    expected = model.loss(padded(images), [outside])
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_another_backbone_gets_images_as_they_are(make: Callable[..., Any], make_images: Callable[..., Tensor]) -> None:
    model = make()

    class Plain(torch.nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            assert images.shape[-2:] == (33, 47)
            return (F.adaptive_avg_pool2d(images, 4).repeat(1, 16, 1, 1),) * 2

    model.backbone = Plain()
    images = make_images(1, 33, 47)
    with torch.no_grad():
        assert model.inference(images, metas(images)).shape == (1, 8, 33, 47)


def test_whole_patches_are_as_in_mmseg(make: Callable[..., Any], make_images: Callable[..., Tensor]) -> None:
    ours, stock = make(), make(type="mmseg.EncoderDecoder")
    stock.load_state_dict(ours.state_dict())
    images = make_images(2, 48, 64)
    with torch.no_grad():
        assert torch.equal(ours.inference(images, metas(images)), stock.inference(images, metas(images)))


def test_a_stock_segmentor_is_warned_of_once(
    make: Callable[..., Any], make_images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("mmsnnet.models.backbones.image_sizes.print_log", lambda text, **_: said.append(text))
    stock, ours = make(type="mmseg.EncoderDecoder"), make()
    for model in (ours, stock):
        for size in ((48, 64), (33, 64), (20, 20)):
            images = make_images(1, *size)
            with torch.no_grad():
                model.inference(images, metas(images))
    assert len(said) == 1 and "33 x 64" in said[0] and "48 x 64" in said[0] and "mmsnnet.EncoderDecoder" in said[0]


def test_a_stock_segmentor_is_right_where_its_preprocessor_pads(
    make: Callable[..., Any], make_images: Callable[..., Tensor]
) -> None:
    """What the warning advises: mmseg then cuts the padding off itself."""
    preprocessor = dict(type="mmseg.SegDataPreProcessor", size=(32, 32), test_cfg=dict(size_divisor=16))
    stock = make(type="mmseg.EncoderDecoder", data_preprocessor=preprocessor)
    ours = make(data_preprocessor=dict(type="mmseg.SegDataPreProcessor", size=(32, 32)))
    stock.load_state_dict(ours.state_dict())
    image = make_images(1, 33, 47)[0]
    found = []
    for model in (stock, ours):
        sample = SegDataSample(metainfo=dict(img_shape=(33, 47), ori_shape=(33, 47)))
        (result,) = model.test_step(dict(inputs=[image.clone()], data_samples=[sample]))
        found.append(result.seg_logits.data)
    assert torch.equal(*found)


def test_size_to_which_images_are_padded(make_backbone: Callable[..., StitchedBackbone]) -> None:
    backbone = make_backbone()
    assert [backbone.padded_size(size) for size in ((1, 16), (17, 32), (512, 683))] == [(16, 16), (32, 32), (512, 688)]
