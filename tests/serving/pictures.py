"""Contents of image files, as clients send them."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def photo(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of some colours, (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def content(image: Image.Image, suffix: str = "png", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def huge_png(side: int = 30_000) -> bytes:
    """A small PNG that says that it has ``side`` x ``side`` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )
