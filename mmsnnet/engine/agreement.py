"""Check before the first iteration that model, settings and data agree.

The checks compare every number that is set in several places: the classes of the data set, its label loader and every
head; the channels of the anchors, the preprocessor and the images; the sizes of images in a batch. They look for files
by name, and load a few images only.
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

from mmsnnet.datasets.dataset_parts import evenly_spaced, is_instance, transforms_of, unwrapped_datasets
from mmsnnet.engine.randomness import kept_generators, seed_generators
from mmsnnet.errors import DataError, MissingFileError, SettingError, UserError
from mmsnnet.files.reading import join_names
from mmsnnet.models import StitchedBackbone
from mmsnnet.models.model_weights import unwrapped_model

# The most images whose sizes are compared, and the most entries whose files are looked for; both evenly spaced.
IMAGES = 64
ENTRIES = 25_000
# Keys of the paths of an entry's files, each with the transforms, or their base classes, that load the file.
FILES = dict(
    img_path=("LoadImageFromFile", "LoadPillowImage"),
    seg_map_path=("LoadAnnotations",),
    depth_map_path=("LoadDepthAnnotation",),
)
# Names that the toolboxes give to heads with as many classes as the data set.
HEADS = ("decode_head", "auxiliary_head", "bbox_head", "mask_head")


def check_loader(model: nn.Module, loader: DataLoader, setting: str, training: bool = False, load: bool = True) -> None:
    """Compare a data loader with the model that it feeds.

    Logs a warning if label maps hold nothing but 0 and 255.

    Args:
        model: with or without wrappers.
        loader: as mmengine builds it.
        setting: the name of its setting in a config, ``'val_dataloader'`` say.
        training: whether the model is trained on it.
        load: whether to load samples; a loop that starts to evaluate at once need not.

    Raises:
        SettingError: two settings contradict each other, or a setting the data; the message names both.
        MissingFileError: a file of an entry does not exist.
        DataError: an image cannot be loaded.
    """
    model = unwrapped_model(model)
    _check_channels(model)
    _check_inference(model)
    samples = len(loader.dataset)  # type: ignore[arg-type]
    if not samples or not len(loader):
        raise SettingError(
            f"{setting} has no batch: its data set has {samples} samples, batch_size={loader.batch_size}, "
            f"drop_last={loader.drop_last}. Lower {setting}.batch_size, or leave out drop_last"
        )
    datasets = list(unwrapped_datasets(loader.dataset, f"{setting}.dataset"))
    for place, dataset in datasets:
        _check_classes(model, dataset, place)
        _check_files(dataset, place)
    if load:
        for _, dataset in datasets:
            _warn_of_binary_masks(dataset, setting)
            _check_image(model, dataset, setting)
            _check_sizes(model, loader, dataset, setting, training)


def check_same_classes(first: DataLoader, second: DataLoader) -> None:
    """Compare the classes of the training set with those of the validation set.

    Logs a warning if they have other names in one place.

    Raises:
        SettingError: they have the same names in another order, or are not as many.
    """
    datasets = [next(unwrapped_datasets(loader.dataset))[1] for loader in (first, second)]
    names = [[str(name) for name in _classes(dataset) or ()] for dataset in datasets]
    if names[0] == names[1] or not all(names):
        return
    one, other = next(pair for pair in zip_longest(*names) if pair[0] != pair[1])
    text = f"the classes of train_dataloader.dataset and val_dataloader.dataset differ: {one!r} there is {other!r} here"
    if sorted(names[0]) == sorted(names[1]) or len(names[0]) != len(names[1]):
        raise SettingError(f"{text}; give both the same metainfo.classes, in one order")
    print_log(f"{text}: a label has to mean the same in both", logger="current", level=logging.WARNING)


def first_sample(dataset: Any) -> Any:
    """Load the first sample of a data set; random states and caches of its pipeline stay as they are."""
    return _load_samples(dataset, [0])[0]


def _load_samples(dataset: Any, indices: Sequence[int]) -> list[Any]:
    if hasattr(dataset, "pipeline"):
        dataset = copy.copy(dataset)
        dataset.pipeline = copy.deepcopy(dataset.pipeline)  # a mosaic, for one, has a cache
    with kept_generators():
        seed_generators(0)
        return [dataset[index] for index in indices]


def _classes(dataset: Any) -> Any:
    """The classes of a data set as it has them, None if it has none."""
    return (getattr(dataset, "metainfo", None) or {}).get("classes")


def _anchor_channels(model: nn.Module) -> list[int]:
    """The number of channels of images that each stitched backbone takes."""
    return [module.network.anchor(0).in_chans for module in model.modules() if isinstance(module, StitchedBackbone)]


def _check_channels(model: nn.Module) -> None:
    """Compare the channels that anchors take with those that the preprocessor normalises."""
    mean = getattr(getattr(model, "data_preprocessor", None), "mean", None)
    for channels in _anchor_channels(model):
        if isinstance(mean, torch.Tensor) and mean.numel() not in (1, channels):
            raise SettingError(
                f"model.data_preprocessor.mean has {mean.numel()} values, and the anchors take images of {channels} "
                f"channels: give as many values (or one for all), or set in_chans={mean.numel()} in every anchor of "
                "model.backbone.anchors"
            )


def _check_inference(model: nn.Module) -> None:
    """Check ``test_cfg`` of a segmentor of mmseg's, which does not read it before the first image of an evaluation."""
    settings = getattr(model, "test_cfg", None)
    if not is_instance(model, "BaseSegmentor") or not isinstance(settings, Mapping):
        return
    mode = settings.get("mode", "whole")
    modes = ("whole", "slide", "slide_flip") if is_instance(model, "DepthEstimator") else ("whole", "slide")
    if mode not in modes:
        raise SettingError(f"model.test_cfg.mode must be one of {', '.join(modes)}; got {mode!r}")
    if mode == "whole":
        return
    pairs = [settings.get(name) for name in ("crop_size", "stride")]
    numbers = all(isinstance(pair, list | tuple) and len(pair) == 2 and min(pair) > 0 for pair in pairs)
    if not numbers or any(step > side for side, step in zip(*pairs, strict=True)):
        raise SettingError(
            "model.test_cfg with mode='slide' needs crop_size and stride, each (height, width) in pixels, and the "
            f"stride must not exceed the crop; got crop_size={pairs[0]} and stride={pairs[1]}"
        )


