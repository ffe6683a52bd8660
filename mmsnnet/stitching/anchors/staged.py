"""Adapters for timm's hierarchical models: Swin, ConvNeXt, ResNet, RegNet, LeViT, PVT v2, MetaFormers, MambaOut, ...

A hierarchical model is a flat sequence of blocks, too, if what leads into a stage belongs to the stage's first block
and what ends a stage to its last one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import timm
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.levit import Levit
from timm.models.mambaout import MambaOut
from timm.models.metaformer import MetaFormer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.stitching.anchors.base import Anchor, BlockNames
from mmsnnet.stitching.features import Features, Layout


class StagedAnchor(Anchor):
    """A hierarchical model: a stem, blocks in stages, and a classifier. One layout serves all blocks.

    Args:
        model: a timm model of :attr:`model_class`.
        img_size: the image size (height, width) for which the model was built.
        classifier: as for :class:`Anchor`.
    """

    model_class: ClassVar[type[nn.Module]]
    # Modules by name, each in the order in which they run.
    _stem_modules: ClassVar[tuple[str, ...]] = ("stem",)
    _stage_list: ClassVar[str] = "stages"  # the list of stages, each with ``blocks`` and perhaps a ``downsample``
    _last_modules: ClassVar[tuple[str, ...]] = ()  # those between the last block and ``forward_head``
    _format: ClassVar[str] = "nchw"
    # Arguments of timm.create_model beside ``img_size``; None for models that take any size, and no such argument.
    _size_arguments: ClassVar[Mapping[str, Any] | None] = None

    def __init__(self, model: nn.Module, img_size: tuple[int, int], classifier: bool = False) -> None:
        self.img_size = img_size
        super().__init__(model, classifier)
        convolutions = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
        first = next(name for name in convolutions if name.startswith(self._stem_modules[0]))
        self.stem_weight = f"{first}.weight"

    @classmethod
    def _name_blocks(cls, model: nn.Module) -> list[list[BlockNames]]:
        stages = []
        for stage, module in model.get_submodule(cls._stage_list).named_children():
            path = f"{cls._stage_list}.{stage}"
            leads = isinstance(getattr(module, "downsample", None), nn.Module)
            ends = isinstance(getattr(module, "norm", None), nn.Module)
            names = [BlockNames(f"{path}.blocks.{name}") for name, _ in module.get_submodule("blocks").named_children()]
            names[0] = names[0]._replace(entry=(f"{path}.downsample",) * leads)
            names[-1] = names[-1]._replace(exit=(f"{path}.norm",) * ends)
            stages.append(names)
        return stages

    @classmethod
    def size_arguments(cls, img_size: tuple[int, int]) -> dict[str, Any]:
        """The arguments of ``timm.create_model`` for images of ``img_size``."""
        return {} if cls._size_arguments is None else dict(img_size=img_size, **cls._size_arguments)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return tuple(features.channels for features in self.geometry(self.img_size)[1:])

    @property
    def agreement(self) -> Mapping[str, object]:
        """The stride of what leaves each stage, which heads rely on."""
        height, width = self.img_size
        if self._size_arguments is None or "dynamic_img_size" in self._size_arguments:
            height, width = (-(-side // 64) * 64 for side in self.img_size)  # so that no stage rounds its size
        ends = [self.geometry((height, width))[end].grid for end in accumulate(self.stages)]
        return dict(strides=tuple(round(height / rows) for rows, _ in ends))

    def layout(self, block: int | None = None) -> Layout:
        return Layout(format=self._format)

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size

    def kind(self, block: int) -> Hashable:
        shift = getattr(self.block(block), "shift_size", None)
        grid = self.geometry(self.img_size)[block].grid
        return super().kind(block), shift, grid, self._blocks[block].entry, self._blocks[block].exit

    def call(self, block: int, features: Features) -> Features:
        return Features.of_map(self._chain(self._blocks[block].in_order, features.data), features.layout)

    def _embed(self, images: Tensor) -> Features:
        return Features.of_map(self._chain(self._stem_modules, images), self.layout())

    def _classify(self, features: Features) -> Tensor:
        return self.model.forward_head(self._chain(self._last_modules, features.data))

    def _chain(self, names: tuple[str, ...], data: Any) -> Any:
        for name in names:
            data = self.model.get_submodule(name)(data)
        return data


class SwinAnchor(StagedAnchor):
    """An anchor of timm's ``SwinTransformer``. Images are padded to whole patches."""

    model_class = SwinTransformer
    # Sizes other than img_size run too; shift and window are those of img_size.
    _size_arguments: ClassVar[Mapping[str, Any] | None] = dict(dynamic_img_size=True)
    _stem_modules, _stage_list, _last_modules, _format = ("patch_embed",), "layers", ("norm",), "nhwc"
    classifier_modules = ("norm", "head")

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = (
            -(-side // patch) * patch for side, patch in zip(image_size, self.model.patch_embed.patch_size, strict=True)
        )
        return height, width

    def _embed(self, images: Tensor) -> Features:
        height, width = self.padded_size((images.shape[-2], images.shape[-1]))
        return super()._embed(F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2])))


