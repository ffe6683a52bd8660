"""Images for prediction: paths, folders, glob patterns, arrays and Pillow's images, loaded as a config's test does."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from PIL import Image

from mmsnnet.datasets.transforms.headers import ORIENTATION, exif_orientation
from mmsnnet.datasets.transforms.image import with_checked_loader
from mmsnnet.errors import DataError, MissingFileError, SettingError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
LOADERS = ("LoadImage", "LoadPillowImage")
# The tasks of the transforms that end a test pipeline.
PACKERS = {"PackSegInputs": "segmentation", "PackDetInputs": "detection", "PackClsInputs": "classification"}
# Pillow's modes that a PNG keeps as they are, and those of more bits that only a TIFF keeps: a PNG would clip them.
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TIFF_MODES = ("F", "I", "I;16B", "I;16L", "I;16N")

# A path, an array (H, W, 3), blue first as in OpenCV, or (H, W), an image of Pillow, or the content of a file.
ImageLike = str | os.PathLike[str] | np.ndarray | Image.Image | bytes


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """An image, ready for a model.

    Attributes:
        source: the path of the image; None for an image in memory.
        image: as shown, (H, W, 3) uint8 in RGB, rotated by its EXIF orientation.
        packed: what the test pipeline packs.
    """

    source: str | None
    image: np.ndarray
    packed: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's input (C, H, W). Images of one shape can share a batch."""
        return tuple(self.packed["inputs"].shape)


def list_images(images: ImageLike | Iterable[ImageLike]) -> tuple[Iterable[ImageLike], bool]:
    """The images that an argument stands for, and whether it stands for one image.

    A folder stands for its pictures, sorted by name; a glob pattern such as ``photos/**/*.jpg`` for its matches; any
    other iterable for its elements, which are read one by one.

    Raises:
        MissingFileError: a folder has no pictures, or a pattern matches nothing.
        TypeError: the argument is no image, path or iterable.
    """
    if isinstance(images, np.ndarray | Image.Image | bytes):
        return [images], True
    if isinstance(images, str | os.PathLike):
        images = os.path.expanduser(os.fspath(images))
        path = Path(images)
        if path.is_dir():
            if not (paths := sorted(child for child in path.iterdir() if child.suffix.lower() in SUFFIXES)):
                raise MissingFileError(f"folder {str(path)!r} has no pictures ({', '.join(SUFFIXES)})")
            return [str(child) for child in paths], False
        if glob.has_magic(images) and not path.exists():
            if not (matches := sorted(glob.glob(images, recursive=True))):
                raise MissingFileError(f"no file matches {images!r} (working folder {Path.cwd()})")
            return matches, False
        return [images], True
    if isinstance(images, Iterable) and not isinstance(images, Mapping):
        return images, False
    raise TypeError(
        f"expected a path, an array, an image of Pillow, the content of a file, or several; got {type(images).__name__}"
    )


