"""Checks before the first iteration: whether model, settings and data agree.

Each number that stands in several places is compared: classes in the data set, its label loader and every head;
channels in the anchors, the preprocessor and the images; sizes of images in a batch. Files are looked for by their
names, and a few images are loaded. Nothing is read one by one.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from mmengine.logging import print_log
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.engine.randomness import kept_generators, seed_generators
from mmsnnet.engine.runner.seeded_loading import SeededDataset
from mmsnnet.errors import DataError, MissingFileError, SettingError, UserError
from mmsnnet.files.reading import join_names
from mmsnnet.models import StitchedBackbone
from mmsnnet.models.model_weights import unwrapped_model

# How many images are looked at for their sizes, evenly spaced, and at most how many entries for their files.
IMAGES = 64
ENTRIES = 25_000
# The files of an entry, by the key of their path, and the transforms that load them, or their base classes.
FILES = dict(
    img_path=("LoadImageFromFile", "LoadPillowImage"),
    seg_map_path=("LoadAnnotations",),
    depth_map_path=("LoadDepthAnnotation",),
)
# Names of heads, in the toolboxes, that have as many classes as the data set.
HEADS = ("decode_head", "auxiliary_head", "bbox_head", "mask_head")


def check_loader(model: nn.Module, loader: DataLoader, setting: str, training: bool = False, load: bool = True) -> None:
    """Compare a data loader with the model that it feeds.

    Label maps of nothing but 0 and 255 are warned of.

    Args:
        model: with or without wrappers.
        loader: as mmengine builds it.
        setting: the name of its setting in a config, ``'val_dataloader'`` say.
        training: whether the model is trained on it.
        load: whether to load samples: where evaluation comes at once, its first batch shows as much.

    Raises:
        SettingError: two settings contradict each other, or the data; the message names both.
        MissingFileError: an entry of the data set has no file.
        DataError: one of the images that are looked at cannot be loaded.
    """
    model = unwrapped_model(model)
    _check_channels(model)
    _check_inference(model)
    if not len(loader.dataset) or not len(loader):
        raise SettingError(
            f"{setting} has no batch to give: its data set has {len(loader.dataset)} samples, "
            f"batch_size={loader.batch_size}, drop_last={loader.drop_last}. Lower {setting}.batch_size, or leave out "
            "drop_last"
        )
    parts = list(_parts(loader.dataset, f"{setting}.dataset"))
    for place, dataset in parts:
        _check_classes(model, dataset, place)
        _check_files(dataset, place)
    if load:
        _warn_of_binary_masks(parts, setting)
        for _, dataset in parts:
            _check_image(model, dataset, setting)
            _check_sizes(model, loader, dataset, setting, training)


def check_same_classes(first: DataLoader, second: DataLoader) -> None:
    """Compare the classes of the training set with those of the validation set, whose labels mean the same.

    Raises:
        SettingError: they have the same names in another order.
    """
    names = []
    for loader in (first, second):
        _, dataset = next(_parts(loader.dataset, ""))
        names.append(list(map(str, (getattr(dataset, "metainfo", None) or {}).get("classes") or ())))
    if names[0] == names[1] or not all(names):
        return
    one, other = next(pair for pair in zip_longest(*names) if pair[0] != pair[1])
    text = f"the classes of train_dataloader.dataset and val_dataloader.dataset differ: {one!r} there is {other!r} here"
    if sorted(names[0]) == sorted(names[1]) or len(names[0]) != len(names[1]):
        raise SettingError(f"{text}; give both the same metainfo.classes, in one order")
    print_log(f"{text}: a label has to mean the same in both", logger="current", level=logging.WARNING)


def first_sample(dataset: Any) -> Any:
    """Load the first sample of a data set, and leave random states and the caches of its pipeline as they were."""
    return _samples(dataset, [0])[0]


def _samples(dataset: Any, indices: Sequence[int]) -> list[Any]:
    if hasattr(dataset, "pipeline"):
        dataset = copy.copy(dataset)
        dataset.pipeline = copy.deepcopy(dataset.pipeline)  # a mosaic, say, has a cache
    with kept_generators():
        seed_generators(0)
        return [dataset[index] for index in indices]


def _parts(dataset: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The data sets that list samples, out of wrappers that repeat or join them, with their settings."""
    if isinstance(dataset, SeededDataset):
        dataset = dataset.unwrapped
    if (inner := getattr(dataset, "dataset", None)) is not None:
        yield from _parts(inner, f"{place}.dataset")
    elif (members := getattr(dataset, "datasets", None)) is not None:
        for index, member in enumerate(members):
            yield from _parts(member, f"{place}.datasets.{index}")
    else:
        yield place, dataset


