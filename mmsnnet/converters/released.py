"""What all converters of released checkpoints share: reading, writing, and the account of a conversion."""

from __future__ import annotations

import io
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

from mmsnnet.errors import DataError, SettingError
from mmsnnet.files.reading import extract_weights, join_names, nonfinite_names
from mmsnnet.files.writing import check_output, write_atomically
from mmsnnet.models import read_model_checkpoint
from mmsnnet.version import __version__

Weights = dict[str, Tensor]

SUFFIXES = (".pth", ".pt", ".safetensors")
OURS = re.compile(r"backbone\.network\.anchors\.\d+\.")


@dataclass(frozen=True)
class Conversion:
    """Converted weights, and an account of them.

    Args:
        weights: under our names.
        mapped: the number of tensors for each pair of patterns (released name, our name).
        dropped: the number of released tensors that we do not store, by pattern.
        added: the number of our tensors that the released file does not store, by pattern.
    """

    weights: Weights
    mapped: Mapping[tuple[str, str], int]
    dropped: Mapping[str, int]
    added: Mapping[str, int]


@dataclass(frozen=True)
class Renaming:
    """The released and our name of one tensor, and the patterns of both."""

    released: str
    ours: str
    patterns: tuple[str, str]


class PickledConfig:
    """Stand-in for yacs' config, which Microsoft's Swin code pickles beside the weights: a dict, without code."""

    def __new__(cls) -> Any:  # torch fills no dict of another class
        return OrderedDict()


def check_files(source: str, target: Path) -> None:
    """Check the names of the file to read and of the file to write, before work begins.

    Raises:
        SettingError: the target has another suffix than ``SUFFIXES``, or is the source.
        OSError: the target cannot be written.
    """
    if target.suffix not in SUFFIXES:
        raise SettingError(f"the name of the file to write ends in {', '.join(SUFFIXES)}; got {str(target)!r}")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise SettingError(f"{str(target)!r} is the source: name another file to write")
    check_output(target)


def read_released(source: str) -> tuple[Weights, dict[str, Any]]:
    """The weights of a released checkpoint, and its names and colours of the classes, where mmseg looks for them.

    Raises:
        MissingFileError: the file does not exist.
        DataError: the file cannot be read, has an entry that is no tensor, a value that is no finite number, or our
            names.
    """
    file = read_model_checkpoint(source, safe_globals=[(PickledConfig, "yacs.config.CfgNode")])
    weights = clean_state_dict(extract_weights(file, f"checkpoint {os.fspath(source)!r}"))
    if others := [key for key, value in weights.items() if not isinstance(value, Tensor)]:
        raise DataError(f"checkpoint {source!r} has entries that are no tensors: {join_names(others)}")
    if bad := nonfinite_names(weights):
        raise DataError(f"checkpoint {source!r} has NaN or infinity in {join_names(bad)}: download it again")
    if any(OURS.match(key) for key in weights):
        raise DataError(f"checkpoint {source!r}: these names are mmsnnet's already")
    meta = file.get("meta")
    names = ("dataset_meta", "CLASSES", "PALETTE")
    return weights, {key: meta[key] for key in names if key in meta} if isinstance(meta, Mapping) else {}


def write_converted(path: Path, weights: Weights, meta: dict[str, Any]) -> None:
    """Write converted weights as a whole, or leave the file as it was."""
    if path.suffix == ".safetensors":
        # Copies: the format refuses tensors that share memory.
        copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
        write_atomically(path, safetensors.torch.save(copies, {"format": "pt"}))
        return
    buffer = io.BytesIO()
    torch.save({"state_dict": weights, "meta": meta | {"mmsnnet_version": __version__}}, buffer)
    write_atomically(path, buffer.getbuffer())
