"""Read and write the file of a run's operating points, which earlier and simultaneous runs write, too."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log
from torch import nn

from mmsnnet.engine.ranks import fail_together
from mmsnnet.errors import UserError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.files.locking import locked
from mmsnnet.files.writing import OutputError, check_output
from mmsnnet.models import StitchedBackbone
from mmsnnet.models.model_weights import DRAWS
from mmsnnet.stitching.stitch import as_blocks

# Settings that change no metric of a model whose weights are loaded: in any part of the model, and in the backbone.
TRAINING_ONLY = ("init_cfg", "pretrained", "with_cp", "drop_path_rate")
BACKBONE_ONLY = ("stitch", "budget", "seed", "flops_step", "draw_from", "frozen_stages", "frozen_anchors", "norm_eval")


class CannotResumeError(UserError, ValueError):
    """A file of operating points does not belong to the run that should continue it."""


def run_header(config: Config, backbone: StitchedBackbone, dataset: Any) -> OperatingPoints:
    """The header of a run's file: operating points without points and without a fingerprint."""
    return OperatingPoints(
        config=config.filename and str(Path(config.filename)),
        checkpoint=config.get("load_from"),
        dataset=getattr(dataset, "metainfo", {}).get("name", type(dataset).__name__),
        input_shape=backbone.img_size,
        device=str(next(backbone.parameters()).device),
        depths=as_blocks(backbone.space.stages),
    )


def run_fingerprint(
    config: Config, model: nn.Module, dataset: Any, fp16: bool, recalibrate: int | None = None
) -> dict[str, str]:
    """Digests of everything that metrics depend on: the checkpoint, the config, the data set, and the recalibration.

    A runner that was built without a config is identified by the ``repr`` of its parts.

    Args:
        config: of the runner.
        model: without wrappers.
        dataset: the test set.
        fp16: whether the loop runs the model under autocast.
        recalibrate: the number of training images for batch norms; None for no recalibration, which has no digest.
    """
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if not name.endswith(DRAWS):  # the number of training iterations changes no metric
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    settings = [_settings_of_metrics(config.get("model", str(model))), config.get("test_evaluator"), fp16]
    loading = config.get("test_dataloader", {}).get("dataset", type(dataset).__name__)
    training = config.get("train_dataloader") or {}
    recalibration = [recalibrate, training.get("dataset"), training.get("batch_size")]
    return {
        "checkpoint": weights.hexdigest(),
        "config": _digest(settings),
        "data set": _digest([loading, len(dataset), _entries_digest(dataset)]),
        **({} if recalibrate is None else {"recalibration": _digest(recalibration)}),
        **({"export": _digest(config.export)} if "export" in config else {}),
    }


def load_measured_points(
    header: OperatingPoints, stitches: Collection[OperatingPoint], path: str, resume: bool
) -> OperatingPoints:
    """Add the points that a run continues (``resume``) to its header; all ranks get the same points.

    Args:
        header: of the run, with its fingerprint.
        stitches: every stitch of the model, with its costs.
        path: of the file, which need not exist.
        resume: whether the run continues the file.

    Raises:
        CannotResumeError: ``resume`` is set, and the file is damaged or belongs to another run.
        OutputError: the file cannot be written.
    """
    points = [header]
    # Only rank 0 reads the file: if the ranks saw different points, they would wait for each other forever.
    with fail_together():
        if is_main_process():
            check_output(path, "--out")
            if resume and Path(path).exists():
                points = [_read_points(header, stitches, path)]
    broadcast_object_list(points)
    return points[0]


def save_points(
    points: OperatingPoints, stitches: Collection[OperatingPoint], path: str, spare: Path
) -> OperatingPoints:
    """Merge a run's points with their file and write it; return them.

    Points of the same run stay, and latencies of the same model.

    Raises:
        OutputError: the file cannot be written. The points are in the file ``spare`` then.
    """
    try:
        with locked(path):
            points = _with_stored_points(points, stitches, path)
            points.save(path)
    except OSError as error:
        points.save(spare)
        text = f"{path} cannot be written ({error.strerror or error}): go on with --out {spare} --resume"
        raise OutputError(error.errno, text) from error
    return points


def _read_points(header: OperatingPoints, stitches: Collection[OperatingPoint], path: str) -> OperatingPoints:
    try:
        stored = OperatingPoints.load(path)
    except ValueError as error:
        raise CannotResumeError(f"{error}; leave out --resume to overwrite the file") from error
    if not (has_metrics := any(point.metrics for point in stored)) and _is_same_model(stored, header, stitches):
        return header
    names = dict.fromkeys([*header.fingerprint, *stored.fingerprint])
    different = [name for name in names if header.fingerprint.get(name) != stored.fingerprint.get(name)]
    if not different:
        return replace(header, points=stored.points, benchmark=stored.benchmark)
    if not (stored.fingerprint or has_metrics):
        different = ["model or config"]
    raise CannotResumeError(
        f"{path} has results of another {' and '.join(different)}, which --resume cannot continue: choose another "
        "--out, or leave out --resume to overwrite the file"
    )


def _with_stored_points(points: OperatingPoints, stitches: Collection[OperatingPoint], path: str) -> OperatingPoints:
    try:
        stored = OperatingPoints.load(path)
    except FileNotFoundError:
        return points
    except ValueError as error:
        print_log(f"{path} is replaced: {error}", "current", logging.WARNING)
        return points
    if stored.fingerprint != points.fingerprint:
        if any(point.metrics for point in stored):
            text = f"{path}: the results of another checkpoint, config, data set or recalibration are replaced"
            print_log(text, "current", logging.WARNING)
        is_same = _is_same_model(stored, points, stitches)
        timed = (replace(point, metrics={}) for point in stored if is_same and point.latency_ms is not None)
        stored = replace(stored, points=tuple(timed), benchmark=stored.benchmark if is_same else {})
    return points.merged_with(stored)


def _is_same_model(stored: OperatingPoints, header: OperatingPoints, stitches: Collection[OperatingPoint]) -> bool:
    """Whether latencies in a file were measured on this model, with these or other weights."""
    configs = {Path(run.config).name for run in (stored, header) if run.config is not None}
    known, measured = (
        {(point.id, point.name, point.kind, point.flops, point.params) for point in points}
        for points in (stitches, stored)
    )
    return len(configs) < 2 and stored.input_shape == header.input_shape and measured <= known


def _settings_of_metrics(setting: Any) -> Any:
    """A model's config without the settings that change no metric."""
    if isinstance(setting, Mapping):
        is_backbone = str(setting.get("type")).rpartition(".")[2] in ("StitchedBackbone", "StitchedViT")
        ignored = TRAINING_ONLY + (BACKBONE_ONLY if is_backbone else ())
        relevant = {name: _settings_of_metrics(value) for name, value in setting.items() if name not in ignored}
        # One class under two names.
        return relevant | ({"type": str(setting["type"]).replace("Backbone", "ViT")} if is_backbone else {})
    return [_settings_of_metrics(value) for value in setting] if isinstance(setting, list | tuple) else setting


def _entries_digest(dataset: Any) -> str | None:
    """A digest of the entries of mmengine's data sets and of their files' sizes and dates; None for other data sets."""
    if not hasattr(dataset, "get_data_info"):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        files = [value for name, value in info.items() if name.endswith("path") and isinstance(value, str)]
        stats = [os.stat(file) for file in files if os.path.exists(file)]
        digest.update(_digest([info, [(stat.st_size, stat.st_mtime_ns) for stat in stats]]).encode())
    return digest.hexdigest()


def _digest(setting: Any) -> str:
    text = json.dumps(setting, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
