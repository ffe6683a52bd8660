"""The teacher of a distillation, and the record of what a model computes in a pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsnnet.engine.attributes import replaced_attributes
from mmsnnet.engine.mmengine_private import channel_conversion, normalises
from mmsnnet.errors import MissingFileError, SettingError
from mmsnnet.models import StitchedBackbone, read_weights
from mmsnnet.registry import MODELS

CLASSES, DEPTH = "classes", "depth"


class Record(NamedTuple):
    """A pass of a model.

    Attributes:
        images: as the backbone sees them, (B, C, H, W).
        features: the backbone's maps, (B, C, h, w) each; none if it returns logits.
        outputs: of the head: logits (B, K, ...) or depth (B, 1, h, w).
    """

    images: Tensor
    features: tuple[Tensor, ...]
    outputs: Tensor | None


class Recorder:
    """Keeps a model's :class:`Record` while :meth:`recording` is active.

    Args:
        model: with a ``backbone``.
        outputs: record the head's output too.
        where: names the model in messages.

    Attributes:
        predicts: ``'classes'`` or ``'depth'``; None without ``outputs``.
        classes: their number.
    """

    def __init__(self, model: BaseModel, outputs: bool, where: str) -> None:
        self.backbone = model.get_submodule("backbone")
        self._head: nn.Module | None = None
        self.predicts: str | None = None
        self.classes: int | None = None
        if outputs:
            self._head, self.predicts, self.classes = _head_of(model, where)
        self._record = Record(torch.empty(0), (), None)

    @property
    def described(self) -> str:
        """The model's task, for a message."""
        return f"{self.classes} classes" if self.predicts == CLASSES else str(self.predicts)

    @contextmanager
    def recording(self) -> Iterator[None]:
        hook = self.backbone.register_forward_hook(self._on_backbone)
        head = self._head
        replacements: list[tuple[Any, str, Any]] = []
        if head is not None and head is not self.backbone:
            # mmseg's heads call their forward, so hooks of the module would not run.
            forward = head.forward
            replacements.append((head, "forward", lambda *args, **kwargs: self._on_head(forward(*args, **kwargs))))
        try:
            with replaced_attributes(replacements):
                yield
        finally:
            hook.remove()
            self._record = Record(torch.empty(0), (), None)

    def take(self) -> Record:
        """The record of the last pass."""
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
    return head, CLASSES, getattr(head, "num_classes", None)


def build_teacher(model: Mapping[str, Any] | None, config: str | os.PathLike[str] | None) -> BaseModel:
    """Build a teacher without its weights.

    Args:
        model: its config, or
        config: the path of a config that has it.

    Raises:
        SettingError: both or none are given, or there is no such file.
    """
    if (model is None) == (config is None):
        raise SettingError(
            "train_cfg.distill.teacher needs a model's config: set model=dict(...), or config to the path of a config"
        )
    if config is not None:
        if not os.path.isfile(config):
            raise MissingFileError(f"train_cfg.distill.teacher.config: there is no file {os.fspath(config)!r}")
        model = Config.fromfile(config).model
    return MODELS.build(model)


def load_teacher(teacher: BaseModel, checkpoint: str | os.PathLike[str] | None) -> None:
    """Load a teacher's weights, freeze it and put it into evaluation mode.

    Args:
        teacher: as :func:`build_teacher` returns it.
        checkpoint: its weights; None for those that its config names, by ``pretrained`` or ``init_cfg``.

    Raises:
        SettingError: nothing names its weights.
        FileNotFoundError, ValueError: the checkpoint is missing, or does not fit the model.
    """
    if checkpoint is not None:
        teacher.load_state_dict(read_weights(teacher, checkpoint))
    else:
        stitched = (module for module in teacher.modules() if isinstance(module, StitchedBackbone))
        named = any(any(module.pretrained) for module in stitched)
        if not named and not any(_is_pretrained(getattr(module, "init_cfg", None)) for module in teacher.modules()):
            raise SettingError(
                "train_cfg.distill.teacher would have random weights: set its checkpoint, or pretrained in its anchors"
            )
        teacher.init_weights()
    teacher.eval().requires_grad_(False)


def _is_pretrained(init_cfg: Any) -> bool:
    settings = init_cfg if isinstance(init_cfg, list) else [init_cfg]
    return any(isinstance(setting, Mapping) and setting.get("type") == "Pretrained" for setting in settings)


def check_normalization(preprocessor: nn.Module, other: nn.Module) -> None:
    """Check that two models take the channels of an image in the same order, and that both or none normalise.

    A model without a data preprocessor of its own gets the images of the other as they are.

    Raises:
        SettingError: they do not.
    """
    normalise = [normalises(one) for one in (preprocessor, other)]
    if None not in normalise and normalise[0] != normalise[1]:
        raise SettingError(
            "one of the model and train_cfg.distill.teacher normalises images and the other does not: set mean and std "
            "in both data preprocessors, or leave out the teacher's data_preprocessor if it takes the model's images"
        )
    orders = [channel_conversion(one) for one in (preprocessor, other)]
    if None not in orders and orders[0] != orders[1]:
        raise SettingError(
            "train_cfg.distill.teacher takes the channels of an image in another order than the model: set bgr_to_rgb "
            "in both data preprocessors alike"
        )


def renormalized(images: Tensor, preprocessor: nn.Module, other: nn.Module) -> Tensor:
    """Convert images from the normalisation of one data preprocessor to that of another, where both have one."""
    statistics = [getattr(one, name, None) for one in (preprocessor, other) for name in ("mean", "std")]
    tensors = [one.to(images) for one in statistics if isinstance(one, Tensor)]
    if len(tensors) < len(statistics):
        return images
    mean, std, other_mean, other_std = tensors
    return images * (std / other_std) + (mean - other_mean) / other_std
