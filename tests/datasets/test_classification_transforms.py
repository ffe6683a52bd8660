"""The pipeline of classification: Pillow's images, DeiT-III's augmentation, and what a model gets."""

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch
from mmengine.dataset import Compose
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from mmsnnet.apis import load_config
from mmsnnet.errors import DataError, SettingError
from mmsnnet.registry import TRANSFORMS

REPOSITORY = Path(__file__).parents[2]
CONFIG = "configs/imagenet/stitched-deit3-s-l_8xb64-50e_imagenet-224x224.py"


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def apply(image: Image.Image, **settings: Any) -> Tensor:
    transform = TRANSFORMS.build(dict(type="mmsnnet.TimmTransform", **settings))
    return transform(dict(img=image))["img"]


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


PLAIN = dict(is_training=True, train_crop_mode="src", color_jitter=None, hflip=0.0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_images_of_every_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    grey = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6) // 255 * 255)
    grey.convert("RGB").convert(mode).save(path)
    image = TRANSFORMS.build(dict(type="mmsnnet.LoadPillowImage"))(dict(img_path=str(path)))["img"]
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.array_equal(np.array(image), np.array(grey.convert("RGB")))


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no image {tmp_path}/a.jpg"):
        TRANSFORMS.build(dict(type="mmsnnet.LoadPillowImage"))(dict(img_path=f"{tmp_path}/a.jpg"))


def load(path: Path, **settings: Any) -> Image.Image:
    return TRANSFORMS.build(dict(type="mmsnnet.LoadPillowImage", **settings))(dict(img_path=str(path)))["img"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :16] = 255
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(np.array(load(tmp_path / f"a.{suffix}")) > 128, expected > 128)


@pytest.mark.parametrize(("suffix", "channels"), [("png", 1), ("png", 3), ("tif", 1), ("tif", 3)])
def test_16_bits_need_a_white(tmp_path: Path, suffix: str, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, channels), dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), values)
    with pytest.raises(DataError, match=rf"{path} has uint16 values .*set max_value of .*LoadPillowImage"):
        load(path)
    image = load(path, max_value=4095)
    assert image.mode == "RGB"
    expected = np.rint(np.broadcast_to(values, (8, 8, 3))[..., ::-1] / 4095 * 255)
    assert np.array_equal(np.array(image), expected)
    with pytest.raises(DataError, match="expected 0 to max_value=255"):
        load(path, max_value=255)


def test_a_deep_image_is_turned_upright(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 100
    tags = [(274, 3, 1, 6, True)]
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=tags)
    expected = np.rint(np.rot90(values, -1) / 2300 * 255)
    assert np.array_equal(np.array(load(tmp_path / "a.tif", max_value=2300))[..., 0], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 6), np.nan, np.float32), "24 of 24 values that are not finite"),
        (np.full((4, 6), -1, np.int16), "values from -1 to -1"),
        (np.full((4, 6), -1, np.int8), "values from -1 to -1"),
        (np.resize(np.arange(96, dtype=np.uint8), (4, 6, 4)), "4 bands"),
        (np.zeros((3, 40, 60), np.uint8), "several pictures"),
    ],
)
def test_values_without_a_clear_meaning_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb" if values.shape[-1] == 4 else "minisblack")
    with pytest.raises(DataError, match=rf"a\.tif (has|is) .*{message}"):
        load(tmp_path / "a.tif", max_value=100)


@pytest.mark.parametrize("kind", ["no image", "cut short", "damaged", "empty"])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    noise(32, 32).save(path)
    whole = path.read_bytes()
    damaged = whole[:60] + bytes(20) + whole[80:]
    path.write_bytes({"no image": b"hello", "cut short": whole[:1000], "damaged": damaged, "empty": b""}[kind])
    undecodable = f"{path}: expected an image, found a file that cannot be decoded"
    with pytest.raises(ValueError, match=f"{path} is empty" if kind == "empty" else undecodable):
        TRANSFORMS.build(dict(type="mmsnnet.LoadPillowImage"))(dict(img_path=str(path)))