def _steps(dataset: Any) -> Sequence[Any]:
    return getattr(getattr(dataset, "pipeline", None), "transforms", ())


def _is_a(module: Any, *names: str) -> bool:
    """Whether an object is of a class of one of these names; toolboxes that define them need not be installed."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def _check_channels(model: nn.Module) -> None:
    """Compare the channels that anchors take with those that the preprocessor normalises."""
    mean = getattr(getattr(model, "data_preprocessor", None), "mean", None)
    for backbone in (module for module in model.modules() if isinstance(module, StitchedBackbone)):
        channels = backbone.network.anchor(0).in_chans
        if isinstance(mean, torch.Tensor) and mean.numel() not in (1, channels):
            raise SettingError(
                f"model.data_preprocessor.mean has {mean.numel()} values, and the anchors take images of {channels} "
                f"channels: give as many values (or one for all), or set in_chans={mean.numel()} in every anchor of "
                "model.backbone.anchors"
            )


def _check_inference(model: nn.Module) -> None:
    """Check ``test_cfg`` of one of mmseg's segmentors, which reads it at the first image of an evaluation."""
    settings = getattr(model, "test_cfg", None)
    if not _is_a(model, "BaseSegmentor") or not isinstance(settings, Mapping):
        return
    mode = settings.get("mode", "whole")
    modes = ("whole", "slide", "slide_flip") if _is_a(model, "DepthEstimator") else ("whole", "slide")
    if mode not in modes:
        raise SettingError(f"model.test_cfg.mode is one of {', '.join(modes)}; got {mode!r}")
    if mode == "whole":
        return
    pairs = [settings.get(name) for name in ("crop_size", "stride")]
    numbers = all(isinstance(pair, list | tuple) and len(pair) == 2 and min(pair) > 0 for pair in pairs)
    if not numbers or any(step > side for side, step in zip(*pairs, strict=True)):
        raise SettingError(
            "model.test_cfg with mode='slide' has crop_size and stride, each (height, width) in pixels, the stride at "
            f"most the crop; got crop_size={pairs[0]} and stride={pairs[1]}"
        )


def _check_image(model: nn.Module, dataset: Any, setting: str) -> None:
    """Load the first sample, and compare its channels with those that the anchors take."""
    sample = first_sample(dataset)
    image = sample.get("inputs") if isinstance(sample, dict) else None
    for backbone in (module for module in model.modules() if isinstance(module, StitchedBackbone)):
        channels = backbone.network.anchor(0).in_chans
        if isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) != channels:
            raise SettingError(
                f"{setting}: its images have {len(image)} channels, and the anchors take {channels}: set in_chans="
                f"{len(image)} in every anchor of model.backbone.anchors, or load other channels (color_type)"
            )


def _check_classes(model: nn.Module, dataset: Any, place: str) -> None:
    """Compare the classes of a data set with those of its label loader and of the model's heads."""
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
    if _is_a(model, "DepthEstimator"):  # NYUv2's classes are kinds of rooms
        return
    if isinstance(classes, str) or (classes is None and _is_a(dataset, "BaseSegDataset")):
        raise SettingError(
            f"{place}.metainfo.classes is a list of names, such as ('background', 'road'); got {classes!r}"
        )
    if classes is None:
        return
    named = f"{place}: the data set has {len(classes)} classes ({join_names(list(map(str, classes)), 3)})"
    cure = f"set it to {len(classes)}, or {place}.metainfo.classes to the names of all classes"
    chosen = getattr(dataset, "label_map", None)  # of the classes in its files, whose number only the loader knows
    for step in _steps(dataset):
        if _is_a(step, "LoadSegLabels") and not chosen and step.num_classes != len(classes):
            raise SettingError(f"{named}, and LoadSegLabels.num_classes of its pipeline is {step.num_classes}: {cure}")
    for name, number, head in _heads(model):
        one_output = len(classes) == 2 and getattr(head, "out_channels", None) == 1  # of the second class
        if one_output and getattr(getattr(head, "loss_decode", None), "use_sigmoid", True) is False:
            raise SettingError(
                f"{named}, and {name} has one output, which needs {name}.loss_decode.use_sigmoid=True: set it, or "
                f"{name}.num_classes=2 and {name}.out_channels=2"
            )
        if number != len(classes) and not one_output:
            raise SettingError(f"{named}, and {name}.num_classes is {number}: {cure}")
        weights = getattr(getattr(head, "loss_decode", None), "class_weight", None)
        if isinstance(weights, list | tuple) and len(weights) != number:
            raise SettingError(f"{named}, and {name}.loss_decode.class_weight has {len(weights)} values: give {number}")


