"""Find the weights in a checkpoint and compare them with a model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from mmsnnet.errors import DataError
from mmsnnet.files.reading import describe_mismatch, extract_weights, join_names, nonfinite_names, tensor_shapes
from mmsnnet.models.checkpoint_reading import read_model_checkpoint
from mmsnnet.stitching.anchors.plain import PlainAnchor
from mmsnnet.stitching.anchors.positions import GRID

# Last part of the name under which a StitchedBackbone's state dict counts its draws. Only training needs it.
DRAWS = "draws"


def read_weights(model: nn.Module, source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read all the weights of a model from a checkpoint.

    Args:
        source: as of :func:`mmsnnet.files.reading.read_checkpoint`.

    Raises:
        MissingFileError: the file does not exist, or the folder has no weights.
        DataError: the file cannot be read, or does not fit the model: see :func:`check_weights`.
    """
    checkpoint = read_model_checkpoint(source)
    check_weights(model, checkpoint, source)
    return model_weights(checkpoint, source)


def model_weights(checkpoint: Mapping[str, Any], source: str | os.PathLike[str]) -> dict[str, Any]:
    """The weights in a checkpoint, by the names that mmengine loads.

    Raises:
        DataError: the checkpoint has no weights where the runner looks for them.
    """
    where = f"checkpoint {os.fspath(source)!r}"
    weights = extract_weights(checkpoint, where, ("state_dict",))
    if nested := [name for name, value in weights.items() if isinstance(value, dict)]:
        raise DataError(
            f"{where} should have its weights under 'state_dict', where mmengine looks for them, or bare; it has "
            f"{join_names(nested)}. Re-save them: torch.save({{'state_dict': ...}}, ...)"
        )
    return {re.sub(r"^module\.", "", name): value for name, value in weights.items()}


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A digest of a model's weights, whatever their order, without the number of draws."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in weights if name.rpartition(".")[2] != DRAWS):
        tensor = weights[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers for distributed training and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule("module")
    return model


def check_weights(model: nn.Module, checkpoint: Mapping[str, Any], source: str | os.PathLike[str]) -> None:
    """Compare a checkpoint's weights with a model by name and shape.

    The number of draws may be missing. So may the grid of an anchor; if it is there, the position embeddings of the
    anchor may be of another image size, because loading resamples them.

    Raises:
        DataError: a tensor is missing, unknown to the model or of another shape, or contains NaN or infinity; the
            message lists them.
    """
    model = unwrapped_model(model)
    weights, expected = model_weights(checkpoint, source), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PlainAnchor):
            prefix = f"{name}." if name else ""
            module.positions.take_grid(weights, prefix)
            expected.pop(prefix + GRID, None)
    saved_shapes, expected_shapes = (
        tensor_shapes({name: value for name, value in tensors.items() if name.rpartition(".")[2] != DRAWS})
        for tensors in (weights, expected)
    )
    if mismatch := describe_mismatch(saved_shapes, expected_shapes):
        raise DataError(
            f"checkpoint {os.fspath(source)!r} is not one of the model that the config describes. {mismatch}"
        )
    # A model may keep infinity on purpose, in a mask: its own tensor then has it too.
    if bad := [name for name in nonfinite_names(weights) if name not in nonfinite_names({name: expected.get(name)})]:
        raise DataError(
            f"checkpoint {os.fspath(source)!r} has NaN or infinity in {join_names(bad, 5)}. The run that wrote it has "
            "diverged, or the file is damaged: take an earlier checkpoint"
        )
