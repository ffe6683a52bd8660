"""Checks before the first iteration: whether model, settings and data agree.

Each number that stands in several places is compared: classes in the data set, its label loader and every head;
channels in the anchors, the preprocessor and the images; sizes of images in a batch. Files are looked for by their
names, and a few images are loaded. Nothing is read one by one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.engine.randomness import kept_generators, seed_generators
from mmsnnet.errors import DataError, MissingFileError, SettingError
from mmsnnet.models import StitchedViT
from mmsnnet.models.checkpoint import unwrapped_model

# How many images are looked at for their sizes, evenly spaced, and at most how many entries for their files.
IMAGES = 64
ENTRIES = 25_000
# What entries of a data set have the paths of files under.
PATHS = ("img_path", "seg_map_path", "depth_map_path")


def check_loader(
    model: nn.Module, loader: DataLoader, setting: str, training: bool = False, labels: bool = True, load: bool = True
) -> None:
    """Compares a data loader with the model that it feeds.

    Args:
        model: with or without wrappers.
        loader: as mmengine builds it.
        setting: the name of its setting in a config, ``'val_dataloader'`` say.
        training: whether the model is trained on it.
        labels: whether label maps are needed; predictions can be written without.
        load: whether to load samples: where evaluation comes at once, its first batch shows as much.

    Raises:
        SettingError: two settings contradict each other, or the data; the message names both.
        MissingFileError: an entry of the data set has no file.
        DataError: one of the images that are looked at cannot be loaded.

    Label maps of nothing but 0 and 255 are warned of.
    """
    model = unwrapped_model(model)
    _check_channels(model)
    if not len(loader.dataset) or not len(loader):
        raise SettingError(
            f"{setting} has no batch to give: its data set has {len(loader.dataset)} samples, "
            f"batch_size={loader.batch_size}, drop_last={loader.drop_last}. Lower {setting}.batch_size, or leave out "
            "drop_last"
        )
    parts = list(_parts(loader.dataset, f"{setting}.dataset"))
    for place, dataset in parts:
        _check_classes(model, dataset, place)
        _check_files(dataset, place, PATHS if labels else PATHS[:1])
    if not load:
        return
    _check_image(model, loader.dataset, setting)
    _warn_of_binary_masks(loader.dataset, setting)
    for _, dataset in parts:
        _check_sizes(model, loader, dataset, setting, training)


def _parts(dataset: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The data sets that list samples, out of wrappers that repeat or join them, with their settings."""
    if (inner := getattr(dataset, "dataset", None)) is not None:
        yield from _parts(inner, f"{place}.dataset")
    elif (members := getattr(dataset, "datasets", None)) is not None:
        for index, member in enumerate(members):
            yield from _parts(member, f"{place}.datasets.{index}")
    else:
        yield place, dataset


def _check_channels(model: nn.Module) -> None:
    """Compares the channels that anchors take with those that the preprocessor normalises."""
    mean = getattr(getattr(model, "data_preprocessor", None), "mean", None)
    for backbone in (module for module in model.modules() if isinstance(module, StitchedViT)):
        channels = backbone.network.anchor(0).in_chans
        if isinstance(mean, torch.Tensor) and mean.numel() not in (1, channels):
            raise SettingError(
                f"model.data_preprocessor.mean has {mean.numel()} values, and the anchors take images of {channels} "
                f"channels: give as many values (or one for all), or set in_chans={mean.numel()} in every anchor of "
                "model.backbone.anchors"
            )


def _check_image(model: nn.Module, dataset: Any, setting: str) -> None:
    """Loads the first sample, and compares its channels with those that the anchors take."""
    with kept_generators():
        seed_generators(0)
        sample = dataset[0]
    image = sample.get("inputs") if isinstance(sample, dict) else None
    for backbone in (module for module in model.modules() if isinstance(module, StitchedViT)):
        channels = backbone.network.anchor(0).in_chans
        if isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) != channels:
            raise SettingError(
                f"{setting}: its images have {len(image)} channels, and the anchors take {channels}: set in_chans="
                f"{len(image)} in every anchor of model.backbone.anchors, or load other channels (color_type)"
            )


