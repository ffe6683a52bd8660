"""Distillation: the costliest stitch of a step, or a frozen model, teaches the stitches of a training step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, model_costs, read_weights
from mmsnnet.registry import MODELS

Losses = dict[str, Any]  # a loss or a list of losses by name, as mmengine's models return them
CLASSES, DEPTH = "classes", "depth"


class Record(NamedTuple):
    """What a pass computes: the images that its backbone sees, the backbone's maps, and the head's output."""

    images: Tensor
    features: tuple[Tensor, ...]
    outputs: Tensor | None


class Distillation:
    """Add losses that pull what a stitch computes towards what a teacher computes for the same augmented images.

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
            the path of a config. It gets the trained model's normalised images, normalised anew if its
            ``data_preprocessor`` has another ``mean`` or ``std``. Without ``checkpoint``, the anchors' ``pretrained``
            weights are loaded. A stitched teacher runs its ``stitch``, by default its largest anchor.

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
        for name, value in dict(features=features, outputs=outputs, task=task, warmup_iters=warmup_iters).items():
            if value < 0:
                raise SettingError(f"train_cfg.distill.{name} must be 0 or more, got {value}")
        if not features and not outputs:
            raise SettingError("train_cfg.distill teaches nothing: set features or outputs, the weights of its losses")
        if temperature <= 0 or (hard and temperature != 1):
            raise SettingError(
                f"train_cfg.distill.temperature must be above 0, and 1 with hard=True; got {temperature}, hard={hard}"
            )
        self.features, self.outputs, self.task = features, outputs, task
        self.hard, self.temperature, self.warmup_iters = hard, temperature, warmup_iters
        self._student = _Recorder(model, bool(outputs), "model")
        if hard and self._student.kind != CLASSES:
            raise SettingError("train_cfg.distill.hard=True needs outputs above 0 and a head that predicts classes")
        self.model = model
        self.teacher = None if teacher is None else _build_teacher(**teacher)
        if self.teacher is not None:
            self._recorder = _Recorder(self.teacher, bool(outputs), "train_cfg.distill.teacher")
            self._check_teacher(self.teacher)
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
        with self._student.recording():
            yield
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
            distance = features_distance(record.features, self._target.features)
            taught["distill.loss_features"] = self._factor * self.features * distance
        if self.outputs:
            taught["distill.loss_outputs"] = self._factor * self.outputs * self._outputs_distance(record.outputs)
        return taught

    def _taught_by(self, record: Record) -> Record:
        """What the teacher computes in this step."""
        if self.teacher is None:
            outputs = None if record.outputs is None else record.outputs.detach()
            return Record(record.images, tuple(one.detach() for one in record.features), outputs)
        images = _renormalized(record.images, self.model.data_preprocessor, self.teacher.data_preprocessor)
        with torch.no_grad(), self._recorder.recording():
            if self.outputs:
                self.teacher(images, mode="tensor")
            else:
                self._recorder.backbone(images)
            return self._recorder.take()

    def _check_teacher(self, teacher: BaseModel) -> None:
        mine, other = self._student, self._recorder
        if self.outputs and (mine.kind, mine.classes) != (other.kind, other.classes):
            raise SettingError(
                f"train_cfg.distill.outputs needs a teacher for the same task: the model predicts {mine.described}, "
                f"the teacher {other.described}. Take another teacher, or leave out train_cfg.distill"
            )
        widths = [getattr(backbone, "channels", None) for backbone in (mine.backbone, other.backbone)]
        if self.features and widths[0] != widths[1]:
            raise SettingError(
                "train_cfg.distill.features compares maps of equal width: those of the model have "
                f"{widths[0]} channels, those of the teacher {widths[1]}. Set features=0 to compare outputs alone"
            )

    def _outputs_distance(self, outputs: Tensor | None) -> Tensor:
        assert outputs is not None and self._target is not None and self._target.outputs is not None
        target = self._target.outputs.float()
        if target.shape[2:] != outputs.shape[2:]:
            target = F.interpolate(target, outputs.shape[2:], mode="bilinear", align_corners=False)
        if self._student.kind == DEPTH:
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
    ratios = [(one - other).square().sum(1) / other.square().sum(1) for one, other in pairs]
    return torch.stack(ratios).mean()


