"""Headers of picture files, read without decoding pixels."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from mmengine import fileio
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from mmsnnet.errors import DataError, MissingFileError

ORIENTATION = 0x0112
"""EXIF tag for how to rotate a picture; TIFF has the same tag."""
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # by the type of a tag
_PALETTE, _CMYK = 3, 5
# Real files have a few dozen entries and directories; a small file could have a directory at each of its bytes.
_MOST_ENTRIES, _MOST_DIRECTORIES = 1024, 256
_COLOURS = {0: 1, 1: 1, 2: 3, _PALETTE: 1, _CMYK: 4, 6: 3, 8: 3}  # channels of a photometric interpretation


@dataclass(frozen=True)
class Tiff:
    """Header of the first picture in a TIFF.

    Attributes:
        bands: channels of each pixel.
        kind, bits: NumPy's kind (``u``, ``i``, ``f`` or ``c``) and the bits of a value.
        extra: meanings of the bands after the colours: 0 unspecified, 1 and 2 alpha.
        planar: whether each band is stored as a separate plane.
        photometric: 0 gray with zero as white, 1 gray, 2 RGB, 3 palette, 5 CMYK.
        pages: number of pictures, without reduced copies and masks; counted up to 2.
    """

    bands: int
    kind: str
    bits: int
    extra: tuple[int, ...]
    planar: bool
    photometric: int
    pages: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest NumPy type that holds the bits of a value."""
        return np.dtype(f"{self.kind}{max(1, 2 ** (self.bits - 1).bit_length() // 8)}")

    @property
    def extra_bands(self) -> int:
        """Number of bands after the colours, alpha included."""
        return max(0, self.bands - _COLOURS.get(self.photometric, self.bands))

    @property
    def has_alpha(self) -> bool:
        """Whether alpha is the only band after the colours."""
        return self.extra_bands == 1 and self.extra[:1] in ((1,), (2,))

    @property
    def zero_is_white(self) -> bool:
        return self.photometric == 0

    @property
    def has_palette(self) -> bool:
        return self.photometric == _PALETTE


@dataclass(frozen=True)
class Header:
    """Header of a picture file.

    Attributes:
        orientation: the EXIF orientation, 1 to 8; 1 (upright) for files without one.
        size: (height, width) as stored; None if the file is damaged or of an unknown format.
        bits: of a value.
        is_gray: whether it has one channel and no palette.
        has_unknown_band: whether it has a band that is neither a colour nor alpha.
        tiff: the header of a TIFF.
    """

    orientation: int = 1
    size: tuple[int, int] | None = None
    bits: int = 8
    is_gray: bool = False
    has_unknown_band: bool = False
    tiff: Tiff | None = None


def read_picture(
    path: str,
    backend_args: dict | None = None,
    kind: str = "image",
    image: str | None = None,
    max_pixels: int | None = None,
) -> tuple[bytes, Header]:
    """Read a file and its header.

    Args:
        path: of the file.
        backend_args: arguments of mmengine's file backend.
        kind: the kind of file, for messages.
        image: the image of a label map or depth map, for messages.
        max_pixels: the most pixels that it may have; None for no limit but Pillow's.

    Raises:
        MissingFileError: the file does not exist.
        DataError: the file cannot be read, is empty, a damaged TIFF, or larger than a limit.
    """
    try:
        content = fileio.get(path, backend_args=backend_args)
    except FileNotFoundError:
        raise MissingFileError(f"no {kind} {path}{f' for the image {image}' if image else ''}") from None
    except OSError as error:
        raise DataError(f"{kind} {path} cannot be read: {error}") from error
    if not content:
        raise DataError(f"{kind} {path} is empty: it has 0 bytes")
    return content, read_header(content, path, max_pixels)


