"""Decoding of pixels without loss: one rule for the loaders of all tasks.

A file is decoded as it is stored: unrotated, every band, every bit. OpenCV and Pillow drop bands, cut bits and rotate
images without a message, and a cast maps label 256 to 0. Values are therefore checked in the file's type before a cast.
"""

from __future__ import annotations

import math

import cv2
import mmcv
import numpy as np
from mmcv.image import io
from PIL.Image import DecompressionBombError

from mmsnnet.datasets.transforms.headers import Header, Tiff
from mmsnnet.datasets.transforms.orientation import rotate_back
from mmsnnet.errors import DataError, SettingError

IMAGE = "an image (JPEG, PNG, ...)"
_AS_STORED = cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_ANYDEPTH
_FLAGS: dict[str, dict[str, int | str]] = {
    "cv2": {
        "color": cv2.IMREAD_COLOR | _AS_STORED,
        "grayscale": cv2.IMREAD_GRAYSCALE | _AS_STORED,
        "unchanged": cv2.IMREAD_UNCHANGED,
    },
    "pillow": {"color": "color_ignore_orientation", "grayscale": "grayscale_ignore_orientation"},
}


def decode(content: bytes, header: Header, path: str, backend: str, color: str, expected: str = IMAGE) -> np.ndarray:
    """Decode the stored pixels of a file, (H, W) or (H, W, C), in the file's type.

    Args:
        header: of ``content``.
        path: for messages.
        backend: of mmcv: ``cv2``, ``pillow``, ``tifffile`` or ``turbojpeg``.
        color: ``color`` for blue, green, red; ``grayscale``; or ``unchanged`` for every band. With ``unchanged``,
            ``cv2`` and ``pillow`` give blue, green and red first, and ``tifffile`` gives the file's order.
        expected: the kind of file, for messages.

    Raises:
        DataError: the file cannot be decoded, or the backend would lose bands or bits.
    """
    if header.has_unknown_band and color != "unchanged":
        bands = header.tiff.bands if header.tiff else 4
        raise DataError(
            f"{path} has {bands} bands that are not all colours or alpha: color_type={color!r} would drop some; set "
            f"color_type='unchanged' of LoadImage, and in_chans={bands} of every anchor (docs/datasets.md)"
        )
    if header.tiff is not None:
        values = _decode_tiff(content, header.tiff, path, backend, color, expected)
        # OpenCV and Pillow always rotate a TIFF, even with flags against it.
        return values if backend == "tifffile" else rotate_back(values, header.orientation)
    if backend == "pillow" and header.bits > 8:
        if not header.is_gray:
            raise DataError(
                f"{path} has {header.bits} bits a channel, but 'pillow' keeps 8: set imdecode_backend='cv2'"
            )
        return _call(content, path, backend, "unchanged", expected)
    return _call(content, path, backend, color, expected)


def to_byte_range(values: np.ndarray, path: str, max_value: float | None, color: str = "unchanged") -> np.ndarray:
    """Scale values to the range from 0, black, to 255, white.

    8-bit values stay uint8. Others become ``255 * value / max_value`` in float32.

    Args:
        values: (H, W) or (H, W, C).
        path: for messages.
        max_value: the value of white in a file that does not have 8 bits; None makes such files errors.
        color: as in :func:`decode`; converts channels that the decoder left unchanged.

    Raises:
        DataError: values that are not 8-bit without ``max_value``, below 0, above it, or not finite.
    """
    if values.dtype == bool:
        values = values.view(np.uint8) * np.uint8(255)
    elif values.dtype != np.uint8:
        if values.dtype.kind not in "iuf":
            raise DataError(f"{path} has values of type {values.dtype}: expected integers or real numbers")
        low, high = values.min(), values.max()  # NaN if any value is NaN
        if not np.isfinite(low) or not np.isfinite(high):
            count = int((~np.isfinite(values)).sum())
            raise DataError(
                f"{path} has {count} of {values.size} values that are not finite, such as "
                f"{values[~np.isfinite(values)][0]}: write a finite value for unmeasured pixels"
            )
        if max_value is None:
            raise DataError(
                f"{path} has {values.dtype} values from {low} to {high}, and no setting tells the value of white: set "
                "max_value of mmsnnet.LoadImage or LoadPillowImage, such as 4095 for 12 bits and 65535 for 16"
            )
        if low < 0 or high > max_value:
            raise DataError(
                f"{path} has {values.dtype} values from {low} to {high}: expected 0 to max_value={max_value}, the "
                "value of white; set max_value, or clip the values in the file"
            )
        values = values.astype(np.float32) * np.float32(255 / max_value)
    return _with_colors(values, color)