def test_the_simple_random_crop_is_a_window_of_the_image_and_its_reflection() -> None:
    image = noise(8, 8)
    mirrored = np.pad(np.array(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {mirrored[y : y + 8, x : x + 8].tobytes(): (y, x) for y in range(9) for x in range(9)}
    torch.manual_seed(0)
    crops = [apply(image, input_size=8, **PLAIN) for _ in range(200)]
    assert all(crop.dtype == torch.uint8 and crop.shape == (3, 8, 8) for crop in crops)
    found = [windows[crop.permute(1, 2, 0).numpy().tobytes()] for crop in crops]
    assert {y for y, _ in found} == {x for _, x in found} == set(range(9))


def test_the_shorter_side_is_resized_to_the_crop() -> None:
    image = noise(24, 40)
    mirrored = np.pad(np.array(image.resize((20, 12), Image.BICUBIC)), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {mirrored[y : y + 12, x : x + 12].tobytes() for y in range(9) for x in range(17)}
    for _ in range(10):
        crop = apply(image, input_size=12, interpolation="bicubic", **PLAIN)
        assert crop.permute(1, 2, 0).numpy().tobytes() in windows


def test_half_of_the_images_are_flipped() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], (24, 1, 3)))
    torch.manual_seed(0)
    crops = [apply(ramp, input_size=24, **PLAIN | dict(hflip=0.5)) for _ in range(200)]
    flipped = sum(bool(crop[0, 0, 8] > crop[0, 0, 15]) for crop in crops)
    assert 75 < flipped < 125


