"""What a run over stitches starts with: the operating points that its file has already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from torch import nn
from torch.utils.data import Dataset

from mmsnnet.errors import UserError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models.model_weights import DRAWS

if TYPE_CHECKING:
    from mmsnnet.engine.runner.stitch_loops import StitchTestLoop

# Settings that change no figure of a model whose weights are given: of any part, and of the backbone alone.
TRAINING_ONLY = ("init_cfg", "pretrained", "with_cp", "drop_path_rate")
BACKBONE_ONLY = ("stitch", "budget", "seed", "flops_step", "frozen_stages", "frozen_anchors")


class CannotResumeError(UserError, ValueError):
    """A file of operating points is not one of the run that is to go on with it."""


def start(loop: StitchTestLoop, model: nn.Module, described: Collection[OperatingPoint]) -> OperatingPoints:
    """The operating points that a run begins with, the same on all ranks: a head, and of the points in its file those
    that hold for it.

    Args:
        loop: with the file's path, if any, and whether to go on with it.
        model: without wrappers.
        described: every stitch of the model with its costs.

    Raises:
        CannotResumeError: it is to go on with a file that is damaged, or of something else.
    """
    head = _head(loop, model)
    if loop.out is None:
        return head
    # One rank reads: ranks that find different points, or of which one alone fails, would wait for each other.
    found: list[Any] = [None]
    if is_main_process():
        try:
            found = [_known(head, described, loop.out, loop.resume)]
        except Exception as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _head(loop: StitchTestLoop, model: nn.Module) -> OperatingPoints:
    """The head of a file of operating points, without points."""
    runner, dataset = loop.runner, loop.dataloader.dataset
    return OperatingPoints(
        config=runner.cfg.filename and str(Path(runner.cfg.filename)),
        checkpoint=runner.cfg.get("load_from"),
        dataset=getattr(dataset, "metainfo", {}).get("name", type(dataset).__name__),
        input_shape=loop.backbone.img_size,
        device=str(next(loop.backbone.parameters()).device),
        fingerprint={} if loop.out is None else _fingerprint(loop, model),
        depths=loop.backbone.space.depths,
    )


def _known(head: OperatingPoints, described: Collection[OperatingPoint], out: str, resume: bool) -> OperatingPoints:
    """``head`` with those points of a file that hold for this run: all, if it goes on with it, or else what was
    measured of their speed, if they are of the same model."""
    if not Path(out).exists():
        return head
    try:
        found = OperatingPoints.load(out)
    except ValueError as error:
        if not resume:
            return head
        raise CannotResumeError(f"{error}; leave out --resume to write it anew") from error
    wrong = []
    if resume and (found.fingerprint or any(point.metrics for point in found)):
        wrong = [name for name, digest in head.fingerprint.items() if found.fingerprint.get(name) != digest]
        if not wrong:
            return replace(head, points=found.points, benchmark=found.benchmark)
    elif _same_model(found, head, described):
        timed = (replace(point, metrics={}) for point in found if point.latency_ms is not None)
        return replace(head, points=tuple(timed), benchmark=found.benchmark)
    if not resume:
        return head
    raise CannotResumeError(
        f"{out} has results of another {' and '.join(wrong) or 'model or config'}, which cannot be gone on with: give "
        "another --out, or leave out --resume to write it anew"
    )


def _same_model(found: OperatingPoints, head: OperatingPoints, described: Collection[OperatingPoint]) -> bool:
    """Whether what a file says of speed holds for this run, whatever the weights."""
    names = [Path(points.config).name for points in (found, head) if points.config is not None]
    ours, theirs = (
        {(point.id, point.name, point.kind, point.flops, point.params) for point in points}
        for points in (described, found)
    )
    return len(set(names)) < 2 and found.input_shape == head.input_shape and theirs <= ours


def _fingerprint(loop: StitchTestLoop, model: nn.Module) -> dict[str, str]:
    """Digests of all that results depend on, by what a user would call it; of a runner that was made without a config,
    what its parts print."""
    config, dataset = loop.runner.cfg, loop.dataloader.dataset
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if not name.endswith(DRAWS):  # how long it was trained changes nothing
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    settings = [_decisive(config.get("model", str(model))), config.get("test_evaluator"), loop.fp16]
    loading = config.get("test_dataloader", {}).get("dataset", type(dataset).__name__)
    return {
        "checkpoint": weights.hexdigest(),
        "config": _digest(settings),
        "data set": _digest([loading, len(dataset), _listed(dataset)]),
    }


def _decisive(setting: Any) -> Any:
    """A model's config without the settings that change no figure."""
    if isinstance(setting, Mapping):
        is_backbone = str(setting.get("type")).rpartition(".")[2] in ("StitchedBackbone", "StitchedViT")
        left_out = TRAINING_ONLY + (BACKBONE_ONLY if is_backbone else ())
        return {name: _decisive(value) for name, value in setting.items() if name not in left_out}
    return [_decisive(value) for value in setting] if isinstance(setting, list | tuple) else setting


def _listed(dataset: Dataset) -> str | None:
    """A digest of what a data set of mmengine lists, with the sizes and dates of files; None for other data sets."""
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
