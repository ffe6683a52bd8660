"""The frame that an image and its annotation share: as the camera stored it, or turned upright.

A camera stores pixels as its sensor has them and notes in the EXIF orientation how to turn them. Label maps, depth maps
and COCO files carry no such note: they fit either the picture as stored or the picture as viewers show it. The image
loader decides which, so that the loaders of annotations need not know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine import fileio

from mmsnnet.datasets.transforms.headers import Header, read_header, size_of
from mmsnnet.errors import DataError

LEFT = "orientation_left"
"""Key of a sample: the orientation that its image, as loaded, is still to be turned by; 1 for none."""
_MAPS = dict(seg_map_path="label map", depth_map_path="depth map")
_INVERSE = {6: 8, 8: 6}


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W) or (H, W, C), stored with an EXIF orientation, turned upright."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def turned_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright pixels as they are stored with an EXIF orientation."""
    return pixels if orientation == 1 else turned(pixels, _INVERSE.get(orientation, orientation))


def is_to_be_turned(
    results: dict[str, Any], orientation: int, stored: tuple[int, int], backend_args: dict | None
) -> bool:
    """Whether the annotation of a sample fits its image turned upright, rather than as stored.

    An annotation tells by its size: a label map, a depth map, or the height and width that a COCO file states. A map
    with the same orientation as its image is stored as the image is. An image without annotation is turned.

    Args:
        results: a sample, with ``img_path``.
        orientation: of the image, 2 to 8.
        stored: (height, width) of the image as stored.
        backend_args: of mmengine's file backend.

    Raises:
        DataError: the annotation fits neither, or its size cannot tell, as for a square picture.
    """
    path = results["img_path"]
    upright = stored[::-1] if orientation >= 5 else stored
    fits = {False, True}
    annotations = []
    for key, kind in _MAPS.items():
        map_path = results.get(key)
        # A missing map is its loader's to report; a test set without annotation has paths but no files.
        if not map_path or not fileio.exists(map_path, backend_args=backend_args):
            continue
        annotations.append(f"the {kind} {map_path}")
        content = fileio.get(map_path, backend_args=backend_args)
        header = read_header(content, map_path)
        if header.orientation == orientation and header.tiff is None:
            fits &= {False}
        elif size := size_of(content, map_path):
            fits &= _fitting(size, stored, upright, path, orientation, f"{annotations[-1]} has")
    if size := stated_size(results):
        fits &= _fitting(size, stored, upright, path, orientation, f"{annotation_file(results)} states")
        if results.get("instances"):
            annotations.append(annotation_file(results))
    if not fits:
        raise DataError(
            f"{path} has EXIF orientation {orientation}, and {' and '.join(annotations)} do not agree on whether it "
            "is to be turned by it: write the image upright, without the tag"
        )
    if len(fits) == 2 and annotations:
        raise DataError(
            f"{path} has EXIF orientation {orientation}, and the size of {annotations[0]} does not tell whether the "
            "image is to be turned by it: set exif='apply' of mmsnnet.LoadImage if annotations were drawn on the "
            "picture as viewers show it, exif='ignore' if on its pixels as stored"
        )
    return True in fits


def stated_size(results: dict[str, Any]) -> tuple[int, int] | None:
    """The (height, width) of the image that the data set states, as COCO files do; None without."""
    return (results["height"], results["width"]) if "height" in results and "width" in results else None


def annotation_file(results: dict[str, Any]) -> str:
    """The file that states a size, for messages."""
    return results.get("ann_file") or "the data set's annotation file"


def check_map(path: str, header: Header, results: dict[str, Any], backend_args: dict | None) -> None:
    """Refuses a label map or depth map that is not stored in the frame of its image as loaded.

    Args:
        path: of the map.
        header: of the map.
        results: the sample, its image loaded or not.
        backend_args: of mmengine's file backend.

    Raises:
        DataError: the map has an orientation of its own, or a loader other than ours has loaded an image with one.
    """
    if header.tiff is not None and header.orientation != 1:
        raise DataError(
            f"{path} is a TIFF with orientation {header.orientation}, by which some programs turn it and others not: "
            "write it without the tag, in its image's frame"
        )
    left = results.get(LEFT)
    if left is None:
        image = results.get("img_path")
        if "img" in results and image and fileio.exists(image, backend_args=backend_args):
            found = read_header(fileio.get(image, backend_args=backend_args), image).orientation
            if found != 1:
                raise DataError(
                    f"{image} has EXIF orientation {found}, and its loader does not compare it with {path}: load it "
                    "with mmsnnet.LoadImage in place of LoadImageFromFile"
                )
        left = 1
    if header.orientation not in (1, left):
        raise DataError(
            f"{path} has EXIF orientation {header.orientation}, and its image {results.get('img_path')}, as loaded, "
            f"{'has none' if left == 1 else f'has {left}'}: write the map without the tag, in its image's frame"
        )


def _fitting(
    size: tuple[int, int],
    stored: tuple[int, int],
    upright: tuple[int, int],
    image: str,
    orientation: int,
    source: str,
) -> set[bool]:
    fits = {turn for turn, of_image in ((False, stored), (True, upright)) if tuple(size) == tuple(of_image)}
    if not fits:
        turn = f", {upright} turned by its EXIF orientation {orientation}" if upright != stored else ""
        raise DataError(
            f"{source} {tuple(size)} (height, width) for {image}, which is {stored} as stored{turn}: an "
            "annotation is as large as its image"
        )
    return fits
