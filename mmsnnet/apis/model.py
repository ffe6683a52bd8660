from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, read_weights
from mmsnnet.registry import MODELS
from mmsnnet.stitching import StitchSpace


def build_space(config: Config) -> StitchSpace:
    """The stitch space of a config's backbone, without weights: quick, whatever the size of the anchors, unless a model
    computes while it is built.

    Raises:
        TypeError: the model has no stitched backbone.
        ValueError: a head or neck reads maps of another width than the backbone's.
    """
    check_preprocessor(config)
    model = build_without_weights(config)
    check_channels(config, model)
    return find_stitched_backbone(model).space


def build_without_weights(config: Config) -> BaseModel:
    """The model of a config as names and shapes, unless it computes while it is built."""
    try:
        with torch.device("meta"):
            return MODELS.build(config.model)
    except RuntimeError:  # of what cannot be computed without values
        return MODELS.build(config.model)


def build_uninitialized(config: Config) -> BaseModel:
    """The model of a config with whatever its memory held, in evaluation mode: for counting, where no value matters. A
    large model takes no longer than a small one."""
    model = build_without_weights(config)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.zero_()  # indices among them must be in range
    return model.eval()


def check_preprocessor(config: Config) -> None:
    """Looks whether the toolbox's preprocessor takes the ``mean`` and ``std`` that a config gives it.

    Raises:
        SettingError: they have other numbers of values than the toolboxes' preprocessors take.
    """
    if not config.get("model"):
        raise SettingError(
            f"config {str(config.filename)!r} has no model: set model, or _base_ to a config that has one"
        )
    preprocessor = config.model.get("data_preprocessor") or {}
    kind = preprocessor.get("type")
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(None) as registry:  # the toolbox's, if the name has no scope
            kind = registry.get(kind)
    if not isinstance(kind, type) or kind.__module__.partition(".")[0] not in ("mmengine", "mmseg", "mmdet"):
        return
    for name in ("mean", "std"):
        values = preprocessor.get(name)
        if isinstance(values, list | tuple) and len(values) not in (1, 3):
            raise SettingError(
                f"model.data_preprocessor.{name} has {len(values)} values, and {kind.__name__} takes 3, or "
                f"1 for all channels. Images of {len(values)} channels need model.data_preprocessor.type="
                f"'mmsnnet.SegDataPreProcessor' without bgr_to_rgb, in_chans={len(values)} in every anchor, and "
                "color_type='unchanged' of LoadImage (docs/datasets.md)"
            )


def check_channels(config: Config, model: nn.Module) -> None:
    """Compares the ``in_channels`` of what reads a stitched backbone's maps, a neck or else mmseg's heads, with their
    width.

    Raises:
        ValueError: they differ; the message names the setting.
    """
    backbones = [module for module in model.modules() if isinstance(module, StitchedBackbone)]
    if not backbones:
        return
    width = backbones[0].network.anchor(-1).widths[-1]
    # Of a cascade of decode heads, the first alone reads the backbone's maps for certain.
    heads = {"decode_head": _listed(config.model.get("decode_head"))[:1]}
    heads["auxiliary_head"] = _listed(config.model.get("auxiliary_head"))
    neck = _listed(config.model.get("neck"))
    for name, readers in ({"neck": neck} if neck else heads).items():
        for reader in readers:
            if any(channels != width for channels in _listed(reader.get("in_channels"))):
                raise ValueError(
                    f"model.{name}.in_channels is {reader['in_channels']}, and the backbone's maps have {width} "
                    "channels, the width of its largest anchor: set it to that"
                )


def _listed(setting: Any) -> Sequence[Any]:
    if setting is None:
        return ()
    return setting if isinstance(setting, list | tuple) else (setting,)


def build_model(
    config: Config, checkpoint: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> BaseModel:
    """The model of a config, in evaluation mode; choose its stitch with ``model.backbone.set_stitch``.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: weights to load, all that the model has and no others: a checkpoint of a run, a ``.safetensors``
            file, a published folder, a URL or ``hf-hub:owner/name``. None leaves random ones, and the anchors'
            pretrained files unread.
        device: where to put it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read, would run code, or does not fit the model (what is missing, too much or of
            another shape is listed).
    """
    model = MODELS.build(config.model)
    if checkpoint is not None:
        model.load_state_dict(read_weights(model, checkpoint))
    return model.to(device).eval()