def check_max_value(max_value: float | None, transform: str) -> None:
    """Raise SettingError unless ``max_value`` is None or a finite number above 0."""
    if max_value is None:
        return
    if isinstance(max_value, bool) or not isinstance(max_value, int | float) or not 0 < max_value < math.inf:
        raise SettingError(
            f"{transform}: max_value must be the value of white, such as 4095 for 12 bits, a finite number above 0; "
            f"got {max_value!r}"
        )


def check_backend(backend: str, transform: str) -> None:
    """Raise SettingError for a decoder that mmcv does not know, or whose package is missing."""
    if backend not in io.supported_backends:
        raise SettingError(
            f"{transform}: imdecode_backend must be one of {', '.join(io.supported_backends)}; got {backend!r}"
        )
    if backend == "tifffile" and io.tifffile is None:
        raise SettingError(f"{transform}: imdecode_backend='tifffile' needs the package: pip install tifffile")
    if backend == "turbojpeg" and io.jpeg is None:
        raise SettingError(
            f"{transform}: imdecode_backend='turbojpeg' needs the package PyTurboJPEG and a call of "
            "mmcv.use_backend('turbojpeg')"
        )


def describe(values: np.ndarray) -> str:
    """Describe type, shape and range of values, for messages."""
    extent = f", values from {values.min()} to {values.max()}" if values.size else ""
    return f"{values.dtype} of shape {values.shape}{extent}"


def _with_colors(values: np.ndarray, color: str) -> np.ndarray:
    if color == "unchanged" or (color == "grayscale" and values.ndim == 2):
        return values
    if values.ndim == 3 and values.shape[2] == 2:  # gray and alpha
        values = values[..., 0]
    if values.ndim == 2:
        return values if color == "grayscale" else np.stack([values] * 3, axis=-1)
    values = np.ascontiguousarray(values[..., :3])
    return cv2.cvtColor(values, cv2.COLOR_BGR2GRAY) if color == "grayscale" else values


def _call(content: bytes, path: str, backend: str, color: str, expected: str) -> np.ndarray:
    flag = _FLAGS[backend].get(color, color) if backend in _FLAGS else color
    try:
        values = mmcv.imfrombytes(content, flag=flag, backend=backend)
        if values is None:  # OpenCV's result for a file that it cannot decode
            raise ValueError("no image")
    # tifffile raises NotImplementedError for compressions that need imagecodecs.
    except (OSError, SyntaxError, ValueError, NotImplementedError, DecompressionBombError, cv2.error) as error:
        raise DataError(
            f"{path} cannot be decoded by {backend!r} ({str(error).strip()}): expected {expected}; the file is "
            "damaged, truncated, or of another kind"
        ) from error
    return values