def read_image(
    results: dict[str, Any], backend_args: dict | None = None, max_pixels: int | None = None
) -> tuple[bytes, Header]:
    """Read the file of a sample's image, and its header.

    Args:
        results: a sample with ``img_path``. With ``img_bytes``, the contents of a file, nothing is read, and
            ``img_path`` is a name for messages.
        backend_args: as of :func:`read_picture`.
        max_pixels: as of :func:`read_picture`.

    Raises:
        MissingFileError, DataError: as of :func:`read_picture`.
    """
    path = results["img_path"]
    if "img_bytes" in results:
        content = results.pop("img_bytes")
        return content, read_header(content, path, max_pixels)
    return read_picture(path, backend_args, max_pixels=max_pixels)


def check_pixels(size: tuple[int, int], path: str, max_pixels: int | None) -> None:
    """Raise DataError for an image of ``size`` (height, width) with more than ``max_pixels`` pixels."""
    height, width = size
    if max_pixels is not None and height * width > max_pixels:
        raise DataError(
            f"{path} has {width} x {height} pixels, and the limit is {max_pixels} in all: cut it into tiles, or raise "
            "max_pixels"
        )


def read_header(content: bytes, path: str, max_pixels: int | None = None) -> Header:
    """Read the header of a file.

    Raises:
        DataError: the file is a damaged TIFF, it has more than ``max_pixels`` pixels or more than Pillow's limit, or
            its number of pixels is unknown and there is ``max_pixels``.
    """
    header = _tiff_header(content, path) if content.startswith(_TIFF) else _pillow_header(content, path, max_pixels)
    if header.size is not None:
        check_pixels(header.size, path, max_pixels)
    elif max_pixels is not None:  # decoders know more formats than Pillow, and some are small files of large pictures
        raise DataError(
            f"{path} cannot be decoded: expected an image (JPEG, PNG, ...); the file is damaged, truncated, or of "
            "another kind"
        )
    return header


