"""One stitch of a trained model as a model by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import Tensor

from mmsnnet.apis.model import build_model, build_without_weights
from mmsnnet.apis.publish import Published, published_config, write_folder
from mmsnnet.engine.recalibration import check_recalibration, recalibrate_on_training_images
from mmsnnet.files.writing import new_folder
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, read_weights
from mmsnnet.models.recalibration import norm_statistics
from mmsnnet.stitching import Stitch

# The settings of hooks and schedulers that name a metric; the loops call it <stitch>/<metric>.
MONITORS = ("save_best", "monitor")


def extract_stitch(
    config: Config,
    checkpoint: str | os.PathLike[str],
    stitch: int | str,
    out: str | os.PathLike[str],
    recalibrate: int | None = None,
) -> Published:
    """Write one stitch as a model, in a folder as :func:`mmsnnet.apis.publish_model` writes it.

    The folder has only the weights that the stitch uses in evaluation mode, with low-rank updates merged and without
    auxiliary heads. Its config builds a space of one stitch (``only`` of the backbone), for evaluation and fine-tuning.

    Args:
        config: of the whole model, as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: of the whole model, as for :func:`mmsnnet.apis.build_model`.
        stitch: its id or name.
        out: the folder; it must not exist, or be empty.
        recalibrate: write statistics of batch norms that are the stitch's own, over this many training images
            (:func:`mmsnnet.engine.recalibration.recalibrate_on_training_images`); by default, those that routes share.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        OSError: ``out`` cannot be written, or another process is writing it.
        TypeError: the model has no stitched backbone.
        ValueError: ``out`` is a file or is not empty; the space has no such stitch; the checkpoint cannot be read,
            would run code, or does not fit the config's model (it has no stitching layers, for example); there are no
            batch norms to recalibrate, or too few training images.
    """
    out = Path(out).absolute()
    with new_folder(out, "--out") as folder:
        whole = build_without_weights(config)
        backbone = find_stitched_backbone(whole)
        chosen = backbone.space[stitch]
        if recalibrate is not None:
            check_recalibration(config, whole, recalibrate)
        whole.load_state_dict(read_weights(whole, checkpoint), assign=True)
        for key in backbone.space.layers:
            backbone.network.layers[str(key)] = backbone.network.layer(key).merged()
        weights = whole.state_dict()
        config = extracted_config(config, backbone, chosen)
        extracted = build_without_weights(config)
        used = {name: weights[name] for name in extracted.state_dict()}
        if recalibrate is not None:
            used = _recalibrated(config, used, recalibrate)
        return write_folder(folder, out, config, find_stitched_backbone(extracted), used)


def _recalibrated(config: Config, weights: Mapping[str, Tensor], num_images: int) -> dict[str, Tensor]:
    """The weights of a model of one stitch with the statistics that its batch norms have on training images."""
    model = build_model(config)
    model.load_state_dict(weights)
    [statistics] = recalibrate_on_training_images(
        config, model, find_stitched_backbone(model).space.stitches, num_images
    ).values()
    with norm_statistics(statistics):
        return model.state_dict()


def extracted_config(config: Config, backbone: StitchedBackbone, stitch: Stitch) -> Config:
    """The config of one stitch, from the config and the backbone of the whole model."""
    settings = config.to_dict()
    model = settings["model"]
    if model.get("auxiliary_head") is not None:
        model["auxiliary_head"] = None
    kept = {key: value for key, value in model["backbone"].items() if key not in ("stitch", "budget", "draw_from")}
    model["backbone"] = kept | dict(only=stitch.name, rank=0)
    if set(backbone.out_indices) != set(backbone.test_out_indices):
        # None in place of the maps that only auxiliary heads read: in_index of the other heads stays right.
        tested = backbone.test_out_indices
        model["backbone"]["out_indices"] = backbone.taps.as_setting(
            index if index in tested else None for index in backbone.taps.places
        )
    # One stitch has no others to teach, and a teacher is a file of this machine.
    for key in ("stitches_per_step", "distill"):
        (settings.get("train_cfg") or {}).pop(key, None)
    if settings.get("custom_hooks"):
        settings["custom_hooks"] = [
            hook for hook in settings["custom_hooks"] if not str(hook["type"]).endswith("NarrowDrawsHook")
        ]
    for loop in ("val_cfg", "test_cfg"):
        if "stitches" in (settings.get(loop) or {}):
            settings[loop]["stitches"] = "all"
    return published_config(Config(_rename_metrics(settings, backbone, stitch)))


def _rename_metrics(setting: Any, backbone: StitchedBackbone, stitch: Stitch, is_metric: bool = False) -> Any:
    """A setting with the metrics of ``stitch`` in place of those of other stitches."""
    if isinstance(setting, Mapping):
        return {key: _rename_metrics(value, backbone, stitch, key in MONITORS) for key, value in setting.items()}
    if isinstance(setting, list | tuple):
        return type(setting)(_rename_metrics(inner, backbone, stitch, is_metric) for inner in setting)
    if is_metric and isinstance(setting, str):
        name, slash, metric = setting.partition("/")
        return f"{stitch.name}/{metric}" if slash and name in backbone.space else setting
    return setting