def _decode_tiff(content: bytes, tiff: Tiff, path: str, backend: str, color: str, expected: str) -> np.ndarray:
    """Decode the stored pixels of a TIFF.

    OpenCV and Pillow lose bands or bits of many TIFFs, so the result is compared with the header.
    """
    if tiff.pages > 1:
        raise DataError(
            f"{path} is a TIFF of several pictures: expected one; write the bands of a picture as (height, width, "
            "bands), planarconfig='contig', and other pictures to separate files"
        )
    if tiff.zero_is_white and (tiff.bits > 8 or backend == "tifffile"):
        raise DataError(
            f"{path} is a TIFF with 0 as white (MINISWHITE), which {backend!r} ignores: write it with "
            "photometric='minisblack'"
        )
    plain = tiff.kind == "u" and tiff.bits <= 8 and not tiff.extra_bands
    if plain and backend in ("cv2", "pillow"):
        return _call(content, path, backend, color, expected)
    # OpenCV multiplies colours by unassociated alpha; Pillow divides by associated alpha.
    decoder = "pillow" if backend == "cv2" and tiff.bits == 8 and tiff.has_alpha and tiff.extra == (2,) else backend
    if decoder == "tifffile":
        values = _call_tifffile(content, tiff, path, color, expected)
    elif _gives_as_stored(decoder, tiff):
        values = _call(content, path, decoder, "unchanged", expected)
    else:
        raise _lossy(path, tiff, backend)
    bands = values.shape[2] if values.ndim == 3 else 1
    if values.dtype.kind in "iu" and tiff.kind in "iu" and values.dtype.itemsize == tiff.dtype.itemsize:
        values = values.view(tiff.dtype.newbyteorder(values.dtype.byteorder))  # Pillow's types are often unsigned
    if bands != tiff.bands or not np.can_cast(tiff.dtype, values.dtype):
        raise _lossy(path, tiff, backend)
    if tiff.has_alpha and color != "unchanged":
        alpha = values[..., -1]
        if ((alpha != 0) & (alpha != alpha.max())).any():  # libraries mark any fourth band as alpha, near infrared too
            raise DataError(
                f"{path} has {tiff.bands} bands, the last marked as alpha but with values from {alpha.min()} to "
                f"{alpha.max()}: color_type={color!r} would drop it; set color_type='unchanged' of LoadImage, and "
                f"in_chans={tiff.bands} of every anchor (docs/datasets.md)"
            )
    return values


def _call_tifffile(content: bytes, tiff: Tiff, path: str, color: str, expected: str) -> np.ndarray:
    values = _call(content, path, "tifffile", color, expected)
    if values.ndim == 3 and tiff.planar and tiff.bands > 1:
        values = np.moveaxis(values, 0, -1)
    if color != "unchanged":
        if tiff.has_palette or tiff.photometric > 3:
            raise DataError(
                f"{path} is a TIFF with a palette or with colours other than RGB, which 'tifffile' does not convert: "
                "set imdecode_backend='cv2'"
            )
        if values.ndim == 3 and values.shape[2] >= 3:
            values = values[..., [2, 1, 0, *range(3, values.shape[2])]]
    return values


def _gives_as_stored(decoder: str, tiff: Tiff) -> bool:
    """Whether OpenCV or Pillow keeps the values of a TIFF, in cases that type and shape of the result do not show."""
    if decoder == "pillow":
        return 1 not in tiff.extra and not (tiff.planar and tiff.bands == 2)  # Pillow loses the second of two planes
    is_known = f"{tiff.kind}{tiff.bits}" in ("u8", "u16", "i8", "i16", "i32", "f32", "f64")  # 12 bits become 16
    takes_planes = tiff.bits == 8 or tiff.bands == 1
    return (
        is_known and tiff.bands <= 4 and (takes_planes or not tiff.planar) and not (tiff.bits == 8 and 2 in tiff.extra)
    )


def _lossy(path: str, tiff: Tiff, backend: str) -> DataError:
    other = "pillow" if tiff.bits % 8 and backend != "pillow" else "tifffile"
    return DataError(
        f"{path} is a TIFF of {tiff.bands} band{'s' * (tiff.bands > 1)} of {tiff.bits} bits, which {backend!r} does "
        f"not give as stored: decode it with imdecode_backend={other!r}, or write it as (height, width, bands) with "
        "planarconfig='contig'"
    )
