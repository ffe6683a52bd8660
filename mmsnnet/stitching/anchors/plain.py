"""Adapters for timm's plain ViTs: ``VisionTransformer`` (DeiT, CLIP, ...) and ``Eva`` (EVA-02, DINOv3, ...)."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import HybridEmbed, get_mixed_freqs
from timm.layers.pos_embed_sincos import get_mixed_grid
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmsnnet.files.reading import join_names
from mmsnnet.stitching.anchors.attention import AnchorAttention
from mmsnnet.stitching.anchors.base import Anchor, BlockNames
from mmsnnet.stitching.anchors.positions import GRID, StoredPositions
from mmsnnet.stitching.features import Features, Grid, Layout

CLASSIFIER_MODULES = ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")


class PlainAnchor(Anchor):
    """A plain ViT: patch and position embedding, blocks of one width, and a classifier.

    The model takes images of any size: positions are resampled, and images are padded to whole patches. The anchor's
    state dict records the grid of its stored positions. A state dict for another grid is resampled when it is loaded
    (:class:`StoredPositions`); a state dict without a record is loaded unchanged.

    Args:
        model: a timm model with ``dynamic_img_size=True, dynamic_img_pad=True``; see :func:`create_anchor`.
        classifier: as for :class:`Anchor`.
        windows: the side in patches of each block's attention windows; 0 stands for the whole image. None stands for 0
            in every block.
        rel_pos_bias: give every block a learned relative position bias.

    Raises:
        TypeError: the model is a hybrid, with a convolutional network as patch embedding.
        ValueError: the model drops patches, so that its tokens form no map, takes images of one size only, or has an
            attention without windows or bias where they are set.
    """

    _shared = ("rope",)
    classifier_modules = CLASSIFIER_MODULES
    _final_norm = "norm"
    positions: StoredPositions
    stem_weight = "patch_embed.proj.weight"

    def __init__(
        self,
        model: VisionTransformer | Eva,
        classifier: bool = False,
        windows: Sequence[int] | None = None,
        rel_pos_bias: bool = False,
    ) -> None:
        if isinstance(model.patch_embed, HybridEmbed):
            raise TypeError(
                "a hybrid, with a convolutional patch embedding, is no plain ViT: choose deit3_*, vit_*, eva02_*, ..."
            )
        if not isinstance(model.patch_drop, nn.Identity | None):
            raise ValueError("an anchor that drops patches gives no map: leave out patch_drop_rate")
        if not (model.dynamic_img_size and model.patch_embed.dynamic_img_pad):
            raise ValueError("create the model of an anchor with dynamic_img_size=True and dynamic_img_pad=True")
        super().__init__(model, classifier)
        windows = (0,) * self.depth if windows is None else tuple(windows)
        prefix, has_class_token = model.num_prefix_tokens, model.cls_token is not None
        self._stem_layout = Layout(prefix, has_class_token)
        self._layouts = tuple(Layout(prefix, has_class_token, window) for window in windows)
        self.positions = StoredPositions(model, prefix)
        self.register_state_dict_post_hook(_save_grid)
        self._set_attention(rel_pos_bias)

    @abstractmethod
    def _set_attention(self, rel_pos_bias: bool) -> None:
        """Set windows and relative position bias of the blocks."""

    @staticmethod
    def _name_blocks(model: nn.Module) -> list[list[BlockNames]]:
        return [[BlockNames(f"blocks.{name}") for name, _ in model.get_submodule("blocks").named_children()]]

    @property
    def width(self) -> int:
        """The number of channels of the tokens."""
        return self.model.embed_dim

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,) * self.depth

    @property
    def img_size(self) -> tuple[int, int]:
        """The image size (height, width) for which the position embedding is stored."""
        return tuple(self.model.patch_embed.img_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """The height and width of a patch in pixels."""
        return tuple(self.model.patch_embed.patch_size)

    @property
    def agreement(self) -> Mapping[str, object]:
        return dict(patch_size=self.patch_size, num_prefix_tokens=self.model.num_prefix_tokens, img_size=self.img_size)

    def layout(self, block: int | None = None) -> Layout:
        return self._stem_layout if block is None else self._layouts[block]

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The height and width in patches of an image of ``image_size`` (height, width)."""
        return self.model.patch_embed.dynamic_feat_size(image_size)

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        (rows, columns), (height, width) = self.grid(image_size), self.patch_size
        return rows * height, columns * width

    def _embed(self, images: Tensor) -> Features:
        tokens = self.model.norm_pre(self.embed_positions(self.model.patch_embed(images)))
        return Features(tokens, self.layout(), self.grid((images.shape[-2], images.shape[-1])))

    def _classify(self, features: Features) -> Tensor:
        return self.model.forward_head(features.data)

    @abstractmethod
    def embed_positions(self, patches: Tensor) -> Tensor:
        """Convert patches (B, h, w, C) to tokens (B, N, C): add positions and prefix tokens."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        record = self.positions.take_grid(state_dict, prefix)
        if record is not None and record[1]:
            grid, names = record
            stored = self.positions.grid
            logging.getLogger("mmsnnet").warning(
                f"{prefix.rstrip('.') or 'anchor'}: resampled {join_names(names, 2)} from the checkpoint's {grid[0]} x "
                f"{grid[1]} patches to the {stored[0]} x {stored[1]} of this anchor's img_size"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class VisionTransformerAnchor(PlainAnchor):
    """An anchor of timm's ``VisionTransformer``: DeiT, AugReg, MAE, CLIP, SigLIP, DINOv2, ...

    Windows and bias need a model with ``attn_layer=AnchorAttention``.
    """

    def _set_attention(self, rel_pos_bias: bool) -> None:
        if not rel_pos_bias and not any(layout.window for layout in self._layouts):
            return
        if not all(isinstance(getattr(block, "attn", None), AnchorAttention) for block in self.model.blocks):
            raise ValueError("rel_pos_bias and window_size need blocks with one attention of timm's class Attention")
        for block, layout in zip(self.model.blocks, self._layouts, strict=True):
            block.attn.set_window(layout.window, layout.prefix)
            if rel_pos_bias:
                block.attn.add_position_bias(self.model.patch_embed.grid_size, layout.prefix)

    def embed_positions(self, patches: Tensor) -> Tensor:
        return self.model._pos_embed(patches)

    def call(self, block: int, features: Features) -> Features:
        module = self.block(block)
        attention = getattr(module, "attn", None)  # timm's parallel blocks have several attentions
        mask = attention.mask(features.grid) if isinstance(attention, AnchorAttention) else None
        data = features.data
        return features.with_data(module(data) if mask is None else module(data, attn_mask=mask))


class EvaAnchor(PlainAnchor):
    """An anchor of timm's ``Eva`` (EVA-02, DINOv3, ...), with rotary position embeddings.

    The embedding depends on the grid alone. It is computed once for each grid, unless its frequencies are learned.

    Raises:
        ValueError: windows, a relative position bias or random rotary coordinates are set.
    """

    def _set_attention(self, rel_pos_bias: bool) -> None:
        if rel_pos_bias or any(layout.window for layout in self._layouts):
            raise ValueError(
                "rel_pos_bias and window_size need a model of timm's VisionTransformer class, not of its Eva class"
            )
        # Random coordinates would differ between the anchors of a route, and could not be cached.
        fixed = dict(shift_coords=0.0, jitter_coords=1.0, rescale_coords=1.0)
        if any((getattr(self.model.rope, name, None) or value) != value for name, value in fixed.items()):
            raise ValueError(
                "an anchor's rotary positions are those of its grid, without random coordinates: set "
                "rope_shift_coords=0.0, rope_jitter_coords=1.0 and rope_rescale_coords=1.0"
            )
        # The embedding for the last grid, or the coordinates of its patches if the frequencies are learned.
        self._rotations: dict[tuple[Grid, torch.device], Any] = {}

    def embed_positions(self, patches: Tensor) -> Tensor:
        return self.model._pos_embed(patches)[0]

    def call(self, block: int, features: Features) -> Features:
        return features.with_data(self.block(block)(features.data, rope=self._rotation(block, features.grid)))

    def _rotation(self, block: int, grid: Grid) -> Tensor | None:
        """The rotary position embedding for a block (sines and cosines), or None."""
        rope = self.model.rope
        if rope is None:
            return None
        mixed = self.model.rope_mixed
        device = rope.freqs.device if mixed else next(rope.buffers()).device
        cached = self._rotations.get((grid, device))
        if cached is None:
            with torch.inference_mode(False), torch.no_grad():  # training reads the cached tensor too
                if mixed:
                    cached = get_mixed_grid(list(grid), grid_indexing=rope.grid_indexing, device=device)
                else:
                    cached = rope.get_embed(shape=grid)
            if not torch.compiler.is_compiling():  # an export computes with fake tensors
                self._rotations = {(grid, device): cached}
        return get_mixed_freqs(rope.freqs[:, block], *cached) if mixed else cached


def _save_grid(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    assert isinstance(module, PlainAnchor)
    if module.positions.grids():
        state_dict[prefix + GRID] = torch.tensor(module.positions.grid, device="cpu")


ADAPTERS: Mapping[type[nn.Module], type[VisionTransformerAnchor] | type[EvaAnchor]] = {
    VisionTransformer: VisionTransformerAnchor,
    Eva: EvaAnchor,
}


def adapter_of(model: nn.Module) -> type[VisionTransformerAnchor] | type[EvaAnchor]:
    """The adapter for the class of a timm model.

    The models of one class differ only in numbers, so a new model of a known class needs no new adapter.

    Raises:
        TypeError: there is no adapter for this class.
    """
    for model_class, adapter in ADAPTERS.items():
        if isinstance(model, model_class):
            return adapter
    raise TypeError(
        f"an anchor is a model of timm's {' or '.join(c.__name__ for c in ADAPTERS)} class, got "
        f"{type(model).__name__}: choose a plain ViT (deit3_*, vit_*, eva02_*, ...)"
    )