def _heads(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """Each setting of a model that says how many classes there are, with its number and its module."""
    named = [
        (name, next((part for part in reversed(name.split(".")) if not part.isdigit()), ""))
        for name, _ in model.named_modules()
    ]
    if any(kind == "semantic_head" or kind.startswith("panoptic") for _, kind in named):
        return  # things and stuff: each head has some of the classes
    found = False
    for name, kind in named:
        head = model.get_submodule(name)
        number = getattr(head, "num_classes", None)
        # Masks may be for all classes alike, and an auxiliary head may learn something else, such as edges.
        other_task = kind == "auxiliary_head" and not _learns_labels(head)
        if kind not in HEADS or not isinstance(number, int) or getattr(head, "class_agnostic", False) or other_task:
            continue
        found = True
        yield f"model.{name}", number, head
    if not found and isinstance(number := getattr(model, "num_classes", None), int):
        yield "model", number, model


def _learns_labels(head: nn.Module) -> bool:
    """Whether a head of mmseg's has the loss of its base class, over the classes of the label map."""
    base = next((kind for kind in type(head).__mro__ if kind.__name__ == "BaseDecodeHead"), None)
    return base is not None and type(head).loss_by_feat is base.loss_by_feat


def _warn_of_binary_masks(parts: Sequence[tuple[str, Any]], setting: str) -> None:
    """Warn of label maps that hold nothing but 0 and 255, which is "no label"."""
    # Imported here, because it builds on mmseg, which another task need not have.
    for _, dataset in parts:
        kinds = [kind for step in _steps(dataset) for kind in type(step).__mro__]
        if any(kind.__name__ == "LoadAnnotations" and kind.__module__.startswith("mmseg.") for kind in kinds):
            from mmsnnet.datasets.binary_labels import binary_mask_warning

            if warning := binary_mask_warning(dataset):
                print_log(f"{setting}: {warning}", logger="current", level=logging.WARNING)


def _check_files(dataset: Any, place: str) -> None:
    """Look for the files of a data set's entries that its pipeline loads, in listings of their folders."""
    steps = _steps(dataset)
    keys = [key for key, loaders in FILES.items() if any(_is_a(step, *loaders) for step in steps)]
    if not keys or not hasattr(dataset, "get_data_info") or not all(map(_is_local, (dataset, *steps))):
        return
    listings: dict[str, set[str]] = {}
    missing, seen = [], 0
    for index in _spaced(len(dataset), ENTRIES):
        info = dataset.get_data_info(index)
        for path in (info[key] for key in keys if isinstance(info.get(key), str) and "://" not in info[key]):
            folder, name = os.path.split(path)
            if folder not in listings:
                listings[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
            seen += 1
            # A file system may know a file by another spelling than it lists.
            if name not in listings[folder] and not os.path.exists(path):
                missing.append(path)
    if missing:
        why = _why_missing(dataset, missing)
        raise MissingFileError(f"{place}: {len(missing)} of {seen} files are missing, {missing[0]!r} the first{why}")


def _is_local(reader: Any) -> bool:
    """Whether a data set or transform reads from a local disk."""
    settings = getattr(reader, "backend_args", None) or getattr(reader, "file_client_args", None) or {}
    return settings.get("backend", "local") in ("local", "disk")


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
    """Look whether images can be put together in a batch, where mmseg's preprocessor does so."""
    preprocessor = getattr(model, "data_preprocessor", None)
    if training and _is_mmsegs(preprocessor) and preprocessor.size is None and preprocessor.size_divisor is None:
        raise SettingError(
            "model.data_preprocessor has neither size nor size_divisor, to which training images are padded: set one"
        )
    if not _is_mmsegs(preprocessor) or not hasattr(dataset, "get_data_info") or (loader.batch_size or 1) < 2:
        return
    sizes: dict[tuple[int, int], int] = {}
    for index in _spaced(len(dataset), IMAGES):
        if (size := _stored_size(dataset.get_data_info(index).get("img_path"))) is not None:
            sizes.setdefault(size, index)
    if len(sizes) < 2:
        return
    extremes = {pick(sizes, key=lambda size: size[side]) for pick in (min, max) for side in (0, 1)}
    samples = _samples(dataset, [sizes[size] for size in sorted(extremes)])
    inputs = [sample.get("inputs") for sample in samples if isinstance(sample, dict)]
    shapes = _shapes(inputs, [sample.get("data_samples") for sample in samples if isinstance(sample, dict)])
    if shapes is not None and (wrong := _unstackable(preprocessor, shapes, training)):
        raise SettingError(f"{setting}: {wrong}")


@contextmanager
def sizes_explained(model: nn.Module, batch: Any, training: bool, setting: str) -> Iterator[None]:
    """Replace the error of a batch whose images cannot be stacked by one that names them and their sizes.

    Raises:
        DataError: in place of what mmseg's preprocessor raised.
    """
    try:
        yield
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        preprocessor = getattr(unwrapped_model(model), "data_preprocessor", None)
        if not isinstance(batch, dict) or not _is_mmsegs(preprocessor):
            raise
        shapes = _shapes(batch.get("inputs"), batch.get("data_samples"))
        wrong = None if shapes is None else _unstackable(preprocessor, shapes, training)
        if wrong is None:
            raise
        raise DataError(f"{setting}: {wrong}") from error


Shapes = list[tuple[str, tuple[int, ...]]]


def _shapes(inputs: Any, samples: Any) -> Shapes | None:
    """The path and the shape (C, H, W) of each image of a batch; None for a batch of another kind."""
    if not isinstance(inputs, list) or not isinstance(samples, list) or len(inputs) != len(samples) or not inputs:
        return None
    if not all(isinstance(image, torch.Tensor) and image.ndim == 3 for image in inputs):
        return None
    paths = [getattr(sample, "metainfo", {}).get("img_path", "an image") for sample in samples]
    return [(path, tuple(image.shape)) for path, image in zip(paths, inputs, strict=True)]


def _is_mmsegs(preprocessor: Any) -> bool:
    """Whether a preprocessor stacks images as mmseg's does."""
    stock = next((kind for kind in type(preprocessor).__mro__ if kind.__module__.startswith("mmseg.")), None)
    return stock is not None and type(preprocessor).forward is stock.forward


def _unstackable(preprocessor: Any, shapes: Shapes, training: bool) -> str | None:
    """Why mmseg's preprocessor cannot stack images (C, H, W), given with their paths; None if it can."""
    (first, shape), *others = shapes
    if other := next((one for one in others if one[1][0] != shape[0]), None):
        return f"{first} has {shape[0]} channels and {other[0]} {other[1][0]}: all images of a batch have as many"
    if training and preprocessor.size is None and preprocessor.size_divisor is not None:
        return None  # it pads to the largest
    size = tuple(preprocessor.size)[-2:] if training and preprocessor.size is not None else (0, 0)
    padded = [(tuple(max(sides) for sides in zip(shape[1:], size, strict=True)), path, shape) for path, shape in shapes]
    (least, small, _), (most, large, shape) = min(padded), max(padded)
    if least == most:
        return None
    if not training:
        return (
            f"{small} is {least[0]} x {least[1]} after the pipeline and {large} {most[0]} x {most[1]}, and in "
            "evaluation all images of a batch are to be of one size: set batch_size=1 of this loader"
        )
    if preprocessor.size is None:
        return (
            f"{small} is {least[0]} x {least[1]} after the training pipeline and {large} {most[0]} x {most[1]}: set "
            "model.data_preprocessor.size, to which images are padded, or size_divisor, or crop them in the pipeline"
        )
    return (
        f"{large} is {shape[1]} x {shape[2]} after the training pipeline, larger than model.data_preprocessor.size="
        f"{size}, to which images are padded: add dict(type='RandomCrop', crop_size={size}) to the pipeline, or set a "
        "larger size"
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


def _spaced(length: int, most: int) -> Iterator[int]:
    """Up to ``most`` indices below ``length``, evenly spaced; the first and the last are among them."""
    number = min(length, most)
    return (index * (length - 1) // max(number - 1, 1) for index in range(number))
