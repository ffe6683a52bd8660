"""Decoding: the values that were written, or an error. Never others."""

import io
import itertools
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from mmsnnet.datasets.transforms.headers import read_header
from mmsnnet.datasets.transforms.pixels import check_backend, check_max_value, decode, to_byte_range
from mmsnnet.errors import DataError, SettingError


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    if options.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(file := io.BytesIO(), pixels, **options)
    return file.getvalue()


def read(content: bytes, backend: str = "cv2", color: str = "unchanged") -> np.ndarray:
    return decode(content, read_header(content, "a.tif"), "a.tif", backend, color)


def written(dtype: str, bands: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 100, (6, 8, bands)).astype(dtype)
    if dtype[0] == "i":
        pixels[0, 0] = -3
    if dtype[0] == "f":
        pixels[0, 0] = 0.25
    return pixels if bands > 1 else pixels[..., 0]


def tiffs(dtype: str) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Pixels, and how to write them: every number of bands, layout and meaning."""
    kinds = []
    extras = (None, "unspecified", "unassalpha", "assocalpha")
    for bands, planar, photometric, extra in itertools.product(
        range(1, 6), ("contig", "separate"), ("minisblack", "rgb"), extras
    ):
        more = bands - (3 if photometric == "rgb" else 1)
        if more < 0 or (extra and not more) or (bands == 1 and planar == "separate"):
            continue
        options = dict(photometric=photometric)
        if bands > 1:
            options["planarconfig"] = planar
        if extra:
            options["extrasamples"] = [extra] + ["unspecified"] * (more - 1)
        kinds.append((written(dtype, bands), options))
    return kinds


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("backend", ["cv2", "pillow", "tifffile"])
def test_a_tiff_is_read_as_it_was_written_or_refused(dtype: str, backend: str) -> None:
    outcomes: Counter = Counter()
    for pixels, options in tiffs(dtype):
        try:
            found = read(tiff(pixels, **options), backend)
        except DataError as error:
            assert "\n" not in str(error).strip() and str(error).startswith("a.tif")
            outcomes["refused"] += 1
            continue
        expected = pixels
        if pixels.ndim == 3 and pixels.shape[2] >= 3 and backend != "tifffile":
            expected = pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]  # blue first
        np.testing.assert_array_equal(found.astype("f8"), expected.astype("f8"), err_msg=str(options))
        outcomes["read"] += 1
    if backend == "tifffile":
        assert not outcomes["refused"]
    elif (backend, dtype) not in {("cv2", "u4"), ("cv2", "f2"), ("pillow", "f2"), ("pillow", "f8")}:
        assert outcomes["read"]  # one band at least


@pytest.mark.parametrize("backend", ["cv2", "pillow", "tifffile"])
@pytest.mark.parametrize("color", ["color", "grayscale"])
def test_colours_keep_every_band_or_are_refused(backend: str, color: str) -> None:
    """A band may be dropped where it is alpha, and nowhere else."""
    for pixels, options in tiffs("u1"):
        bands = pixels.shape[2] if pixels.ndim == 3 else 1
        more = bands - (3 if options["photometric"] == "rgb" else 1)
        if more:  # what tifffile marks as alpha by itself included
            with pytest.raises(DataError, match=rf"(?s)a\.tif (has|is a TIFF of) {bands} bands"):
                read(tiff(pixels, **options), backend, color)
            if more > 1 or "alpha" not in options.get("extrasamples", [""])[0]:
                continue
            pixels = pixels.copy()
            pixels[..., -1] = np.where(pixels[..., -1] > 50, 255, 0)  # seen or not
        try:
            found = to_byte_range(read(tiff(pixels, **options), backend, color), "a.tif", None, color)
        except DataError:
            continue  # a backend that would change the colours
        colours = pixels[..., :3] if bands >= 3 else np.stack([pixels if bands == 1 else pixels[..., 0]] * 3, -1)
        if color == "color":
            np.testing.assert_array_equal(found, colours[..., ::-1], err_msg=str(options))
        else:
            gray = colours @ [0.299, 0.587, 0.114]
            np.testing.assert_allclose(found, gray, atol=1)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("backend", ["cv2", "tifffile"])
def test_near_infrared_that_a_library_marks_as_alpha_is_not_dropped(backend: str, dtype: str) -> None:
    with pytest.raises(DataError, match=r"a\.tif has 4 bands, the last marked as alpha.*'unchanged'.*in_chans=4"):
        read(tiff(written(dtype, 4)), backend, "color")


@pytest.mark.parametrize("backend", ["cv2", "tifffile"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_four_bands_as_tifffile_writes_them_by_default(backend: str, dtype: str) -> None:
    pixels = written(dtype, 4)
    found = read(tiff(pixels), backend)
    np.testing.assert_array_equal(found, pixels if backend == "tifffile" else pixels[..., [2, 1, 0, 3]])


@pytest.mark.parametrize("backend", ["cv2", "pillow", "tifffile"])
def test_several_pictures_in_a_tiff_are_refused(backend: str) -> None:
    """As bands come out that are written one after the other."""
    with pytest.raises(DataError, match=r"several pictures.*\(height, width, bands\)"):
        read(tiff(np.zeros((4, 6, 8), np.uint8), photometric="minisblack"), backend)


def packed_12_bits() -> bytes:
    """A TIFF of one row, 0, 1, 2048, 4095, in 12 bits each: one of 6 bytes with other numbers in its directory."""
    content = bytearray(tiff(np.array([[0x00, 0x00, 0x01, 0x80, 0x0F, 0xFF]], np.uint8), byteorder="<"))
    start = int.from_bytes(content[4:8], "little")
    for entry in range(start + 2, start + 2 + 12 * int.from_bytes(content[start : start + 2], "little"), 12):
        tag = int.from_bytes(content[entry : entry + 2], "little")
        if tag in (256, 258):
            content[entry + 8 : entry + 12] = {256: 4, 258: 12}[tag].to_bytes(4, "little")
    return bytes(content)


def test_12_bits_are_not_stretched() -> None:
    assert read(packed_12_bits(), "pillow").tolist() == [[0, 1, 2048, 4095]]
    with pytest.raises(DataError, match=r"1 band of 12 bits, which 'cv2' does not give as stored.*'pillow'"):
        read(packed_12_bits())


@pytest.mark.parametrize("suffix", [".png", ".jp2", ".pnm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_of_other_formats_are_read_whole_or_refused(suffix: str, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (64, 64, channels), dtype=np.uint16).squeeze()
    options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000] if suffix == ".jp2" else []
    content = cv2.imencode(suffix, pixels, options)[1].tobytes()
    for color in ("unchanged", "color"):
        expected = np.stack([pixels] * 3, -1) if color == "color" and channels == 1 else pixels
        np.testing.assert_array_equal(read(content, "cv2", color), expected)
    if channels == 1:
        np.testing.assert_array_equal(read(content, "pillow", "color"), pixels)
    else:
        with pytest.raises(DataError, match="16 bits a channel, but 'pillow' keeps 8: set imdecode_backend='cv2'"):
            read(content, "pillow", "color")


@pytest.mark.parametrize(("dtype", "white"), [("u2", 4095), ("u2", 65535), ("i4", 1000), ("f4", 1.0), ("f8", 0.5)])
def test_white_becomes_255(dtype: str, white: float) -> None:
    values = (np.linspace(0, 1, 24).reshape(4, 6) * white).astype(dtype)
    found = to_byte_range(values, "a.tif", white)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values.astype("f8") / white * 255, rtol=1e-6)
    colours = to_byte_range(values, "a.tif", white, "color")
    np.testing.assert_array_equal(colours, np.stack([found] * 3, -1))


def test_8_bits_stay_as_they_are_and_one_bit_is_black_or_white() -> None:
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert to_byte_range(values, "a.tif", 4095) is values
    np.testing.assert_array_equal(to_byte_range(values > 5, "a.tif", None), np.where(values > 5, 255, 0))


@pytest.mark.parametrize(
    ("values", "max_value", "message"),
    [
        (np.array([[0, 4095]], "u2"), None, r"uint16 values from 0 to 4095.*set max_value .*4095 for 12 bits"),
        (np.array([[0, 4096]], "u2"), 4095, r"uint16 values from 0 to 4096: expected 0 to max_value=4095"),
        (np.array([[-1, 5]], "i2"), 4095, r"int16 values from -1 to 5: expected 0 to max_value=4095"),
        (np.array([[-32768, 5]], "i2"), 65535, r"int16 values from -32768 to 5"),
        (np.array([[2**32 - 1, 5]], "u4"), 65535, r"uint32 values from 5 to 4294967295"),
        (np.array([[np.nan, 0.5]], "f4"), 1.0, r"1 of 2 values that are not finite, such as nan"),
        (np.array([[np.nan, 0.5]], "f4"), None, r"1 of 2 values that are not finite, such as nan"),
        (np.array([[np.inf, 0.5]], "f8"), 1.0, r"1 of 2 values that are not finite, such as inf"),
        (np.array([[-np.inf, 0.5]], "f8"), 1.0, r"1 of 2 values that are not finite, such as -inf"),
        (np.array([[1.5, 0.5]], "f4"), 1.0, r"float32 values from 0\.5 to 1\.5: expected 0 to max_value=1\.0"),
        (np.array([[1j]]), 1.0, r"values of type complex128"),
    ],
)
def test_values_without_a_clear_meaning_are_refused(values: np.ndarray, max_value: float | None, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.tif has {message}"):
        to_byte_range(values, "a.tif", max_value)


def test_zero_for_white_is_refused_where_a_decoder_does_not_heed_it() -> None:
    gray = np.arange(48, dtype=np.uint8).reshape(6, 8)
    np.testing.assert_array_equal(read(tiff(gray, photometric="miniswhite")), 255 - gray)
    for content, backend in (
        (tiff(gray, photometric="miniswhite"), "tifffile"),
        (tiff(gray.astype(np.uint16), photometric="miniswhite"), "cv2"),
    ):
        with pytest.raises(DataError, match=r"MINISWHITE.*photometric='minisblack'"):
            read(content, backend)


def test_a_palette_gives_colours_or_is_refused() -> None:
    colormap = np.zeros((3, 256), np.uint16)
    colormap[0] = 257 * np.arange(256)  # red
    content = tiff(np.arange(48, dtype=np.uint8).reshape(6, 8), photometric="palette", colormap=colormap)
    for backend in ("cv2", "pillow"):
        assert read(content, backend, "color")[0, 5].tolist() == [0, 0, 5]
    with pytest.raises(DataError, match=r"palette.*imdecode_backend='cv2'"):
        read(content, "tifffile", "color")


def test_a_png_of_8_bits_is_decoded_as_by_mmcv() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
        Image.fromarray(pixels).convert("RGBA" if mode in ("LA", "RGBA") else "RGB").convert(mode).save(
            file := io.BytesIO(), "PNG"
        )
        expected = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(read(file.getvalue(), "cv2", "color"), expected)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "4095", True])
def test_max_value_is_a_number_above_0(value: Any) -> None:
    with pytest.raises(SettingError, match=r"Load: max_value .*above 0"):
        check_max_value(value, "Load")


def test_a_backend_is_one_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend("tifffile", "Load")
    monkeypatch.setattr("mmcv.image.io.tifffile", None)
    for name, message in (
        ("gdal", "must be one of cv2"),
        ("turbojpeg", "PyTurboJPEG"),
        ("tifffile", "pip install tifffile"),
    ):
        with pytest.raises(SettingError, match=f"Load: imdecode_backend.*{message}"):
            check_backend(name, "Load")