class ImageLoader:
    """The test pipeline of a config, without annotations: from an image to the input of a model.

    Images are loaded by mmsnnet's checked loaders, as the test loop loads them.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        max_pixels: the most pixels that an image may have.

    Attributes:
        task: ``'segmentation'``, ``'depth'``, ``'classification'`` or ``'detection'``.

    Raises:
        SettingError: the config has no test pipeline, or one that neither loads an image nor packs the inputs of a
            known task.
    """

    def __init__(self, config: Config, max_pixels: int | None = None) -> None:
        dataset = inner_dataset(config)
        steps = copy.deepcopy(with_checked_loader(dataset["pipeline"]))
        names = [transform_name(step) for step in steps]
        place = next((place for place, name in enumerate(names) if name in LOADERS), None)
        if place is None or names[-1] not in PACKERS:
            raise SettingError(
                f"config {str(config.filename)!r}: the test pipeline loads an image with {' or '.join(LOADERS)} and "
                f"ends in one of {', '.join(PACKERS)}; it has {', '.join(names)}"
            )
        self.task = PACKERS[names[-1]]
        if self.task == "segmentation" and any("Depth" in name for name in (*names, transform_name(config.model))):
            self.task = "depth"
        steps[place]["max_pixels"] = max_pixels
        self._first = Compose(steps[: place + 1])
        self._rest = Compose(
            [
                step
                for step, name in zip(steps[place + 1 :], names[place + 1 :], strict=True)
                if not _is_annotation(name)
            ]
        )

    def __call__(self, image: ImageLike, number: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Load an image; return it as shown, (H, W, 3) uint8 in RGB, and what the pipeline packs.

        Args:
            image: a path, an array or an image of Pillow.
            number: of the image among several, for messages.

        Raises:
            MissingFileError: the file does not exist.
            DataError: the image cannot be read or is too large; the message names it.
            TypeError: it is none of these.
        """
        sample = self._first(_sample(image, "the image" if number is None else f"image {number}"))
        shown = _as_shown(sample["img"])
        try:
            return shown, self._rest(sample)
        except (cv2.error, ValueError) as error:  # resized to no pixels, for one
            reason = " ".join(str(error).split())
            raise DataError(f"{sample['img_path']} of {shown.shape[:2]} cannot be preprocessed: {reason}") from error


def inner_dataset(config: Config) -> dict[str, Any]:
    """The settings of the data set in ``test_dataloader``, inside wrappers such as ``ConcatDataset``.

    Raises:
        SettingError: the config has no test data set with a pipeline.
    """
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and (inner := dataset.get("dataset") or dataset.get("datasets")):
        dataset = inner[0] if isinstance(inner, list | tuple) else inner
    if not dataset.get("pipeline"):
        raise SettingError(
            f"config {str(config.filename)!r} has no test_dataloader.dataset.pipeline, which loads the images"
        )
    return dataset


def source_of(image: ImageLike) -> str | None:
    """The path of an image, or None for an image in memory."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None


def _sample(image: ImageLike, name: str) -> dict[str, Any]:
    """The sample of an image, as mmsnnet's loaders take it."""
    if isinstance(image, str | os.PathLike):
        path = os.path.expanduser(os.fspath(image))
        if os.path.isdir(path):
            raise DataError(f"{path} is a folder: expected an image")
        return dict(img_path=path)
    if isinstance(image, bytes):
        return dict(img_path=name, img_bytes=image)
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or name
        return dict(img_path=name, img_bytes=_file_of(image, name))
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or 0 in image.shape:
            raise DataError(f"{name} is an array of shape {image.shape}: expected (height, width, channels)")
        return dict(img_path=name, img=image[..., 0] if image.shape[2:] == (1,) else image)
    raise TypeError(f"{name}: expected a path, an array or an image of Pillow; got {type(image).__name__}")


def _file_of(image: Image.Image, name: str) -> bytes:
    """An image of Pillow as a file without loss, so that one loader decodes files and images alike."""
    buffer = BytesIO()
    try:
        image.load()  # rotates a TIFF, and removes its orientation
        exif = Image.Exif()  # without the tags of a TIFF, which are about the file that it was
        exif[ORIENTATION] = exif_orientation(image.getexif)
        converted = image if image.mode in PNG_MODES + TIFF_MODES else image.convert("RGB")
        if image.mode in TIFF_MODES:
            converted.save(buffer, "TIFF", compression="raw", exif=exif)
        else:
            converted.save(buffer, "PNG", compress_level=0, exif=exif)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes a file when its pixels are needed
        raise DataError(f"{name} cannot be decoded ({error}): the image is damaged or truncated") from error
    return buffer.getvalue()


def _as_shown(image: np.ndarray | Image.Image) -> np.ndarray:
    """A loaded image, blue first or of Pillow, as (H, W, 3) uint8 in RGB."""
    if isinstance(image, Image.Image):
        return np.asarray(image)
    values = image if image.dtype == np.uint8 else np.rint(image.clip(0, 255)).astype(np.uint8)
    if values.ndim == 2 or values.shape[2] < 3:
        gray = values if values.ndim == 2 else values[..., 0]
        return np.stack([gray] * 3, axis=-1)
    return np.ascontiguousarray(values[..., 2::-1])


def transform_name(setting: Mapping[str, Any]) -> str:
    """The name of a setting's class, without its scope."""
    type_ = setting["type"]
    return type_.__name__ if isinstance(type_, type) else str(type_).rpartition(".")[2]


def _is_annotation(name: str) -> bool:
    return name.startswith("Load") and name not in LOADERS


def batches(images: Iterable[ImageLike], size: int) -> Iterator[list[tuple[int, ImageLike]]]:
    """Yield lists of up to ``size`` numbered images."""
    batch: list[tuple[int, ImageLike]] = []
    for numbered in enumerate(images):
        batch.append(numbered)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