def _check_classes(model: nn.Module, dataset: Any, place: str) -> None:
    """Compares the classes of a data set with those of its label loader and of the model's heads."""
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
    steps = _steps(dataset)
    if classes is None or any("depth" in type(step).__name__.lower() for step in steps):
        return  # NYUv2's classes are kinds of rooms
    named = f"{place}: the data set has {len(classes)} classes ({_few(classes)})"
    chosen = getattr(dataset, "label_map", None)  # of the classes in its files, whose number only the loader knows
    for step in steps:
        loaded = getattr(step, "num_classes", None)
        if type(step).__name__ == "LoadSegLabels" and not chosen and loaded != len(classes):
            raise SettingError(
                f"{named}, and LoadSegLabels.num_classes of its pipeline is {loaded}: set it to {len(classes)}, or "
                "metainfo.classes to the names of all classes"
            )
    for name, number in _heads(model):
        if number != len(classes):
            raise SettingError(
                f"{named}, and {name}.num_classes is {number}: set it to {len(classes)}, or metainfo.classes to the "
                "names of all classes"
            )


def _heads(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Every setting of a model that says how many classes there are, with its number."""
    found = False
    for name, module in model.named_modules():
        kind = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        number = getattr(module, "num_classes", None)
        # Region proposals have one class, and masks may be for all classes alike.
        if not kind.endswith("head") or kind == "rpn_head" or getattr(module, "class_agnostic", False):
            continue
        if isinstance(number, int) and not name.startswith("backbone."):
            found = True
            yield f"model.{name}", number
    if not found and isinstance(number := getattr(model, "num_classes", None), int):
        yield "model", number


def _warn_of_binary_masks(dataset: Any, setting: str) -> None:
    """Warns of label maps that hold nothing but 0 and 255, which is "no label"."""
    # Imported here, because it builds on mmseg, which another task need not have.
    if any(type(step).__name__ == "LoadSegLabels" for _, part in _parts(dataset, setting) for step in _steps(part)):
        from mmsnnet.datasets.binary_labels import binary_mask_warning

        if warning := binary_mask_warning(dataset):
            print_log(f"{setting}: {warning}", logger="current", level=logging.WARNING)


def _steps(dataset: Any) -> Sequence[Any]:
    return getattr(getattr(dataset, "pipeline", None), "transforms", ())


def _check_files(dataset: Any, place: str, keys: Sequence[str]) -> None:
    """Looks for the files of a data set's entries in listings of their folders."""
    if not hasattr(dataset, "get_data_info") or not any(
        type(step).__name__.startswith("Load") for step in _steps(dataset)
    ):
        return  # it has no files, or makes its samples itself
    listings: dict[str, set[str]] = {}
    missing, seen = [], 0
    for index in _spaced(len(dataset), ENTRIES):
        info = dataset.get_data_info(index)
        for path in (info[key] for key in keys if isinstance(info.get(key), str) and "://" not in info[key]):
            folder, name = os.path.split(path)
            if folder not in listings:
                listings[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
            seen += 1
            if name not in listings[folder]:
                missing.append(path)
    if missing:
        why = _why_missing(dataset, missing)
        raise MissingFileError(f"{place}: {len(missing)} of {seen} files are missing, {missing[0]!r} the first{why}")


def _why_missing(dataset: Any, missing: Sequence[str]) -> str:
    """The likely reason, where a list of images names files that do not exist."""
    ann_file, suffix = getattr(dataset, "ann_file", None), getattr(dataset, "img_suffix", "")
    if not ann_file or not os.path.isfile(ann_file):
        return ": put it there, or look at data_prefix, img_suffix and seg_map_suffix"
    names = [os.path.basename(path) for path in missing]
    if "\ufeff" in missing[0]:
        return f", because {ann_file} begins with a byte order mark: save it as UTF-8 without one"
    if any(name in (suffix, getattr(dataset, "seg_map_suffix", "")) for name in names):
        return f", because {ann_file} has an empty line: remove it"
    if suffix and any(name.endswith(2 * suffix) for name in names):
        return f", because {ann_file} names files with their suffix, which img_suffix={suffix!r} adds: leave it out"
    return f", named in {ann_file} without img_suffix={suffix!r}" if suffix else f", named in {ann_file}"


def _check_sizes(model: nn.Module, loader: DataLoader, dataset: Any, setting: str, training: bool) -> None:
    """Looks whether images can be put together in a batch, where mmseg's preprocessor does so."""
    preprocessor = getattr(model, "data_preprocessor", None)
    if not _is_mmsegs(preprocessor) or not hasattr(dataset, "get_data_info") or (loader.batch_size or 1) < 2:
        return
    sizes: dict[tuple[int, int], int] = {}
    for index in _spaced(len(dataset), IMAGES):
        if (size := _stored_size(dataset.get_data_info(index).get("img_path"))) is not None:
            sizes.setdefault(size, index)
    if len(sizes) < 2:
        return
    extremes = {pick(sizes, key=lambda size: size[side]) for pick in (min, max) for side in (0, 1)}
    with kept_generators():
        seed_generators(0)
        samples = [dataset[sizes[size]] for size in sorted(extremes)]
    shapes = [(sample["data_samples"].metainfo.get("img_path"), tuple(sample["inputs"].shape)) for sample in samples]
    if wrong := _unstackable(preprocessor, shapes, training):
        raise SettingError(f"{setting}: {wrong}")


@contextmanager
def sizes_explained(model: nn.Module, batch: Any, training: bool, setting: str) -> Iterator[None]:
    """Answers the error of a preprocessor that cannot put the images of a batch together with their names and sizes.

    Raises:
        DataError: in place of whatever it raised.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        preprocessor = getattr(unwrapped_model(model), "data_preprocessor", None)
        inputs, samples = (batch.get("inputs"), batch.get("data_samples")) if isinstance(batch, dict) else (None, None)
        if not isinstance(inputs, list) or not isinstance(samples, list) or not _is_mmsegs(preprocessor):
            raise
        paths = [sample.metainfo.get("img_path") for sample in samples]
        shapes = [(path, tuple(image.shape)) for path, image in zip(paths, inputs, strict=True)]
        wrong = _unstackable(preprocessor, shapes, training)
        if wrong is None:
            raise
        raise DataError(f"{setting}: {wrong}") from error


def _is_mmsegs(preprocessor: Any) -> bool:
    return any(kind.__name__ == "SegDataPreProcessor" for kind in type(preprocessor).__mro__)


def _unstackable(preprocessor: Any, shapes: Sequence[tuple[str, tuple[int, ...]]], training: bool) -> str | None:
    """Why mmseg's preprocessor cannot stack images (C, H, W), given with their paths; None if it can."""
    first, other = shapes[0], next((one for one in shapes if one[1][0] != shapes[0][1][0]), None)
    if other is not None:
        return f"{first[0]} has {first[1][0]} channels and {other[0]} {other[1][0]}: all images of a batch have as many"
    if training and preprocessor.size is None and preprocessor.size_divisor is not None:
        return None  # it pads to the largest
    size = tuple(preprocessor.size)[-2:] if training and preprocessor.size is not None else (0, 0)
    padded = {path: tuple(max(sides) for sides in zip(shape[1:], size, strict=True)) for path, shape in shapes}
    path, other_path = min(padded, key=padded.__getitem__), max(padded, key=padded.__getitem__)
    one, two = padded[path], padded[other_path]
    if one == two:
        return None
    if not training:
        return (
            f"{path} is {one[0]} x {one[1]} after the pipeline and {other_path} {two[0]} x {two[1]}, and in evaluation "
            "all images of a batch are to be of one size: set batch_size=1 of this loader"
        )
    shape = dict(shapes)[other_path][1:]
    return (
        f"{other_path} is {shape[0]} x {shape[1]} after the training pipeline, larger than "
        f"model.data_preprocessor.size={size}, to which images are padded: add dict(type='RandomCrop', "
        f"crop_size={size}) to the pipeline, or set a larger size"
    )


def _stored_size(path: Any) -> tuple[int, int] | None:
    """Height and width in the header of a local image; None where Pillow cannot tell, which loaders answer."""
    if not isinstance(path, str) or "://" in path:
        return None
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None


def _spaced(length: int, most: int) -> Iterable[int]:
    """Up to ``most`` indices below ``length``, evenly spaced; the first and the last are among them."""
    number = min(length, most)
    return (index * (length - 1) // max(number - 1, 1) for index in range(number))


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
