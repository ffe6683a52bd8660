"""The model of a config, and checks of its settings."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from mmsnnet.errors import SettingError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, model_costs, read_weights
from mmsnnet.registry import MODELS
from mmsnnet.stitching import StitchSpace
from mmsnnet.stitching.stitch import as_blocks


def build_model(
    config: Config, checkpoint: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> BaseModel:
    """The model of a config, in evaluation mode; choose its stitch with ``model.backbone.set_stitch``.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: a checkpoint of a run, a ``.safetensors`` file, a published folder, a URL or ``hf-hub:owner/name``,
            with all weights of the model and no others. None leaves random weights, without the anchors' pretrained
            files.
        device: where to put it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint cannot be read, would run code, or does not fit the model; the message lists missing
            and extra weights, and those of another shape.
    """
    model = MODELS.build(config.model)
    if checkpoint is not None:
        model.load_state_dict(read_weights(model, checkpoint))
    return model.to(device).eval()


def deployed(model: BaseModel) -> BaseModel:
    """A copy of a model for deployment: low-rank updates merged, evaluation mode."""
    network = find_stitched_backbone(model).network
    return copy.deepcopy(model, {id(network): network.merged()}).eval()


def build_space(config: Config) -> StitchSpace:
    """The stitch space of a config's backbone, built without weights.

    Raises:
        TypeError: the model has no stitched backbone.
        SettingError: a head or neck expects another number of channels than the backbone's maps have.
    """
    check_preprocessor(config)
    model = build_without_weights(config)
    check_channels(config, model)
    return find_stitched_backbone(model).space


def build_without_weights(config: Config) -> BaseModel:
    """The model of a config on the meta device; on the CPU if it computes while it is built."""
    try:
        with torch.device("meta"):
            return MODELS.build(config.model)
    except RuntimeError:  # a value was needed
        return MODELS.build(config.model)


def build_uninitialized(config: Config) -> BaseModel:
    """The model of a config with uninitialised memory as weights, in evaluation mode, for counting.

    This takes no longer for a large model than for a small one.
    """
    model = build_without_weights(config)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.zero_()  # some are indices, which must be in range
    return model.eval()


def count_stitches(
    config: Config,
    model: BaseModel,
    input_shape: Sequence[int] | None = None,
    *,
    checkpoint: str | None = None,
    device: str | None = None,
) -> OperatingPoints:
    """FLOPs and parameters of every stitch of a model, as operating points without metrics.

    Args:
        config: of the model.
        model: with or without weights in its memory, but not on the meta device.
        input_shape: height and width of the images; default: the backbone's ``img_size``.
        checkpoint, device: as the operating points name them.

    Raises:
        ValueError: height or width is not positive.
    """
    backbone = find_stitched_backbone(model)
    height, width = input_shape or backbone.img_size
    points = OperatingPoints(
        config=str(config.filename),
        checkpoint=checkpoint,
        dataset=None,
        input_shape=(height, width),
        device=device,
        depths=as_blocks(backbone.space.stages),
    )
    costs = model_costs(model, points.input_shape)
    for stitch in backbone.space:
        cost = costs[stitch.id]
        points = points.add(OperatingPoint(stitch.id, stitch.name, stitch.kind, cost.flops, cost.params))
    return points


def check_preprocessor(config: Config) -> None:
    """Check that the toolbox's preprocessor takes as many values of ``mean`` and ``std`` as the config has.

    Raises:
        SettingError: it does not, or the config has no model.
    """
    if not config.get("model"):
        raise SettingError(
            f"config {str(config.filename)!r} has no model: set model, or _base_ to a config that has one"
        )
    preprocessor = config.model.get("data_preprocessor") or {}
    class_ = preprocessor.get("type")
    if isinstance(class_, str):
        with MODELS.switch_scope_and_registry(None) as registry:  # of the toolbox, if the name has no scope
            class_ = registry.get(class_)
    if not isinstance(class_, type) or class_.__module__.partition(".")[0] not in ("mmengine", "mmseg", "mmdet"):
        return
    for name in ("mean", "std"):
        values = preprocessor.get(name)
        if isinstance(values, list | tuple) and len(values) not in (1, 3):
            raise SettingError(
                f"model.data_preprocessor.{name} has {len(values)} values, and {class_.__name__} takes 3, or 1 for all "
                f"channels. For images of {len(values)} channels set model.data_preprocessor.type="
                f"'mmsnnet.SegDataPreProcessor' without bgr_to_rgb, in_chans={len(values)} in every anchor, and "
                "color_type='unchanged' of LoadImage (docs/datasets.md)"
            )


def check_channels(config: Config, model: nn.Module) -> None:
    """Check that the neck, or mmseg's heads, expect the width of a stitched backbone's maps as ``in_channels``.

    Raises:
        SettingError: they do not; the message names the setting.
    """
    backbones = [module for module in model.modules() if isinstance(module, StitchedBackbone)]
    if not backbones:
        return
    channels = backbones[0].channels
    # In a cascade of decode heads only the first one surely reads the backbone's maps.
    readers = {
        "decode_head": _as_sequence(config.model.get("decode_head"))[:1],
        "auxiliary_head": _as_sequence(config.model.get("auxiliary_head")),
    }
    if neck := _as_sequence(config.model.get("neck")):
        readers = {"neck": neck[:1]}
    for name, settings in readers.items():
        for setting in settings:
            key = "embed_dim" if "embed_dim" in setting else "in_channels"  # as of mmseg's Feature2Pyramid
            given = _as_sequence(setting.get(key))
            # A neck reads all maps. So does a head with several in_channels and no in_index.
            several = name == "neck" or (len(given) > 1 and "in_index" not in setting)
            places = range(len(channels)) if several else _as_sequence(setting.get("in_index", -1))
            wrong = any(not -len(channels) <= place < len(channels) for place in places)
            read = [] if wrong else [channels[place] for place in places]
            # One number stands for maps that all have as many channels.
            if given and (wrong or list(given) != (read if len(given) > 1 else list(dict.fromkeys(read)))):
                cure = "set it to those that it reads"
                if key == "embed_dim" and len(set(channels)) > 1:
                    cure = f"hierarchical anchors need no {setting.type}: set model.{name}=None"
                raise SettingError(
                    f"model.{name}.{key} is {setting[key]}, and the backbone's maps have {_joined(channels)} channels, "
                    f"the width of its largest anchor at each of out_indices: {cure}"
                )


def _joined(channels: Sequence[Any]) -> str:
    """The channels of maps: one number if all have as many."""
    different = dict.fromkeys(channels)
    return ", ".join(map(str, channels if len(different) > 1 else different))


def _as_sequence(setting: Any) -> Sequence[Any]:
    if setting is None:
        return ()
    return setting if isinstance(setting, list | tuple) else (setting,)