def _check_image(model: nn.Module, dataset: Any, setting: str) -> None:
    """Load the first sample, and compare its channels with those that the anchors take."""
    sample = first_sample(dataset)
    image = sample.get("inputs") if isinstance(sample, dict) else None
    for channels in _anchor_channels(model):
        if isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) != channels:
            raise SettingError(
                f"{setting}: its images have {len(image)} channels, and the anchors take {channels}: set in_chans="
                f"{len(image)} in every anchor of model.backbone.anchors, or load other channels (color_type)"
            )


def _check_classes(model: nn.Module, dataset: Any, place: str) -> None:
    """Compare the classes of a data set with those of its label loader and of the model's heads."""
    classes = _classes(dataset)
    if is_instance(model, "DepthEstimator"):  # NYUv2's classes are types of rooms
        return
    if isinstance(classes, str) or (classes is None and is_instance(dataset, "BaseSegDataset")):
        raise SettingError(
            f"{place}.metainfo.classes must be a list of names, such as ('background', 'road'); got {classes!r}"
        )
    if classes is None:
        return
    count = f"{place}: the data set has {len(classes)} classes ({join_names(list(map(str, classes)), 3)})"
    cure = f"set it to {len(classes)}, or {place}.metainfo.classes to the names of all classes"
    # A data set that uses some of the classes in its files has a label map; the loader alone knows the files' number.
    has_subset = bool(getattr(dataset, "label_map", None))
    for step in transforms_of(dataset):
        if is_instance(step, "LoadSegLabels") and not has_subset and step.num_classes != len(classes):
            raise SettingError(f"{count}, and LoadSegLabels.num_classes of its pipeline is {step.num_classes}: {cure}")
    for name, number, head in _heads(model):
        one_output = len(classes) == 2 and getattr(head, "out_channels", None) == 1  # the probability of the second
        if one_output and getattr(getattr(head, "loss_decode", None), "use_sigmoid", True) is False:
            raise SettingError(
                f"{count}, and {name} has one output, which needs {name}.loss_decode.use_sigmoid=True: set it, or "
                f"{name}.num_classes=2 and {name}.out_channels=2"
            )
        if number != len(classes) and not one_output:
            raise SettingError(f"{count}, and {name}.num_classes is {number}: {cure}")
        weights = getattr(getattr(head, "loss_decode", None), "class_weight", None)
        if isinstance(weights, list | tuple) and len(weights) != number:
            raise SettingError(f"{count}, and {name}.loss_decode.class_weight has {len(weights)} values: give {number}")


