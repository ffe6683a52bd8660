"""The teacher of a distillation, and the record of what a model computes in a pass."""

from __future__ import annotations

import copy
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


def build_teacher(
    model: Mapping[str, Any] | None, config: str | os.PathLike[str] | None, all_maps: bool = False
) -> BaseModel:
    """Build a teacher without its weights.

    Args:
        model: its config, or
        config: the path of a config that has it.
        all_maps: a stitched backbone returns the maps of training mode in evaluation mode too.

    Raises:
        SettingError: both or none are given, there is no such file, or it does not describe a model with a backbone.
    """
    where = "train_cfg.distill.teacher"
    if (model is None) == (config is None):
        raise SettingError(f"{where} needs one model: set either model=dict(...), or config to the path of a config")
    if config is not None:
        where = f"{where}.config"
        if not isinstance(config, str | os.PathLike):
            raise SettingError(f"{where} must be the path of a config, got {config!r}")
        path = os.path.expanduser(os.fspath(config))
        if os.path.isdir(path):
            raise SettingError(f"{where}: {path!r} is a folder: give the path of a config, such as {path}/config.py")
        if not os.path.isfile(path):
            raise MissingFileError(f"{where}: there is no file {path!r}")
        try:
            model = Config.fromfile(path).get("model")
        except (OSError, SyntaxError) as error:
            raise SettingError(f"{where}: {path!r} is no config: {error}") from error
    if not isinstance(model, Mapping) or "type" not in model:
        raise SettingError(f"{where} has no model with a type")
    model = copy.deepcopy(dict(model))
    backbone = model.get("backbone")
    indices = backbone.get("out_indices") if isinstance(backbone, Mapping) else None
    if all_maps and isinstance(indices, Mapping) and "train" in indices:
        model["backbone"]["out_indices"] = indices["train"]
    try:
        teacher = MODELS.build(model)
    except (KeyError, TypeError) as error:  # an unknown type, or arguments that it does not take
        raise SettingError(f"{where} cannot be built: {error.args[0]}") from error
    if not isinstance(getattr(teacher, "backbone", None), nn.Module):
        raise SettingError(f"{where}: {type(teacher).__name__} has no backbone, so it is no model of the toolboxes")
    return teacher


def load_teacher(teacher: BaseModel, checkpoint: str | os.PathLike[str] | None, outputs: bool) -> None:
    """Load a teacher's weights, freeze it and put it into evaluation mode.

    Args:
        teacher: as :func:`build_teacher` returns it.
        checkpoint: its weights; None for those that its config names, by ``pretrained`` or ``init_cfg``.
        outputs: its heads teach, and not its backbone alone.

    Raises:
        SettingError: nothing names the weights of a part that teaches.
        FileNotFoundError, ValueError: the checkpoint is missing, or does not fit the model.
    """
    if checkpoint is not None:
        teacher.load_state_dict(read_weights(teacher, checkpoint))
    else:
        if part := _without_weights(teacher, outputs):
            raise SettingError(
                f"train_cfg.distill.teacher: {part} would have random weights: set the teacher's checkpoint, or "
                "pretrained in its anchors and init_cfg of its heads"
            )
        teacher.init_weights()
    teacher.eval().requires_grad_(False)


def _without_weights(teacher: BaseModel, outputs: bool) -> str | None:
    """A part that teaches and for which the config names no weights."""
    if _is_pretrained(teacher):
        return None
    backbone = teacher.get_submodule("backbone")
    if isinstance(backbone, StitchedBackbone) and not _is_pretrained(backbone):
        run = dict.fromkeys(segment.anchor for segment in backbone.stitch.segments)
        if missing := [anchor for anchor in run if not backbone.pretrained[anchor]]:
            return f"anchor {missing[0]} of its backbone"
        if backbone.stitch.layers:
            return f"the stitching layers of its stitch {backbone.stitch.name}"
    elif not any(map(_is_pretrained, backbone.modules())):
        return "its backbone"
    for name, part in teacher.named_children() if outputs else ():
        if part is backbone or name == "auxiliary_head" or not any(True for _ in part.parameters()):
            continue
        if not any(map(_is_pretrained, part.modules())):
            return f"its {name}"
    return None


def _is_pretrained(module: nn.Module) -> bool:
    init_cfg = getattr(module, "init_cfg", None)
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