class SwinV2Anchor(SwinAnchor):
    """An anchor of timm's ``SwinTransformerV2``."""

    model_class = SwinTransformerV2


class ConvNeXtAnchor(StagedAnchor):
    """An anchor of timm's ``ConvNeXt``, v1 and v2."""

    model_class = ConvNeXt
    _last_modules, classifier_modules = ("norm_pre",), ("norm_pre", "head")


def _numbered_stages(model: nn.Module, prefix: str) -> list[list[BlockNames]]:
    """The blocks of modules ``prefix1``, ``prefix2``, ..., which are stages."""
    stages = [(name, module) for name, module in model.named_children() if name.removeprefix(prefix).isdigit()]
    return [[BlockNames(f"{stage}.{name}") for name, _ in blocks.named_children()] for stage, blocks in stages]


class ResNetAnchor(StagedAnchor):
    """An anchor of timm's ``ResNet``, ResNeXt and SE-ResNet included."""

    model_class = ResNet
    _stem_modules = ("conv1", "bn1", "act1", "maxpool")
    classifier_modules = ("global_pool", "fc")

    @classmethod
    def _name_blocks(cls, model: nn.Module) -> list[list[BlockNames]]:
        return _numbered_stages(model, "layer")


class ResNetV2Anchor(StagedAnchor):
    """An anchor of timm's ``ResNetV2``, with pre-activation."""

    model_class = ResNetV2
    _last_modules, classifier_modules = ("norm",), ("norm", "head")


class RegNetAnchor(StagedAnchor):
    """An anchor of timm's ``RegNet``."""

    model_class = RegNet
    _last_modules, classifier_modules = ("final_conv",), ("final_conv", "head")

    @classmethod
    def _name_blocks(cls, model: nn.Module) -> list[list[BlockNames]]:
        return _numbered_stages(model, "s")


class EfficientNetAnchor(StagedAnchor):
    """An anchor of timm's ``EfficientNet``."""

    model_class = EfficientNet
    _stem_modules = ("conv_stem", "bn1")
    _last_modules: ClassVar[tuple[str, ...]] = ("conv_head", "bn2")
    classifier_modules: tuple[str, ...] = ("conv_head", "bn2", "global_pool", "classifier")

    @classmethod
    def _name_blocks(cls, model: nn.Module) -> list[list[BlockNames]]:
        stages = model.get_submodule("blocks").named_children()
        return [
            [BlockNames(f"blocks.{stage}.{name}") for name, _ in blocks.named_children()] for stage, blocks in stages
        ]


class MobileNetV3Anchor(EfficientNetAnchor):
    """An anchor of timm's ``MobileNetV3``."""

    model_class = MobileNetV3
    _last_modules = ()
    classifier_modules = ("global_pool", "conv_head", "norm_head", "act2", "flatten", "classifier")


