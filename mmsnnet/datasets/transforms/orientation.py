"""EXIF orientation: load an image and its annotation in one frame, as stored or rotated upright.

A camera stores the pixels of its sensor and records in the EXIF orientation how to rotate them. Label maps, depth maps
and COCO files have no such tag: they fit either the stored picture or the rotated one that viewers show. The image
loader decides which, so the loaders of annotations need not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine import fileio

from mmsnnet.datasets.transforms.headers import Header, read_picture
from mmsnnet.errors import DataError

PENDING_ORIENTATION = "pending_orientation"
"""Key of a sample: the EXIF orientation that its loaded image still has; 1 for upright."""
_MAPS = dict(seg_map_path="label map", depth_map_path="depth map")
_INVERSE = {6: 8, 8: 6}
Size = tuple[int, int]


def rotate_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate stored pixels (H, W) or (H, W, C) upright by their EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def rotate_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo :func:`rotate_upright`."""
    return pixels if orientation == 1 else rotate_upright(pixels, _INVERSE.get(orientation, orientation))


def annotation_is_upright(results: dict[str, Any], orientation: int, stored: Size, backend_args: dict | None) -> bool:
    """Whether the annotation of a sample fits its image rotated upright, rather than as stored.

    Sizes decide: that of a label map or depth map, or the height and width in a COCO file. A map with the same
    orientation as its image is stored in the image's frame. An image without annotation is rotated.

    Args:
        results: a sample with ``img_path``.
        orientation: EXIF orientation of the image, 2 to 8.
        stored: (height, width) of the stored image.
        backend_args: arguments of mmengine's file backend.

    Raises:
        DataError: the annotation fits neither frame, or its size fits both, as for a square picture.
    """
    path = results["img_path"]
    upright = stored[::-1] if orientation >= 5 else stored
    frames = {False, True}  # whether the frame is upright
    annotations = []
    for key, kind in _MAPS.items():
        map_path = results.get(key)
        # The map's loader reports a missing map; a test set without annotation has paths but no files.
        if not map_path or not fileio.exists(map_path, backend_args=backend_args):
            continue
        annotations.append(f"the {kind} {map_path}")
        _, header = read_picture(map_path, backend_args, kind)
        if header.orientation == orientation and header.tiff is None:
            frames &= {False}
        elif size := header.size:
            frames &= _fitting(size, stored, upright, path, orientation, f"{annotations[-1]} has")
    if size := stated_size(results):
        frames &= _fitting(size, stored, upright, path, orientation, f"{annotation_file(results)} states")
        if results.get("instances"):
            annotations.append(annotation_file(results))
    if not frames:
        raise DataError(
            f"{path} has EXIF orientation {orientation}, and {' and '.join(annotations)} do not agree on its frame: "
            "write the image upright, without the tag"
        )
    if len(frames) == 2 and annotations:
        raise DataError(
            f"{path} has EXIF orientation {orientation}, and the size of {annotations[0]} does not tell whether to "
            "rotate the image: set exif='apply' of mmsnnet.LoadImage if annotations were drawn on the picture that "
            "viewers show, exif='ignore' if on the stored pixels"
        )
    return True in frames


def stated_size(results: dict[str, Any]) -> Size | None:
    """Image size (height, width) that the data set states, as COCO files do; None without."""
    return (results["height"], results["width"]) if "height" in results and "width" in results else None


def annotation_file(results: dict[str, Any]) -> str:
    """Name of the file that states a size, for messages."""
    return results.get("ann_file") or "the data set's annotation file"


def check_map(
    path: str, kind: str, size: Size, header: Header, results: dict[str, Any], backend_args: dict | None
) -> None:
    """Check that a label map or depth map has the size of its loaded image, and is stored in its frame.

    Args:
        path: of the map.
        kind: ``'label map'`` or ``'depth map'``, for messages.
        size: (height, width) of the map.
        header: of the map.
        results: the sample, before or after loading its image.
        backend_args: arguments of mmengine's file backend.

    Raises:
        DataError: the map has another size or orientation than its image, or another loader than ours has loaded an
            image with an orientation.
    """
    if header.tiff is not None and header.orientation != 1:
        raise DataError(
            f"{path} is a TIFF with orientation {header.orientation}, which some programs apply and others ignore: "
            "write it without the tag, in its image's frame"
        )
    pending = results.get(PENDING_ORIENTATION)
    if pending is None:
        image = results.get("img_path")
        if "img" in results and image and fileio.exists(image, backend_args=backend_args):
            orientation = read_picture(image, backend_args)[1].orientation
            if orientation != 1:
                raise DataError(
                    f"{image} has EXIF orientation {orientation}, and its loader does not compare it with {path}: load "
                    "it with mmsnnet.LoadImage in place of LoadImageFromFile"
                )
        pending = 1
    if header.orientation not in (1, pending):
        raise DataError(
            f"{path} has EXIF orientation {header.orientation}, and its loaded image {results.get('img_path')} "
            f"{'has none' if pending == 1 else f'has {pending}'}: write the map without the tag, in its image's frame"
        )
    if "ori_shape" in results and size != tuple(results["ori_shape"]):
        raise DataError(
            f"{path}: a {kind} must have the size of its image, found {size} for {results.get('img_path')} of "
            f"{tuple(results['ori_shape'])} (height, width)"
        )


def _fitting(size: Size, stored: Size, upright: Size, image: str, orientation: int, source: str) -> set[bool]:
    """Frames of an image, upright or not, that have this size."""
    frames = {is_upright for is_upright, frame in ((False, stored), (True, upright)) if tuple(size) == tuple(frame)}
    if not frames:
        rotated = f", {upright} rotated by its EXIF orientation {orientation}" if upright != stored else ""
        raise DataError(
            f"{source} {tuple(size)} (height, width) for {image}, which is {stored} as stored{rotated}: an annotation "
            "must have the size of its image"
        )
    return frames
