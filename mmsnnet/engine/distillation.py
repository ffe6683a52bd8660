"""Distillation: a teacher for the stitches of a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor

from mmsnnet.engine.teacher import (
    CLASSES,
    DEPTH,
    Record,
    Recorder,
    build_teacher,
    check_normalization,
    load_teacher,
    renormalized,
)
from mmsnnet.errors import SettingError, check_keys
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, model_costs

Losses = dict[str, Any]  # a loss or a list of losses by name, as mmengine's models return them


class Distillation:
    """Add losses that compare a stitch with a teacher on the same augmented images.

    Without ``teacher``, the costliest stitch of each step teaches the others (in-place distillation, arXiv 1903.05134).
    Its own losses stay as they are. With ``teacher``, that frozen model teaches every stitch. It runs in evaluation
    mode without gradients, and belongs to no checkpoint.

    ``distill.loss_features`` is ``features`` times the squared error of each of the backbone's maps over the squared
    map of the teacher, averaged over images and maps. Every route returns maps in the width of the largest anchor, so
    no adapter is needed.

    ``distill.loss_outputs`` is ``outputs`` times a loss of what the head computes. For class logits (segmentation per
    pixel, classification) it is the Kullback-Leibler divergence from the teacher's probabilities at ``temperature``,
    times its square (arXiv 1503.02531); with ``hard=True`` the cross entropy against the class that the teacher
    predicts (DeiT, arXiv 2012.12877). For depth it is the mean absolute difference of log depths. Detectors have
    features only, because their heads give no output per image.

    Args:
        model: the model that is trained, not wrapped.
        features, outputs: weights of the two losses; at least one is above 0.
        task: the factor of the task's own losses for the stitches that are taught.
        hard: learn the teacher's classes instead of its probabilities.
        temperature: of the probabilities.
        warmup_iters: the weights of the two losses grow linearly over this many iterations.
        teacher: ``dict(model=..., checkpoint=...)`` with a model's config, or ``dict(config=..., checkpoint=...)`` with
            the path of a config; any model of mmengine with a ``backbone``. It gets the trained model's images,
            normalised anew if its ``data_preprocessor`` has another ``mean`` or ``std``. Without ``checkpoint``, the
            anchors' ``pretrained`` weights are loaded. A stitched teacher runs its ``stitch``, by default its largest
            anchor.

    Raises:
        SettingError: a value is out of range, or the two models do not fit; the message names the setting.
    """

    def __init__(
        self,
        model: BaseModel,
        features: float = 0.0,
        outputs: float = 0.0,
        task: float = 1.0,
        hard: bool = False,
        temperature: float = 1.0,
        warmup_iters: int = 0,
        teacher: Mapping[str, Any] | None = None,
    ) -> None:
        numbers = dict(
            features=features, outputs=outputs, task=task, warmup_iters=warmup_iters, temperature=temperature
        )
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
                raise SettingError(f"train_cfg.distill.{name} must be a number of 0 or more, got {value!r}")
        if not isinstance(hard, bool):
            raise SettingError(f"train_cfg.distill.hard must be True or False, got {hard!r}")
        if not features and not outputs:
            raise SettingError("train_cfg.distill teaches nothing: set features or outputs, the weights of its losses")
        if temperature <= 0 or (hard and temperature != 1):
            raise SettingError(
                f"train_cfg.distill.temperature must be above 0, and 1 with hard=True; got {temperature}, hard={hard}"
            )
        self.features, self.outputs, self.task = features, outputs, task
        self.hard, self.temperature, self.warmup_iters = hard, temperature, warmup_iters
        self._factor = 1.0  # of the two losses, in the warm-up
        self._student = Recorder(model, bool(outputs), "model")
        if hard and self._student.predicts != CLASSES:
            raise SettingError("train_cfg.distill.hard=True needs outputs above 0 and a head that predicts classes")
        if temperature != 1 and self._student.predicts != CLASSES:
            raise SettingError("train_cfg.distill.temperature needs outputs above 0 and a head that predicts classes")
        if features and getattr(self._student.backbone, "num_classes", None) is not None:
            raise SettingError(
                "train_cfg.distill.features needs maps, and the backbone of a classifier returns logits: set features=0"
            )
        self.model = model
        self.teacher = None
        if teacher is not None:
            check_keys("train_cfg.distill.teacher", teacher, ("model", "config", "checkpoint"))
            self.teacher = build_teacher(teacher.get("model"), teacher.get("config"), all_maps=bool(features))
            self._recorder = Recorder(self.teacher, bool(outputs), "train_cfg.distill.teacher")
            self._check_teacher(self.teacher)
            load_teacher(self.teacher, teacher.get("checkpoint"), bool(outputs))
        self._target: Record | None = None

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device, and log its cost."""
        if self.teacher is None:
            return
        stitched = self._recorder.backbone
        size = find_stitched_backbone(self.model).img_size
        if isinstance(stitched, StitchedBackbone):
            flops = f"{model_costs(self.teacher, size)[stitched.stitch.id].flops / 1e9:.2f} GFLOPs"
        else:
            flops = "one forward pass"
        print_log(f"Distillation: the teacher adds {flops} for each image of a step", "current")
        self.teacher.to(device)

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Inside, :meth:`add` knows the passes of one step of training, counted from 0."""
        self._factor = min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0
        try:
            with self._student.recording():
                yield
        finally:
            self._target = None

    def add(self, losses: Losses) -> Losses:
        """The losses of a pass that has just run, with those of distillation."""
        record = self._student.take()
        if self._target is None:
            self._target = self._taught_by(record)
            if self.teacher is None:
                return losses
        taught = {name: _scaled(loss, self.task) if "loss" in name else loss for name, loss in losses.items()}
        if self.features:
            _check_maps(record.features, self._target.features)
            distance = features_distance(record.features, self._target.features)
            taught["distill.loss_features"] = self._factor * self.features * distance
        if self.outputs:
            taught["distill.loss_outputs"] = self._factor * self.outputs * self._outputs_distance(record.outputs)
        return taught

    def _taught_by(self, record: Record) -> Record:
        """The teacher's record of this step."""
        if self.teacher is None:
            outputs = None if record.outputs is None else record.outputs.detach()
            return Record(record.images, tuple(one.detach() for one in record.features), outputs)
        images = renormalized(record.images, self.model.data_preprocessor, self.teacher.data_preprocessor)
        with torch.no_grad(), self._recorder.recording():
            if self.outputs:
                self.teacher(images, mode="tensor")
            else:
                self._recorder.backbone(images)
            return self._recorder.take()

    def _check_teacher(self, teacher: BaseModel) -> None:
        mine, other = self._student, self._recorder
        if self.outputs and (mine.predicts, mine.classes) != (other.predicts, other.classes):
            raise SettingError(
                f"train_cfg.distill.outputs needs a teacher for the same task: the model predicts {mine.described}, "
                f"the teacher {other.described}. Take another teacher, or leave out train_cfg.distill"
            )
        check_normalization(self.model.data_preprocessor, teacher.data_preprocessor)
        backbones = mine.backbone, other.backbone
        if self.features and all(isinstance(one, StitchedBackbone) for one in backbones):  # others show it in a step
            channels = [[width for width in one.channels if width is not None] for one in backbones]
            _check_equal("channels", *channels)

    def _outputs_distance(self, outputs: Tensor | None) -> Tensor:
        assert outputs is not None and self._target is not None and self._target.outputs is not None
        target = self._target.outputs.float()
        if target.shape[2:] != outputs.shape[2:]:
            target = F.interpolate(target, outputs.shape[2:], mode="bilinear", align_corners=False)
        if self._student.predicts == DEPTH:
            return (outputs.float().clamp_min(1e-3).log() - target.clamp_min(1e-3).log()).abs().mean()
        logits = _two_classes(outputs.float())
        target = _two_classes(target)
        if self.hard:
            return F.cross_entropy(logits, target.argmax(dim=1))
        student, teacher = ((one / self.temperature).log_softmax(dim=1) for one in (logits, target))
        divergence = (teacher.exp() * (teacher - student)).sum(dim=1).mean()
        return self.temperature**2 * divergence


def features_distance(features: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """The squared error of each image's map over its squared target, averaged over images and maps."""
    pairs = [(one.float().flatten(1), other.float().flatten(1)) for one, other in zip(features, target, strict=True)]
    ratios = [(one - other).square().sum(1) / other.square().sum(1).clamp_min(1e-12) for one, other in pairs]
    return torch.stack(ratios).mean()


def _check_maps(features: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    _check_equal("shape", *([tuple(one.shape[1:]) for one in maps] for maps in (features, target)))


def _check_equal(what: str, mine: Sequence[Any], others: Sequence[Any]) -> None:
    if mine != others:
        raise SettingError(
            f"train_cfg.distill.features compares maps of equal {what}: those of the model are "
            f"{', '.join(map(str, mine))}, those of the teacher {', '.join(map(str, others))}. Set features=0 to "
            "compare outputs alone"
        )


def _scaled(loss: Any, factor: float) -> Any:
    if factor == 1:
        return loss
    return [one * factor for one in loss] if isinstance(loss, list) else loss * factor


def _two_classes(logits: Tensor) -> Tensor:
    """Logits (B, K, ...); one logit of a binary head becomes two."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