def _pillow_header(content: bytes, path: str, max_pixels: int | None) -> Header:
    try:
        with Image.open(BytesIO(content)) as image:
            is_small = max_pixels is None or image.height * image.width <= max_pixels
            return Header(
                # Reading the orientation may decode pixels. A larger image is refused anyway.
                orientation=_orientation(image, content) if is_small else 1,
                size=(image.height, image.width),
                bits=_bits(image, content),
                is_gray=content[25] == 0 if image.format == "PNG" else image.mode in ("1", "L", "I;16", "I", "F"),
                # The standard has no such file. OpenCV and Pillow treat its fourth channel as alpha.
                has_unknown_band=image.format == "JPEG2000" and image.mode == "RGBA" and b"cdef" not in content[:4096],
            )
    except Image.DecompressionBombError as error:
        if max_pixels is not None and (size := _size_beyond_limit(content)) is not None:
            check_pixels(size, path, max_pixels)
        raise DataError(
            f"{path} is larger than Pillow's limit ({error}): cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return Header()  # a format without an orientation tag, or a damaged file, which its decoder reports


def _size_beyond_limit(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a file that ``Image.open`` refuses because of its size; None if the file is damaged.

    Pillow's limit is global, so it cannot be lifted while another thread decodes. Each format's class has none.
    """
    for open_format, accept in list(Image.OPEN.values()):
        if accept is None or accept(content[:16]) is True:
            with suppress(
                UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error
            ):
                image = open_format(BytesIO(content), "")
                return image.height, image.width
    return None


def exif_orientation(read_exif: Callable[[], Image.Exif]) -> int:
    """The orientation in an EXIF block; 1 if it has none, or cannot be read: viewers ignore such a block too."""
    try:
        return _defined(read_exif().get(ORIENTATION, 1))
    except (SyntaxError, struct.error):
        return 1


def _orientation(image: Image.Image, content: bytes) -> int:
    exif_follows_pixels = image.format == "PNG" and "exif" not in image.info and _has_chunk(content, b"eXIf")
    # PngImageFile.getexif decodes all pixels to find an EXIF block after them, so it is called only for such files.
    without_pixels = image.format == "PNG" and not exif_follows_pixels
    return exif_orientation(partial(Image.Image.getexif, image) if without_pixels else image.getexif)


def _has_chunk(png: bytes, name: bytes) -> bool:
    position = len(_PNG)
    while position + 8 <= len(png):
        if png[position + 4 : position + 8] == name:
            return True
        position += 12 + int.from_bytes(png[position : position + 4], "big")
    return False


def _defined(value: Any) -> int:
    """Orientation, or 1 for a value that EXIF does not define. Cameras write 0; viewers show such files as stored."""
    return int(value) if value in range(1, 9) else 1


def _bits(image: ImageFile, content: bytes) -> int:
    if image.format == "PNG":
        return content[24]
    if image.format == "JPEG2000":
        size = content.find(b"\xff\x4f\xff\x51")  # the start of the code stream and its segment SIZ
        return (content[size + 42] & 0x7F) + 1 if size >= 0 else 8
    if image.format == "PPM" and image.tile:
        codec, _, _, arguments = image.tile[0]
        if codec == "ppm" and isinstance(arguments, tuple):
            return int(arguments[1]).bit_length()  # the largest value
    return {"1": 1, "I;16": 16, "I": 32, "F": 32}.get(image.mode, 8)


def _tiff_header(content: bytes, path: str) -> Header:
    try:
        directories = _directories(content)
        first = next(directories)
        # Bits 0 and 2 of NewSubfileType: a reduced copy, as of pyramids and previews, and a mask.
        others = (tags for tags in directories if not tags.get(254, (0,))[0] & 0b101)
        tiff = Tiff(
            bands=first.get(277, (1,))[0],
            kind={2: "i", 3: "f", 5: "c", 6: "c"}.get(first.get(339, (1,))[0], "u"),
            bits=max(first.get(258, (1,))),
            extra=first.get(338, ()),
            planar=first.get(284, (1,))[0] == 2,
            photometric=first.get(262, (1,))[0],
            pages=1 if next(others, None) is None else 2,
        )
        return Header(
            orientation=_defined(first.get(ORIENTATION, (1,))[0]),
            size=(first[257][0], first[256][0]),
            bits=tiff.bits,
            is_gray=tiff.bands == 1 and not tiff.has_palette,
            has_unknown_band=tiff.extra_bands > 0 and not tiff.has_alpha,
            tiff=tiff,
        )
    except (KeyError, IndexError, StopIteration, struct.error) as error:
        raise DataError(f"{path} is a damaged or truncated TIFF: its first directory cannot be read") from error


def _directories(content: bytes) -> Iterator[dict[int, tuple[int, ...]]]:
    """Yield the integer tags of each directory of a TIFF or BigTIFF, with at most 16 values each.

    Pillow cannot read big-endian BigTIFF, and reads long lists of strips completely.
    """
    order = "<" if content[:2] == b"II" else ">"
    big = b"+" in content[2:4]
    # Formats of a count of entries, of an entry's tag, type and count, and of an offset.
    count_format, entry_format, offset_format = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    (offset,) = struct.unpack_from(order + offset_format, content, 8 if big else 4)
    seen: set[int] = set()
    while offset and offset not in seen and len(seen) < _MOST_DIRECTORIES:
        seen.add(offset)
        (count,) = struct.unpack_from(order + count_format, content, offset)
        if count > _MOST_ENTRIES:
            raise struct.error(f"a directory has {count} entries")
        position = offset + struct.calcsize("=" + count_format)
        width = struct.calcsize("=" + entry_format), struct.calcsize(offset_format)
        tags: dict[int, tuple[int, ...]] = {}
        for entry in range(position, position + count * sum(width), sum(width)):
            tag, kind, length = struct.unpack_from(order + entry_format, content, entry)
            if kind in _TIFF_NUMBERS and length:
                number, place = _TIFF_NUMBERS[kind], entry + width[0]
                if length * struct.calcsize("=" + number) > width[1]:
                    (place,) = struct.unpack_from(order + offset_format, content, place)
                # Decoders take the first of several entries.
                tags.setdefault(tag, struct.unpack_from(f"{order}{min(length, 16)}{number}", content, place))
        yield tags
        (offset,) = struct.unpack_from(order + offset_format, content, position + count * sum(width))
