"""Released SN-Net checkpoints (arXiv 2302.06586) under mmsnnet's names: DeiT, Swin, ResNet, ResNet to Swin, LeViT.

A family fixes the anchors, so the expected names and shapes are those of our model. No tensor is skipped, unless it is
known to be unused: a tensor that is missing, left over or of another shape is an error that lists it.
"""

from __future__ import annotations

import os
import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import torch
from timm.models.levit import Levit
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from mmsnnet.converters.released import Conversion, Renaming, check_files, read_released, write_converted
from mmsnnet.errors import DataError, SettingError
from mmsnnet.files.reading import describe_mismatch, join_names
from mmsnnet.models import StitchedBackbone
from mmsnnet.models.model_weights import DRAWS
from mmsnnet.stitching import LayerKey, StitchedNetwork
from mmsnnet.stitching.anchors.plain import PlainAnchor
from mmsnnet.stitching.anchors.positions import GRID

Shape = tuple[int, ...]

# The backbone of each family, as its config in configs/imagenet sets it.
FAMILIES: dict[str, dict[str, Any]] = {
    "deit": dict(
        anchors=[dict(model=f"deit_{size}_patch16_224.fb_in1k") for size in ("tiny", "small", "base")],
        skip_final_norm=True,
    ),
    "swin": dict(
        anchors=[dict(model=f"swin_{size}_patch4_window7_224.ms_in22k_ft_in1k") for size in ("tiny", "small", "base")],
        skip_stages=(3,),
    ),
    "resnet": dict(anchors=[dict(model="resnet18.tv_in1k"), dict(model="resnet50.a1_in1k")], skip_stages=(0, 3)),
    "resnet_swin": dict(
        anchors=[dict(model="resnet18.tv_in1k"), dict(model="swin_tiny_patch4_window7_224.ms_in1k")],
        skip_stages=(0, 3),
    ),
    "levit": dict(
        anchors=[dict(model="levit_192.fb_dist_in1k"), dict(model="levit_256.fb_dist_in1k")], skip_stages=(2,)
    ),
}

ANCHOR = re.compile(r"anchors\.(\d+)\.")
# The name of a tensor that only an anchor of one kind has. The kinds of a file's anchors name its family.
KINDS = {
    "deit": re.compile(r"cls_token$"),
    "swin": re.compile(r"layers\.0\."),
    "resnet": re.compile(r"layer1\."),
    "levit": re.compile(r"blocks\.0\.m\."),
}
# Tensors that training or the published code alone needs: buffers, and the second half of a split batch norm.
DROPPED = ("relative_position_index", "attn_mask", "attention_bias_idxs", "aux_bn")


@dataclass(frozen=True)
class SNNetConversion(Conversion):
    """A :class:`Conversion` of an SN-Net checkpoint.

    Args:
        unused: the released names of stitching layers that no route crosses; they are dropped.
    """

    unused: Sequence[str]


def convert_snnet(source: str | os.PathLike[str], target: str | os.PathLike[str], family: str) -> SNNetConversion:
    """Convert a released checkpoint to one of ours.

    Args:
        source: the checkpoint to read, its weights at the top or under ``state_dict``, ``model`` or ``module``.
        target: the file to write: ``.safetensors``, or ``.pth`` or ``.pt`` with the weights under ``state_dict``. It
            is written as a whole, and only if nothing fails.
        family: one of ``FAMILIES``.

    Raises:
        FileNotFoundError: there is no such source.
        OSError: the target cannot be written.
        ValueError: the source cannot be read or is a checkpoint of another family; or tensors are missing, left over
            or of another shape.
    """
    source, target = os.fspath(source), Path(target)
    check_files(source, target)
    weights, meta = read_released(source)
    try:
        _check_family(weights, family)
        with torch.device("meta"):
            backbone = StitchedBackbone(num_classes=1000, scheme="sliding_window", rank=0, **FAMILIES[family])
        conversion = to_mmsnnet(weights, backbone.network)
    except (DataError, SettingError) as error:
        raise type(error)(f"checkpoint {source!r}: {error}") from error
    write_converted(target, conversion.weights, meta)
    return conversion


def to_mmsnnet(weights: Mapping[str, Tensor], network: StitchedNetwork) -> SNNetConversion:
    """Rename released weights to the names of a network of their family.

    Raises:
        DataError: names are missing or left over, or shapes do not match; the message lists them.
    """
    layers = _layers(network)
    dropped = {name: part for name in weights for part in DROPPED if part in name.split(".")}
    idle = tuple(_unused_layers(network, layers))
    unused = {name: layer for name in weights for layer in idle if name.startswith(layer)}
    saved = {name: tuple(value.shape) for name, value in weights.items() if name not in dropped | unused}
    renamings = [*_anchor_renamings(network, saved), *_layer_renamings(network, layers)]
    expected = {renaming.released: renaming.shape for renaming in renamings}
    if wrong := describe_mismatch(saved, expected):
        raise DataError(f"{wrong}. Convert the file as it was released, for the anchors of the family's config")
    # A layer of ResNets is a convolution of 1 x 1, with a weight (out, in, 1, 1).
    converted = {r.ours: weights[r.released].flatten(1) if r.is_convolution else weights[r.released] for r in renamings}
    anchors = [network.anchor(index) for index in range(len(network.anchors))]
    added = {f"backbone.{DRAWS}": torch.tensor(0)} | {
        f"backbone.network.anchors.{index}.{GRID}": torch.tensor(anchor.positions.grid)
        for index, anchor in enumerate(anchors)
        if isinstance(anchor, PlainAnchor)
    }
    return SNNetConversion(
        weights=converted | added,
        mapped=Counter(renaming.patterns for renaming in renamings),
        dropped=Counter([f"*.{part}*" for part in dropped.values()] + [f"{layer}*" for layer in unused.values()]),
        added=dict.fromkeys(added, 1),
        unused=tuple(dict.fromkeys(layer.removesuffix(".transform.") for layer in unused.values())),
    )