class _Recorder:
    """Keeps what the backbone and the head of a model compute, while :meth:`recording` is active."""

    def __init__(self, model: BaseModel, outputs: bool, where: str) -> None:
        self.backbone = model.get_submodule("backbone")
        self._head: nn.Module | None = None
        self.kind: str | None = None
        self.classes: int | None = None
        if outputs:
            self._head, self.kind, self.classes = _head_of(model, where)
        self._record = Record(torch.empty(0), (), None)

    @property
    def described(self) -> str:
        """What the model predicts, for a message."""
        return f"{self.classes} classes" if self.kind == CLASSES else str(self.kind)

    @contextmanager
    def recording(self) -> Iterator[None]:
        hook = self.backbone.register_forward_hook(self._on_backbone)
        head = self._head
        if head is not None and head is not self.backbone:
            # mmseg's heads call their forward, so hooks of the module would not run.
            forward = head.forward
            head.forward = lambda *args: self._on_head(forward(*args))
        try:
            yield
        finally:
            hook.remove()
            if head is not None and head is not self.backbone:
                del head.forward
            self._record = Record(torch.empty(0), (), None)

    def take(self) -> Record:
        """What the last pass has computed."""
        return self._record

    def _on_backbone(self, module: nn.Module, images: tuple[Tensor, ...], result: Any) -> None:
        if isinstance(result, Tensor):
            self._record = Record(images[0], (), result)
        else:
            self._record = Record(images[0], tuple(one for one in result if one is not None), None)

    def _on_head(self, result: Any) -> Any:
        if not isinstance(result, Tensor):
            raise SettingError(
                f"train_cfg.distill.outputs needs a head that returns one tensor; {type(self._head).__name__} returns "
                f"a {type(result).__name__}: set outputs=0 and features above 0"
            )
        self._record = self._record._replace(outputs=result)
        return result


def _head_of(model: BaseModel, where: str) -> tuple[nn.Module, str, int | None]:
    """The module whose output is distilled, and what it predicts."""
    classes = getattr(model.get_submodule("backbone"), "num_classes", None)
    if classes is not None:
        return model.get_submodule("backbone"), CLASSES, classes
    head = getattr(model, "decode_head", None)
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    if not isinstance(head, nn.Module):
        raise SettingError(
            f"train_cfg.distill.outputs: {type(model).__name__} ({where}) has no output for each image that could be "
            "distilled: set outputs=0 and features above 0"
        )
    # mmseg is optional, so its class is found by name.
    if any(kind.__name__ == "DepthEstimator" for kind in type(model).__mro__):
        return head, DEPTH, None
    return head, CLASSES, int(head.num_classes)  # type: ignore[arg-type]


def _build_teacher(
    model: Mapping[str, Any] | None = None,
    config: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> BaseModel:
    if (model is None) == (config is None):
        raise SettingError(
            "train_cfg.distill.teacher needs a model's config: set model=dict(...), or config to the path of a config"
        )
    teacher: BaseModel = MODELS.build(Config.fromfile(config).model if model is None else model)
    if checkpoint is None:
        teacher.init_weights()
    else:
        teacher.load_state_dict(read_weights(teacher, checkpoint))
    return teacher.eval().requires_grad_(False)


def _renormalized(images: Tensor, given: nn.Module, wanted: nn.Module) -> Tensor:
    """Normalised images with the mean and deviation of another data preprocessor."""
    statistics = [getattr(one, name, None) for one in (given, wanted) for name in ("mean", "std")]
    tensors = [one.to(images) for one in statistics if isinstance(one, Tensor)]
    if len(tensors) < len(statistics):
        return images
    mean, std, other_mean, other_std = tensors
    return images * (std / other_std) + (mean - other_mean) / other_std


def _scaled(loss: Any, factor: float) -> Any:
    if factor == 1:
        return loss
    return [one * factor for one in loss] if isinstance(loss, list) else loss * factor


def _two_classes(logits: Tensor) -> Tensor:
    """Logits (B, K, ...); one logit of a binary head becomes two."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits
