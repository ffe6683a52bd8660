"""What a file states before its pixels are decoded."""

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from mmsnnet.datasets.transforms.headers import read_header
from mmsnnet.errors import DataError

EXIF = {274: 6, 271: "Maker"}


def encoded(format: str, mode: str = "RGB", tags: dict[int, Any] | None = None, **options: Any) -> bytes:
    image = Image.new(mode, (48, 32))
    exif = image.getexif()
    exif.update(tags or {})
    image.save(file := io.BytesIO(), format, exif=exif, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    tifffile.imwrite(file := io.BytesIO(), pixels, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_read(format: str) -> None:
    assert read_header(encoded(format, tags=EXIF), "a").orientation == 6
    assert read_header(encoded(format), "a").orientation == 1
    assert read_header(encoded(format, tags=EXIF), "a").size == (32, 48)


def test_the_orientation_is_read_behind_other_segments_and_fill_bytes() -> None:
    plain = encoded("JPEG", tags=EXIF)
    comment = b"\xff\xfe\x00\x06Exif"
    assert read_header(plain[:2] + comment + b"\xff\xff" + plain[2:], "a").orientation == 6


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'


def test_xmp_says_it_where_exif_does_not() -> None:
    """As Pillow has it."""
    assert read_header(encoded("JPEG", xmp=XMP), "a").orientation == 8
    assert read_header(encoded("JPEG", tags=EXIF, xmp=XMP), "a").orientation == 6


def exif_behind_pixels() -> bytes:
    """A PNG whose EXIF block comes last."""
    whole = encoded("PNG", tags=EXIF)
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    last = whole.index(b"IEND") - 4
    return whole[:start] + whole[end:last] + whole[start:end] + whole[last:]


def test_exif_behind_the_pixels_of_a_png_is_read() -> None:
    assert read_header(exif_behind_pixels(), "a").orientation == 6


def test_a_damaged_exif_block_says_nothing() -> None:
    whole = encoded("JPEG", tags=EXIF)
    start = whole.index(b"Exif\0\0") + 6
    assert read_header(whole[:start] + b"garbage!" + whole[start + 8 :], "a").orientation == 1
    assert read_header(whole[:40], "a").orientation == 1


@pytest.mark.parametrize(("mode", "bits", "is_gray"), [("1", 1, True), ("L", 8, True), ("I;16", 16, True)])
def test_the_bits_of_a_png_are_read(mode: str, bits: int, is_gray: bool) -> None:
    header = read_header(encoded("PNG", mode), "a")
    assert (header.bits, header.is_gray) == (bits, is_gray)


def test_a_palette_is_not_gray() -> None:
    assert not read_header(encoded("PNG", "P"), "a").is_gray
    colormap = np.zeros((3, 256), np.uint16)
    assert not read_header(tiff(np.zeros((4, 6), np.uint8), photometric="palette", colormap=colormap), "a").is_gray


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_states_type_bands_and_orientation(dtype: str, byteorder: str, big: bool) -> None:
    options = dict(byteorder=byteorder, bigtiff=big, extratags=[(274, 3, 1, 7, True)], photometric="minisblack")
    header = read_header(tiff(np.zeros((4, 6, 5), dtype), planarconfig="contig", **options), "a")
    assert header.tiff.dtype == np.dtype(dtype) and header.tiff.bands == 5 and header.tiff.extra_bands == 4
    assert header.size == (4, 6) and header.orientation == 7
    assert header.has_unknown_band and not header.tiff.planar


@pytest.mark.parametrize(
    ("extra", "has_unknown_band"), [("unspecified", True), ("unassalpha", False), ("assocalpha", False)]
)
def test_a_fourth_band_is_alpha_where_a_tiff_says_so(extra: str, has_unknown_band: bool) -> None:
    header = read_header(tiff(np.zeros((4, 6, 4), np.uint8), photometric="rgb", extrasamples=[extra]), "a")
    assert header.has_unknown_band is has_unknown_band


def test_pictures_are_counted_without_reduced_copies() -> None:
    pixels = np.zeros((2, 16, 16), np.uint8)
    assert read_header(tiff(pixels, photometric="minisblack"), "a").tiff.pages == 2
    with tifffile.TiffWriter(file := io.BytesIO()) as writer:
        writer.write(pixels[0], photometric="minisblack")
        writer.write(pixels[0, ::2, ::2], photometric="minisblack", subfiletype=1)
    assert read_header(file.getvalue(), "a").tiff.pages == 1


def test_a_tiff_cut_short_is_named() -> None:
    with pytest.raises(DataError, match=r"a\.tif is a damaged or truncated TIFF"):
        read_header(tiff(np.zeros((4, 6), np.uint8))[:30], "a.tif")


def test_directories_in_a_circle_end() -> None:
    content = bytearray(tiff(np.zeros((4, 6), np.uint8), byteorder="<"))
    start = int.from_bytes(content[4:8], "little")
    end = start + 2 + 12 * int.from_bytes(content[start : start + 2], "little")
    content[end : end + 4] = content[4:8]
    assert read_header(bytes(content), "a").tiff.pages == 1


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff"])
def test_a_file_that_is_no_picture_states_nothing(content: bytes) -> None:
    assert read_header(content, "a").size is None


def resized(format: str, width: int, height: int) -> bytes:
    """A file whose header states this size."""
    if format == "PPM":
        return f"P6 {width} {height} 255\n".encode()
    content = tiff(np.zeros((32, 48), np.uint8)) if format == "TIFF" else encoded(format)

    def replace(layout: str, *sizes: tuple[int, int]) -> None:
        nonlocal content
        old, new = (struct.pack(layout, *numbers) for numbers in zip(*sizes, strict=True))
        assert old in content
        content = content.replace(old, new)

    columns, rows = (48, width), (32, height)
    if format == "TIFF":
        replace("<HHII", (256, 256), (4, 4), (1, 1), columns)
        replace("<HHII", (257, 257), (4, 4), (1, 1), rows)
    elif format == "JPEG":
        replace(">HH", rows, columns)
    else:
        replace(dict(PNG=">II", GIF="<HH", BMP="<ii", WEBP="<HH")[format], columns, rows)
    if format == "WEBP":  # the canvas, by numbers of three bytes, one less than the size
        replace("<HBHB", (47, width - 1), (0, 0), (31, height - 1), (0, 0))
    if format == "PNG":
        content = content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]
    return content


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TIFF"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_limit_of_pixels_comes_before_that_of_pillow(format: str) -> None:
    width, height = (16_000, 15_000) if format == "WEBP" else (20_000, 19_000)
    content = resized(format, width, height)
    with pytest.raises(
        DataError, match=rf"^a has {width} x {height} pixels, and the limit is 1000 in all: .*max_pixels$"
    ):
        read_header(content, "a", max_pixels=1000)
    if format != "TIFF":
        with pytest.raises(DataError, match=r"^a is larger than Pillow's limit .*MAX_IMAGE_PIXELS$"):
            read_header(content, "a", max_pixels=width * height)


def directory(*tags: tuple[int, int]) -> bytes:
    """A TIFF without pixels, whose only directory has these tags in this order."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def test_the_first_of_equal_tags_counts_as_for_decoders() -> None:
    content = directory((256, 9000), (256, 8), (257, 9000), (257, 8))
    assert read_header(content, "a").size == (9000, 9000)
    with pytest.raises(DataError, match="9000 x 9000 pixels"):
        read_header(content, "a", max_pixels=1000)


def test_a_tiff_of_endless_directories_is_soon_read_or_refused() -> None:
    with pytest.raises(DataError, match="damaged or truncated TIFF"):
        read_header(directory((256, 8), (257, 8), *[(1000, 0)] * 60_000), "a")
    # Each directory is a reduced copy and has the next one behind it.
    copy = directory((254, 1), (256, 8), (257, 8))[8:-4]
    chain = b"".join(copy + struct.pack("<I", 8 + (len(copy) + 4) * number) for number in range(1, 300_001))
    start = time.monotonic()
    assert read_header(b"II*\0" + struct.pack("<I", 8) + chain, "a").tiff.pages == 1
    assert time.monotonic() - start < 1


def test_a_limit_of_pixels_refuses_a_file_of_unknown_size() -> None:
    content = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 30000\n"  # OpenCV decodes it, Pillow does not
    assert read_header(content, "a").size is None
    with pytest.raises(DataError, match=r"^a cannot be decoded: expected an image"):
        read_header(content, "a", max_pixels=1000)


def test_no_pixels_are_decoded_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    content = exif_behind_pixels()
    assert read_header(content, "a", max_pixels=48 * 32).orientation == 6
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decodes"))
    with pytest.raises(DataError, match="48 x 32 pixels"):
        read_header(content, "a", max_pixels=48 * 32 - 1)
