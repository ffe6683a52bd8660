"""Cost of a whole model for each stitch: the backbone's, and the heads', counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmsnnet.models.backbones import find_stitched_backbone
from mmsnnet.models.torch_private import tree_leaves
from mmsnnet.stitching import Cost, count_flops
from mmsnnet.stitching.network import evaluation_mode

if TYPE_CHECKING:
    from mmdet.models import RPNHead, SingleRoIExtractor


@torch.no_grad()
def model_costs(model: BaseModel, input_shape: tuple[int, int] | None = None) -> dict[int, Cost]:
    """FLOPs and parameters of the deployed model by stitch id, for one input.

    The heads get maps of the same shape from every stitch, so they are counted once, on empty maps. Heads that run
    only in training are not counted.

    For a two-stage detector, the count assumes the most proposals that its RPN may pass on
    (``test_cfg.rpn.max_per_img``), because the number that NMS leaves depends on weights and image. The box head runs
    on all of them, a mask head on the first 100, as in mmdet's tensor mode. NMS and RoIAlign count nothing.

    Args:
        model: any mmengine model with a stitched backbone.
        input_shape: height and width; the backbone's ``img_size`` by default.
    """
    backbone = find_stitched_backbone(model)
    shape = backbone.img_size if input_shape is None else input_shape
    costs = backbone.costs(shape)
    backbone.network.anchor(-1).geometry(shape)  # computed before a trace would record it
    image = next(model.parameters()).new_zeros(1, backbone.network.anchor(0).in_chans, *shape)
    used: set[nn.Parameter] = set()
    with (
        evaluation_mode(model),
        _replaced(backbone, "forward", backbone.zeros),
        _every_proposal(model) as read,
        _countable_attention(),
    ):
        rest = Cost(count_flops(_TensorMode(model, read, used), image), sum(parameter.numel() for parameter in used))
    return {id_: cost + rest for id_, cost in costs.items()}


class _TensorMode(nn.Module):
    """A model's forward from images to its heads' outputs and ``read``.

    It adds the parameters that it uses to ``used``.
    """

    def __init__(self, model: BaseModel, read: list[Any], used: set[nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        self.read = read
        self.used = used

    def forward(self, images: Tensor) -> object:
        shape = tuple(images.shape[-2:])
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
        with _UsedParameters(self.used):
            return self.model(images, [BaseDataElement(metainfo=meta) for _ in images], mode="tensor"), self.read


class _UsedParameters(TorchFunctionMode):
    """Add to ``used`` the parameters from which tensors are computed.

    This includes parameters of modules that are never called, such as the output projection of
    ``nn.MultiheadAttention``.
    """

    def __init__(self, used: set[nn.Parameter]) -> None:
        super().__init__()
        self.used = used

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading a shape or a device does not use a parameter's values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.used.update(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return result


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` run its single operators, because fvcore counts the fused one as 0."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _every_proposal(model: BaseModel) -> Iterator[list[Any]]:
    """Let a two-stage detector's RPN return as many proposals as it may.

    RoI extractors return empty regions. So the count does not depend on weights. Yields a list of the inputs of both,
    because fvcore counts only operators on which the outputs of a model depend.
    """
    read: list[Any] = []
    with ExitStack() as stack:
        proposer = getattr(model, "rpn_head", None)
        if proposer is not None and hasattr(proposer, "predict_by_feat"):
            stack.enter_context(_replaced(proposer, "predict_by_feat", _propose(proposer, read)))
        if hasattr(model, "roi_head"):
            from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

            for module in model.modules():
                if isinstance(module, SingleRoIExtractor):
                    stack.enter_context(_replaced(module, "forward", _extract(module, read)))
        yield read


def _propose(proposer: RPNHead, read: list[Any]) -> Callable[..., list[InstanceData]]:
    number = proposer.test_cfg["max_per_img"]

    def propose(*maps: Sequence[Tensor], batch_img_metas: Sequence[dict], **_: Any) -> list[InstanceData]:
        read.append(maps)
        return [InstanceData(bboxes=maps[0][0].new_zeros(number, 4)) for _ in batch_img_metas]

    return propose


def _extract(extractor: SingleRoIExtractor, read: list[Any]) -> Callable[..., Tensor]:
    def extract(maps: Sequence[Tensor], regions: Tensor, *_: Any, **__: Any) -> Tensor:
        read.append(tuple(maps))
        return maps[0].new_zeros(len(regions), extractor.out_channels, *extractor.roi_layers[0].output_size)

    return extract


@contextmanager
def _replaced(owner: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has another method."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)