def test_three_augment_is_one_of_grey_solarised_and_blurred() -> None:
    """On an image whose every crop is the same but for its reflection: two vertical halves, one dark, one bright."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = (10, 60, 110), (140, 190, 240)
    torch.manual_seed(0)
    random.seed(0)
    kinds = {"grey": 0, "solarised": 0, "blurred": 0}
    for _ in range(150):
        crop = apply(Image.fromarray(pixels), input_size=16, **PLAIN, auto_augment="3a").int()
        colours = {tuple(pixel) for pixel in crop.flatten(1).T.tolist()}
        if all(red == green == blue for red, green, blue in colours):
            kinds["grey"] += 1
        elif colours == {(10, 60, 110), (255 - 140, 255 - 190, 255 - 240)}:  # what is above 128 is inverted
            kinds["solarised"] += 1
        else:
            assert crop[0].max() <= 140 and crop[2].min() >= 110  # nothing but mixtures of the two
            kinds["blurred"] += 1
    assert all(count > 30 for count in kinds.values()), kinds


def test_three_augment_blurs_by_at_most_two_pixels() -> None:
    """DeiT-III draws the radius between 0.1 and 2."""
    pixels = np.zeros((33, 33, 3), np.uint8)
    pixels[16, 16] = 255
    point = Image.fromarray(pixels)
    widest = np.array(point.filter(ImageFilter.GaussianBlur(2.0))).max()
    settings = dict(type="mmsnnet.TimmTransform", input_size=33, **PLAIN, auto_augment="3a")
    _, _, augment, _ = TRANSFORMS.build(settings).transform.transforms
    random.seed(0)
    peaks = [int(np.array(augment(point)).max()) for _ in range(100)]
    blurred = [peak for peak in peaks if 0 < peak < 255]  # solarised, the point is black; grey, it is white
    assert len(set(blurred)) > 10 and widest <= min(blurred) < 2 * widest


def test_testing_takes_the_middle_of_the_image_resized_to_the_crop() -> None:
    image = noise(20, 40)
    found = apply(image, input_size=10, crop_pct=1.0, interpolation="bicubic")
    expected = to_tensor(image.resize((20, 10), Image.BICUBIC))[:, :, 5:15]
    assert torch.equal(found, expected)


def test_a_typing_mistake_is_an_error() -> None:
    with pytest.raises(SettingError, match=r"colour_jitter would have no effect.*leave it out, or set one of hflip"):
        apply(noise(8, 8), input_size=8, is_training=True, colour_jitter=0.3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(re_prob=0.25, re_mode="pixel"), r"re_mode, re_prob would have no effect.*set model\.erasing=dict"),
        (dict(crop_pct=0.9), "crop_pct would have no effect with is_training=True"),
        (dict(train_crop_mode="src", scale=(0.5, 1.0)), "scale would have no effect with .* train_crop_mode='src'"),
        (dict(is_training=False, hflip=0.5), "hflip would have no effect with is_training=False"),
        (dict(auto_augment="rand-m9", color_jitter=0.4), "beside auto_augment='rand-m9': remove color_jitter from"),
        (dict(auto_augment="rand-m9", color_jitter_prob=0.5), "remove color_jitter_prob from TimmTransform"),
    ],
)
def test_what_timm_would_ignore_is_an_error(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        apply(noise(8, 8), input_size=8, **{"is_training": True, **settings})


@pytest.mark.parametrize(
    ("training", "settings"),
    [
        (True, dict(hflip=0.0)),
        (True, dict(vflip=1.0)),
        (True, dict(scale=(0.1, 0.1))),
        (True, dict(ratio=(3.0, 3.0))),
        (True, dict(color_jitter=None)),
        (True, dict(color_jitter_prob=0.0)),
        (True, dict(grayscale_prob=1.0)),
        (True, dict(gaussian_blur_prob=1.0)),
        (True, dict(auto_augment="3a")),
        (True, dict(auto_augment="rand-m9", color_jitter=None)),
        (True, dict(interpolation="nearest")),
        (False, dict(crop_pct=0.5)),
        (False, dict(crop_mode="squash")),
        (False, dict(crop_mode="border", crop_border_pixels=1)),
        (False, dict(interpolation="nearest")),
    ],
)
def test_what_is_allowed_has_an_effect(training: bool, settings: dict[str, Any]) -> None:
    def results(**options: Any) -> list[Tensor]:
        found = []
        for seed in range(3):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            found.append(apply(noise(40, 60), input_size=24, is_training=training, **options))
        return found

    assert not all(map(torch.equal, results(), results(**settings)))


@pytest.mark.parametrize("training", [dict(), dict(is_training=False)])
@pytest.mark.parametrize("mode", ["src", "rrc", "rkrc", "rkrr"])
def test_a_random_crop_is_for_training_alone(mode: str, training: dict[str, bool]) -> None:
    assert apply(noise(8, 8), input_size=8, train_crop_mode=mode, is_training=True).shape == (3, 8, 8)
    with pytest.raises(ValueError, match=f"train_crop_mode='{mode}' .* set is_training=True"):
        apply(noise(8, 8), input_size=8, train_crop_mode=mode, **training)


def test_an_unknown_crop_is_an_error_that_says_which_there_are() -> None:
    with pytest.raises(ValueError, match="rrc, rkrc, rkrr, src; got 'scr'"):
        apply(noise(8, 8), input_size=8, train_crop_mode="scr", is_training=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_pipelines_of_imagenet_give_what_a_classifier_takes(tmp_path: Path, split: str) -> None:
    noise(300, 260).save(tmp_path / "a.png")
    config = load_config(REPOSITORY / CONFIG)
    pipeline = Compose(config[f"{split}_dataloader"].dataset.pipeline)
    found = pipeline(dict(img_path=str(tmp_path / "a.png"), gt_label=7, num_classes=1000))
    assert set(found) == {"inputs", "data_samples"}
    assert (found["inputs"].shape, found["inputs"].dtype) == ((3, 224, 224), torch.uint8)
    sample = found["data_samples"]
    assert (sample.gt_label, sample.num_classes, sample.img_path) == (7, 1000, str(tmp_path / "a.png"))


def test_training_augments_as_published() -> None:
    """Resize, crop with reflection, flip, one of three, colour jitter, in this order, and no random erasing."""
    config = load_config(REPOSITORY / CONFIG)
    (settings,) = (step for step in config.train_dataloader.dataset.pipeline if "TimmTransform" in step.type)
    steps = TRANSFORMS.build(settings).transform.transforms
    assert [type(step).__name__ for step in steps] == [
        "Resize",
        "RandomCrop",
        "RandomHorizontalFlip",
        "AutoAugment",
        "ColorJitter",
        "MaybePILToTensor",
    ]
    resize, crop, flip, augment, jitter, _ = steps
    assert (resize.size, resize.interpolation.value) == (224, "bicubic")
    assert (crop.size, crop.padding, crop.padding_mode, flip.p) == ((224, 224), 4, "reflect", 0.5)
    assert sorted(op.name for (op,) in augment.policy) == ["Desaturate", "GaussianBlurRand", "Solarize"]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3) and jitter.hue is None