class MambaOutAnchor(StagedAnchor):
    """An anchor of timm's ``MambaOut``."""

    model_class = MambaOut
    classifier_modules, _format = ("head",), "nhwc"


class MetaFormerAnchor(StagedAnchor):
    """An anchor of timm's ``MetaFormer``: CAFormer, ConvFormer, PoolFormer. Some stages compute on tokens."""

    model_class = MetaFormer
    classifier_modules = ("head",)

    def call(self, block: int, features: Features) -> Features:
        names = self._blocks[block]
        data = self._chain(names.entry, features.data)
        grid = data.shape[2:]
        uses_tokens = not self.model.get_submodule(names.block.rpartition(".blocks.")[0]).use_nchw
        # Views, as in timm: a copy would change the order in which means are summed.
        data = data.flatten(2).transpose(1, 2) if uses_tokens else data
        data = self._chain((names.block,), data)
        return Features.of_map(data.transpose(1, 2).unflatten(2, grid) if uses_tokens else data, features.layout)


class LevitAnchor(StagedAnchor):
    """An anchor of timm's ``Levit``, which takes images of one size."""

    model_class = Levit
    _size_arguments: ClassVar[Mapping[str, Any] | None] = {}
    classifier_modules, _format = ("head", "head_dist"), "tokens"

    def call(self, block: int, features: Features) -> Features:
        names = self._blocks[block]
        height, width = features.grid
        if any(not isinstance(self.model.get_submodule(name), nn.Identity) for name in names.entry):
            height, width = (height + 1) // 2, (width + 1) // 2  # a stride of 2
        return Features(self._chain(names.in_order, features.data), features.layout, (height, width))

    def _embed(self, images: Tensor) -> Features:
        return Features.of_map(self._chain(self._stem_modules, images), Layout(format="nchw")).to(self.layout())


class PvtAnchor(StagedAnchor):
    """An anchor of timm's ``PyramidVisionTransformerV2``, whose blocks ask for the grid."""

    model_class = PyramidVisionTransformerV2
    _stem_modules, classifier_modules, _format = ("patch_embed",), ("head_drop", "head"), "tokens"

    def call(self, block: int, features: Features) -> Features:
        names = self._blocks[block]
        if names.entry:
            maps = features.to(Layout(format="nchw"))
            features = self._as_tokens(self._chain(names.entry, maps.data))
        data = self.model.get_submodule(names.block)(features.data, features.grid)
        return features.with_data(self._chain(names.exit, data))

    def _embed(self, images: Tensor) -> Features:
        return self._as_tokens(self._chain(self._stem_modules, images))

    def _classify(self, features: Features) -> Tensor:
        return super()._classify(features.to(Layout(format="nchw")))

    def _as_tokens(self, maps: Tensor) -> Features:
        return Features.of_map(maps, Layout(format="nhwc")).to(self.layout())


ADAPTERS: tuple[type[StagedAnchor], ...] = (
    *(SwinAnchor, SwinV2Anchor, ConvNeXtAnchor, ResNetAnchor, ResNetV2Anchor, RegNetAnchor, EfficientNetAnchor),
    *(MobileNetV3Anchor, MambaOutAnchor, MetaFormerAnchor, LevitAnchor, PvtAnchor),
)
# timm's modules whose models are no flat sequence of blocks, with the reason.
NO_SEQUENCE = {
    "timm.models.gcvit": "its blocks take a query that is made from the input of the whole stage",
    "timm.models.efficientformer": "the layout of its features changes among the blocks of its last stage",
}


def staged_adapter(model: str) -> type[StagedAnchor] | None:
    """The adapter for a timm model of this name; None if it is none of the hierarchical models with one.

    Raises:
        SettingError: the model cannot be divided into blocks.
    """
    module = timm.model_entrypoint(model.split(".")[0]).__module__
    if reason := NO_SEQUENCE.get(module):
        raise SettingError(f"{model!r} is no sequence of blocks: {reason}. Choose a model of docs/anchors.md")
    return next((adapter for adapter in ADAPTERS if adapter.model_class.__module__ == module), None)