def _heads(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """The modules with a head for each class of the data set: (setting, number of classes, module)."""
    # A list of heads is named by its attribute: roi_head.bbox_head.0 is a bbox_head.
    attributes = {
        name: next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        for name, _ in model.named_modules()
    }
    if any(attribute == "semantic_head" or attribute.startswith("panoptic") for attribute in attributes.values()):
        return  # panoptic segmentation: each head has some of the classes
    has_heads = False
    for name, attribute in attributes.items():
        head = model.get_submodule(name)
        number = getattr(head, "num_classes", None)
        # Masks may serve all classes alike, and an auxiliary head may learn something else, such as edges.
        is_other_task = attribute == "auxiliary_head" and not _learns_labels(head)
        is_agnostic = getattr(head, "class_agnostic", False)
        if attribute in HEADS and isinstance(number, int) and not is_agnostic and not is_other_task:
            has_heads = True
            yield f"model.{name}", number, head
    if not has_heads and isinstance(number := getattr(model, "num_classes", None), int):
        yield "model", number, model


def _learns_labels(head: Any) -> bool:
    """Whether a head of mmseg's has the loss of its base class, over the classes of the label map."""
    base: Any = next((cls for cls in type(head).__mro__ if cls.__name__ == "BaseDecodeHead"), None)
    return base is not None and type(head).loss_by_feat is base.loss_by_feat


def _warn_of_binary_masks(dataset: Any, setting: str) -> None:
    classes = [cls for step in transforms_of(dataset) for cls in type(step).__mro__]
    if any(cls.__name__ == "LoadAnnotations" and cls.__module__.startswith("mmseg.") for cls in classes):
        # It imports mmseg, which only a task that loads by mmseg's transforms is sure to have.
        from mmsnnet.datasets.binary_labels import binary_mask_warning

        if warning := binary_mask_warning(dataset):
            print_log(f"{setting}: {warning}", logger="current", level=logging.WARNING)


def _check_files(dataset: Any, place: str) -> None:
    """Look for the files that the pipeline of a data set loads, by name in the listings of their folders."""
    steps = transforms_of(dataset)
    keys = [key for key, loaders in FILES.items() if any(is_instance(step, *loaders) for step in steps)]
    if not keys or not hasattr(dataset, "get_data_info") or not all(map(_is_local, (dataset, *steps))):
        return
    listings: dict[str, set[str]] = {}
    missing, number = [], 0
    for index in evenly_spaced(len(dataset), ENTRIES):
        info = dataset.get_data_info(index)
        for path in (info[key] for key in keys if isinstance(info.get(key), str) and "://" not in info[key]):
            folder, name = os.path.split(path)
            if folder not in listings:
                listings[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
            number += 1
            # A file system may accept another spelling than it lists.
            if name not in listings[folder] and not os.path.exists(path):
                missing.append(path)
    if missing:
        reason = _why_missing(dataset, missing)
        raise MissingFileError(f"{place}: {len(missing)} of {number} files are missing, such as {missing[0]!r}{reason}")


def _is_local(reader: Any) -> bool:
    """Whether a data set or transform reads from a local disk."""
    settings = getattr(reader, "backend_args", None) or getattr(reader, "file_client_args", None) or {}
    return settings.get("backend", "local") in ("local", "disk")


def _why_missing(dataset: Any, missing: Sequence[str]) -> str:
    """The likely reason for missing files, as the end of a message."""
    ann_file, suffix = getattr(dataset, "ann_file", None), getattr(dataset, "img_suffix", "")
    if not ann_file or not os.path.isfile(ann_file):
        return ": put it there, or check data_prefix, img_suffix and seg_map_suffix"
    names = [os.path.basename(path) for path in missing]
    if "\ufeff" in missing[0]:
        return f", because {ann_file} starts with a byte order mark: save it as UTF-8 without one"
    if any(name in (suffix, getattr(dataset, "seg_map_suffix", "")) for name in names):
        return f", because {ann_file} has an empty line: remove it"
    if suffix and any(name.endswith(2 * suffix) for name in names):
        return f", because {ann_file} names files with their suffix, which img_suffix={suffix!r} adds: leave it out"
    return f", named in {ann_file} without img_suffix={suffix!r}" if suffix else f", named in {ann_file}"


def _check_sizes(model: nn.Module, loader: DataLoader, dataset: Any, setting: str, training: bool) -> None:
    """Check that mmseg's preprocessor can stack the images of a data set, judging by those of extreme sizes."""
    preprocessor: Any = getattr(model, "data_preprocessor", None)
    if training and _is_mmsegs(preprocessor) and preprocessor.size is None and preprocessor.size_divisor is None:
        raise SettingError(
            "model.data_preprocessor has neither size nor size_divisor, and training images are padded to one of them: "
            "set one"
        )
    if not _is_mmsegs(preprocessor) or not hasattr(dataset, "get_data_info") or (loader.batch_size or 1) < 2:
        return
    sizes: dict[tuple[int, int], int] = {}
    for index in evenly_spaced(len(dataset), IMAGES):
        if (size := _stored_size(dataset.get_data_info(index).get("img_path"))) is not None:
            sizes.setdefault(size, index)
    if len(sizes) < 2:
        return
    extremes = {pick(sizes, key=lambda size: size[side]) for pick in (min, max) for side in (0, 1)}
    samples = _load_samples(dataset, [sizes[size] for size in sorted(extremes)])
    inputs = [sample.get("inputs") for sample in samples if isinstance(sample, dict)]
    shapes = _shapes(inputs, [sample.get("data_samples") for sample in samples if isinstance(sample, dict)])
    if shapes is not None and (wrong := _unstackable(preprocessor, shapes, training)):
        raise SettingError(f"{setting}: {wrong}")


@contextmanager
def sizes_explained(model: nn.Module, batch: Any, training: bool, setting: str) -> Iterator[None]:
    """Explain the error of a batch whose images cannot be stacked: name two of them and their sizes.

    Raises:
        DataError: in place of the error of mmseg's preprocessor.
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
    """The path and the shape (C, H, W) of each image of a batch; None for a batch without a list of images."""
    if not isinstance(inputs, list) or not isinstance(samples, list) or len(inputs) != len(samples) or not inputs:
        return None
    if not all(isinstance(image, torch.Tensor) and image.ndim == 3 for image in inputs):
        return None
    paths = [getattr(sample, "metainfo", {}).get("img_path", "an image") for sample in samples]
    return [(path, tuple(image.shape)) for path, image in zip(paths, inputs, strict=True)]


def _is_mmsegs(preprocessor: Any) -> bool:
    """Whether a preprocessor stacks images as mmseg's does."""
    stock: Any = next((cls for cls in type(preprocessor).__mro__ if cls.__module__.startswith("mmseg.")), None)
    return stock is not None and type(preprocessor).forward is stock.forward


def _unstackable(preprocessor: Any, shapes: Shapes, training: bool) -> str | None:
    """Why mmseg's preprocessor cannot stack images of some shapes; None if it can."""
    (first, shape), *others = shapes
    if other := next((one for one in others if one[1][0] != shape[0]), None):
        return f"{first} has {shape[0]} channels and {other[0]} {other[1][0]}: all images of a batch need as many"
    if training and preprocessor.size is None and preprocessor.size_divisor is not None:
        return None  # it pads to the largest image
    size = tuple(preprocessor.size)[-2:] if training and preprocessor.size is not None else (0, 0)
    padded = [(tuple(max(sides) for sides in zip(shape[1:], size, strict=True)), path, shape) for path, shape in shapes]
    (least, small, _), (most, large, shape) = min(padded), max(padded)
    if least == most:
        return None
    if not training:
        return (
            f"{small} is {least[0]} x {least[1]} after the pipeline and {large} {most[0]} x {most[1]}, and in "
            "evaluation all images of a batch need one size: set batch_size=1 of this loader"
        )
    if preprocessor.size is None:
        return (
            f"{small} is {least[0]} x {least[1]} after the training pipeline and {large} {most[0]} x {most[1]}: set "
            "model.data_preprocessor.size or size_divisor, to pad them, or crop them in the pipeline"
        )
    return (
        f"{large} is {shape[1]} x {shape[2]} after the training pipeline, larger than model.data_preprocessor.size="
        f"{size}: add dict(type='RandomCrop', crop_size={size}) to the pipeline, or set a larger size"
    )


def _stored_size(path: Any) -> tuple[int, int] | None:
    """Height and width in the header of a local image; None if Pillow cannot read it, which loaders report."""
    if not isinstance(path, str) or "://" in path:
        return None
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None