def _check_family(weights: Mapping[str, Tensor], family: str) -> None:
    """Compare the family that the names tell with the one that the user has named."""
    found: dict[int, str] = {}
    for name in weights:
        if match := ANCHOR.match(name):
            for kind, mark in KINDS.items():
                if mark.match(name, match.end()):
                    found[int(match[1])] = kind
    likely = "_".join(dict.fromkeys(found[index] for index in sorted(found)))
    if likely not in FAMILIES:
        raise DataError(
            "it is no stitched model of SN-Net: expected names like anchors.0.cls_token, anchors.0.layers.0 or "
            f"anchors.0.layer1; got {join_names(list(weights), 4)}. Checkpoints of SN-Netv2's segmentation models need "
            "snnetv2_to_mmsnnet.py"
        )
    if likely != family:
        raise SettingError(f"its names are those of the family {likely}, not of {family}: set --family {likely}")


@dataclass(frozen=True)
class _Renaming(Renaming):
    """A renaming with the released shape."""

    shape: Shape
    is_convolution: bool = False


def _anchor_renamings(network: StitchedNetwork, saved: Mapping[str, Shape]) -> Iterator[_Renaming]:
    for index in range(len(network.anchors)):
        model = network.anchor(index).model
        prefix, own = f"anchors.{index}.", f"backbone.network.anchors.{index}.model."
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if isinstance(model, Levit):
            released = _levit_names(prefix, shapes, saved)
        else:
            swin = isinstance(model, SwinTransformer)
            released = {name: prefix + (_microsoft_name(name) if swin else name) for name in shapes}
        for name, shape in shapes.items():
            yield _Renaming(released[name], own + name, (f"{prefix}*", f"{own}*"), shape)


def _microsoft_name(name: str) -> str:
    """The name in Microsoft's Swin, which downsamples at the end of a stage, of a tensor of timm's."""
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name)
    return re.sub(r"^head\.fc\.", "head.", name)


def _levit_names(prefix: str, ours: Mapping[str, Shape], saved: Mapping[str, Shape]) -> dict[str, str]:
    """Facebook's names of timm's LeViT: both have the same tensors in the same order.

    The last parts of names and the shapes show whether the order is kept. Equal blocks look alike, but their numbers
    have to ascend: a file that sorts its names as text has block 10 before block 2.
    """
    theirs = [name for name in saved if name.startswith(prefix)]
    for name, own in zip_longest(theirs, ours):
        found = "the end" if name is None else f"{name} {saved[name]}"
        wanted = "the end" if own is None else f"{own.rpartition('.')[2]} {ours[own]}"
        if name is None or own is None or not name.endswith(f".{wanted.split()[0]}") or saved[name] != ours[own]:
            raise DataError(f"{_ORDER}; found {found} in place of {wanted} ({own})")
    numbers = [int(match[1]) for name in theirs if (match := re.match(rf"{prefix}blocks\.(\d+)\.", name))]
    if numbers != sorted(numbers):
        raise DataError(f"{_ORDER}; the blocks of {prefix}* do not ascend")
    return dict(zip(ours, theirs, strict=True))


_ORDER = "LeViT's tensors are known by their order, so convert the file as it was released, not saved again in another"


def _layers(network: StitchedNetwork) -> dict[str, list[LayerKey]]:
    """The stitching layers in the lists of the released model, by name: one for each stitched stage and pair."""
    by_place: dict[tuple[int, int], list[LayerKey]] = defaultdict(list)
    for key in network.space.layers:
        by_place[_stage(network, key), key.source].append(key)
    stages = sorted({stage for stage, _ in by_place})
    several = len(network.space.stages[0]) > 1
    return {
        f"stitch_layers.{f'{stages.index(stage)}.' if several else ''}{pair}": keys
        for (stage, pair), keys in by_place.items()
    }


def _layer_renamings(network: StitchedNetwork, layers: Mapping[str, Sequence[LayerKey]]) -> Iterator[_Renaming]:
    for released, keys in layers.items():
        for number, key in enumerate(keys):
            convolution = isinstance(network.anchor(key.source).model, ResNet)
            patterns = (f"{released}.*", f"backbone.network.layers.{key.source}_{{j}}-{key.target}_{{k}}.*")
            for name, parameter in network.layer(key).named_parameters():
                square = convolution and name == "weight"
                yield _Renaming(
                    f"{released}.{number}.transform.{name}",
                    f"backbone.network.layers.{key}.{name}",
                    patterns,
                    tuple(parameter.shape) + (1, 1) * square,
                    square,
                )


def _unused_layers(network: StitchedNetwork, layers: Mapping[str, Sequence[LayerKey]]) -> Iterator[str]:
    """The layers that the published code makes, and no route crosses.

    A stage whose blocks are fewer in the front anchor may have a layer for each of them, the last ones without use.
    """
    for released, keys in layers.items():
        blocks = network.space.stages[keys[0].source][_stage(network, keys[0])]
        yield from (f"{released}.{number}.transform." for number in range(len(keys), blocks))


def _stage(network: StitchedNetwork, key: LayerKey) -> int:
    return bisect(list(accumulate(network.space.stages[key.source])), key.source_block)
