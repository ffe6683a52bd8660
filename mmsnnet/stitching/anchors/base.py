"""Anchors: pretrained timm ViTs seen as a stem, a flat sequence of blocks, and taps.

What two of timm's classes do differently is said in one small adapter for each, :class:`VisionTransformerAnchor` and
:class:`EvaAnchor`; :func:`adapter_of` chooses it by the class of the model.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from timm.layers import HybridEmbed, resample_abs_pos_embed
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmsnnet.errors import SettingError
from mmsnnet.files.reading import join_names
from mmsnnet.stitching.anchors.attention import BIAS_TABLE, AnchorAttention, resize_table, table_rows
from mmsnnet.stitching.windows import Grid, from_windows, to_windows

CLASSIFIER_MODULES = ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")
POSITION = "pos_embed"
# Where an anchor's state dict has the grid, (height, width) in patches, that its positions are stored for.
GRID = "grid"
Positions = Sequence[Tensor | None]


class Anchor(nn.Module, ABC):
    """A plain ViT of timm's as the stitched network sees it.

    ``stem`` turns images (B, 3, H, W) into tokens (B, N, C), ``run`` runs blocks on them, ``to_map`` turns them into a
    tap (B, C, h, w), and ``classify`` runs the model's own norm, pooling and head. The model takes any input size: its
    positions are resampled, and the image padded to whole patches.

    A block that attends within windows takes and gives tokens arranged in windows; :meth:`arrange` rearranges them
    where two blocks differ.

    Its state dict tells under ``grid`` for how many patches (height, width) its position embedding and its tables of
    relative positions are stored: two grids of as many patches look alike. A state dict of another grid is resampled to
    the anchor's when it is loaded; one without ``grid`` is taken to be of the anchor's.

    Args:
        model: the ViT, made with ``dynamic_img_size=True, dynamic_img_pad=True``; see :func:`create_anchor`.
        classifier: keep the final norm, pooling and head, for :meth:`classify`. Without it they are dropped: a decode
            head reads the tokens as they leave the blocks.
        windows: for each block, the side in patches of the windows that it attends within, 0 for the whole image; None
            for a plain ViT.

    Attributes:
        has_class_token: whether the first prefix token is a class token.
        has_stem: whether it has a stem, which :meth:`keep` may leave out.
        blocks: the indices of the blocks that it has: all, unless :meth:`keep` has left some out.
        compiled: whether its blocks are compiled for training mode (:meth:`StitchedNetwork.compile_blocks`).

    Raises:
        TypeError: the model's patches are those of a convolutional network (a hybrid).
        ValueError: the model drops patches, so that its tokens form no map, or takes images of one size only.
    """

    def __init__(
        self, model: VisionTransformer | Eva, classifier: bool = False, windows: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if isinstance(model.patch_embed, HybridEmbed):
            raise TypeError(
                "a hybrid, whose patches a convolutional network makes, is no plain ViT (deit3_*, vit_*, ...)"
            )
        if not isinstance(model.patch_drop, nn.Identity | None):
            raise ValueError("an anchor needs all its patches to form a map: leave out patch_drop_rate")
        if not (model.dynamic_img_size and model.patch_embed.dynamic_img_pad):
            raise ValueError("an anchor's model is made with dynamic_img_size=True and dynamic_img_pad=True")
        self.model = model
        self.classifier = classifier
        if not classifier:
            self._drop_classifier()
        self.windows = (0,) * self.depth if windows is None else tuple(windows)
        self.has_stem = True
        self.has_class_token = model.cls_token is not None
        self.blocks = tuple(range(self.depth))
        self.compiled = False
        self._frozen: list[nn.Module] = []
        self.register_state_dict_post_hook(_save_grid)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.model.blocks)

    @property
    def width(self) -> int:
        """The channels of its tokens."""
        return self.model.embed_dim

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of the tokens leaving each block."""
        return (self.width,) * self.depth

    @property
    def in_chans(self) -> int:
        """The channels of its images."""
        return self.model.patch_embed.proj.in_channels

    @property
    def patch_size(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens, which stand before the patch tokens."""
        return self.model.num_prefix_tokens

    @property
    def img_size(self) -> tuple[int, int]:
        """The input size (height, width) that the position embedding is stored for."""
        return tuple(self.model.patch_embed.img_size)

    @property
    def stored_grid(self) -> Grid:
        """The patches (height, width) of ``img_size``."""
        height, width = self.model.patch_embed.grid_size
        return height, width

    def grids(self) -> dict[str, Grid]:
        """What the model has stored for a grid of patches, by its name in the model's state dict, with that grid: its
        position embedding, and tables of relative positions, which in windows are for the window."""
        grids = {} if self.model.pos_embed is None else {POSITION: self.stored_grid}
        for index in self.blocks:
            attention = getattr(self.block(index), "attn", None)
            if isinstance(attention, AnchorAttention) and attention.bias_grid is not None:
                grids[f"blocks.{index}.attn.{BIAS_TABLE}"] = attention.bias_grid
        return grids

    def is_for(self, name: str, tensor: Any, grid: Grid) -> bool:
        """Whether a tensor is what :meth:`grids` has under this name, but for ``grid``."""
        own = self._stored(name)
        if not isinstance(tensor, Tensor) or tensor.ndim != own.ndim or tensor.shape[-1] != own.shape[-1]:
            return False
        if name != POSITION:
            return len(tensor) == table_rows(grid, self.num_prefix_tokens)
        return tensor.shape[:2] == (1, own.shape[1] - math.prod(self.stored_grid) + math.prod(grid))

    def resample(self, name: str, tensor: Tensor, grid: Grid) -> Tensor:
        """A tensor for ``grid`` (see :meth:`is_for`), resampled to the grid of the anchor's own; itself if that is the
        same."""
        own = self.grids()[name]
        if own == grid:
            return tensor
        if name != POSITION:
            return resize_table(tensor, grid, own)
        prefix = tensor.shape[1] - math.prod(grid)
        return resample_abs_pos_embed(tensor, new_size=list(own), old_size=list(grid), num_prefix_tokens=prefix)

    def take_grid(self, state_dict: MutableMapping[str, Any], prefix: str) -> tuple[Grid, list[str]] | None:
        """Takes the grid off a state dict that has the anchor's under ``prefix``, and resamples, in the dict, what is
        stored for that grid and not for the anchor's own. Returns the grid and the names in the model's state dict of
        what was resampled; None where no grid is recorded."""
        grid = recorded_grid(state_dict.get(prefix + GRID))
        if grid is None:
            return None
        del state_dict[prefix + GRID]
        resampled = []
        for name, own in self.grids().items():
            key = f"{prefix}model.{name}"
            in_window = name != POSITION and self.windows[int(name.split(".")[1])]
            if own != grid and not in_window and self.is_for(name, state_dict.get(key), grid):
                state_dict[key] = self.resample(name, state_dict[key], grid)
                resampled.append(name)
        return grid, resampled

    def _stored(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        taken = self.take_grid(state_dict, prefix)
        if taken is not None and taken[1]:
            grid, names = taken
            logging.getLogger("mmsnnet").warning(
                f"{prefix.rstrip('.') or 'anchor'}: from a checkpoint for {grid[0]} x {grid[1]} patches, resampled to "
                f"the {self.stored_grid[0]} x {self.stored_grid[1]} of this anchor's img_size: {join_names(names, 2)}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def stem(self, images: Tensor) -> Tensor:
        """Patch and position embedding: images (B, 3, H, W) to tokens (B, N, C), prefix tokens first.

        Raises:
            SettingError: the images have another number of channels than the anchor takes.
        """
        # A trace records one number of channels in any case, and would warn of the comparison.
        if not torch.jit.is_tracing() and images.shape[1] != self.in_chans:
            raise SettingError(
                f"images of shape {tuple(images.shape)} have {images.shape[1]} channels, the anchors take "
                f"{self.in_chans}: set in_chans={images.shape[1]} in every anchor, or load images with {self.in_chans} "
                "channels"
            )
        return self.model.norm_pre(self.embed_positions(self.model.patch_embed(images)))

    @abstractmethod
    def embed_positions(self, patches: Tensor) -> Tensor:
        """Patches (B, h, w, C) with the position embedding added, as tokens (B, N, C), prefix tokens first."""

    @abstractmethod
    def positions(self, grid: Grid) -> Positions:
        """What each block is told of the positions in a ``grid`` beside its tokens: a rotary embedding, or None."""

    @staticmethod
    @abstractmethod
    def call_block(block: nn.Module, tokens: Tensor, grid: Grid, positions: Tensor | None) -> Tensor:
        """Runs one of timm's blocks on tokens (B, N, C) of a ``grid``, arranged as it wants them; ``positions`` are the
        block's own."""

    @abstractmethod
    def checkpoint_filter(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the names of whoever published them turned into the model's, by timm's filter for its class;
        what depends on patch or input size is resampled to the model's."""

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The patches (height, width) of images of ``image_size`` (height, width)."""
        return self.model.patch_embed.dynamic_feat_size(image_size)

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size (height, width) to which images of ``image_size`` are padded: whole patches."""
        (rows, columns), (height, width) = self.grid(image_size), self.patch_size
        return rows * height, columns * width

    def arrange(self, tokens: Tensor, grid: Grid, window: int, wanted: int) -> Tensor:
        """Tokens (B, N, C) of a ``grid``, from windows of side ``window`` to windows of side ``wanted``; 0 stands for
        the whole image, prefix tokens first."""
        if window == wanted:
            return tokens
        if window:
            tokens = from_windows(tokens, grid, window, self.num_prefix_tokens)
        return to_windows(tokens, grid, wanted, self.num_prefix_tokens) if wanted else tokens

    def run(
        self,
        tokens: Tensor,
        grid: Grid,
        start: int = 0,
        stop: int | None = None,
        window: int = 0,
        recompute: bool = False,
    ) -> Iterator[tuple[int, Tensor, int]]:
        """Runs the blocks [start, stop), all by default, on tokens (B, N, C) of a ``grid``; gives after each its index,
        the tokens that leave it, and the side of the windows that they are arranged in.

        Args:
            tokens: arranged in windows of side ``window``, 0 for the whole image.
            recompute: compute the activations of each block again in the backward pass instead of keeping them.
        """
        positions = self.positions(grid)
        for index in range(start, self.depth if stop is None else stop):
            tokens = self.arrange(tokens, grid, window, self.windows[index])
            window = self.windows[index]
            inputs = self.block(index), tokens, grid, positions[index]
            if recompute:
                tokens = checkpoint(self.call_block, *inputs, use_reentrant=False)
            elif self.compiled and not self.training and not torch.compiler.is_compiling():
                with torch.compiler.set_stance("force_eager"):
                    tokens = self.call_block(*inputs)
            else:
                tokens = self.call_block(*inputs)
            yield index, tokens, window

    def block(self, index: int) -> nn.Module:
        """timm's block ``index``."""
        return self.model.blocks[index]

    def rows(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) as rows (B * N, C), what a stitching layer maps one by one."""
        return tokens.reshape(-1, tokens.shape[-1])

    def to_map(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The patch tokens among tokens (B, N, C) of a ``grid`` as a contiguous map (B, C, h, w)."""
        patches = tokens[:, self.num_prefix_tokens :]
        return patches.transpose(1, 2).reshape(tokens.shape[0], -1, *grid).contiguous()

    def classify(self, tokens: Tensor) -> Tensor:
        """The model's norm, pooling and head on the tokens leaving its last block: logits (B, classes)."""
        if not self.classifier:
            raise ValueError("this anchor was made without its classifier: create it with classifier=True")
        return self.model.forward_head(self.model.norm(tokens))

    def freeze(self, blocks: int | None = None) -> None:
        """Freezes the stem and the first ``blocks`` blocks (None: the whole anchor): their parameters get no gradient
        and they stay in evaluation mode, whatever :meth:`train` says."""
        if blocks is None:
            self._frozen = [self.model]
            frozen = list(self.model.parameters())
        else:
            self._frozen = [
                self.model.patch_embed,
                self.model.pos_drop,
                self.model.norm_pre,
                *self.model.blocks[:blocks],
            ]
            frozen = [*self.stem_parameters(), *self.position_parameters()]
            frozen += self.model.blocks[:blocks].parameters()
        for parameter in frozen:
            parameter.requires_grad = False
        self.train(self.training)

    def train(self, mode: bool = True) -> Anchor:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def keep(self, stem: bool, blocks: Iterable[int], classifier: bool) -> None:
        """Drops the stem, the classifier and all blocks but those named: routes that run nothing of them go on as
        before. What is kept has the indices and names that it had."""
        self.blocks = tuple(sorted(set(self.blocks) & set(blocks)))
        for index in set(range(self.depth)) - set(self.blocks):
            self.model.blocks[index] = nn.Identity()
        if not classifier:
            self.classifier = False
            self._drop_classifier()
        if not self.blocks and getattr(self.model, "rope", None) is not None:
            self.model.rope = None
        if not stem:
            self.has_stem = False
            # What tells the size of patches and images stays: the modules, without their tensors.
            for name in self._stem_names():
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, None)

    def _drop_classifier(self) -> None:
        for name in CLASSIFIER_MODULES:
            if isinstance(getattr(self.model, name, None), nn.Module):
                setattr(self.model, name, nn.Identity())

    def _stem_names(self) -> list[str]:
        outside = ("blocks", "rope", *CLASSIFIER_MODULES)
        return [name for name, _ in self.model.named_parameters() if name.split(".")[0] not in outside]

    def stem_parameters(self) -> list[nn.Parameter]:
        """What :meth:`stem` uses: all parameters outside the blocks, their positions and the classifier."""
        return [self.model.get_parameter(name) for name in self._stem_names()]

    def position_parameters(self) -> list[nn.Parameter]:
        """What :meth:`positions` uses: the frequencies of a rotary embedding that learns them."""
        return [p for name, p in self.model.named_parameters() if name.split(".")[0] == "rope"]

    def classifier_parameters(self) -> list[nn.Parameter]:
        """What :meth:`classify` uses."""
        return [p for name, p in self.model.named_parameters() if name.split(".")[0] in CLASSIFIER_MODULES]


class VisionTransformerAnchor(Anchor):
    """An anchor of timm's ``VisionTransformer``: DeiT, DeiT-III, AugReg, MAE, CLIP, SigLIP, DINO, DINOv2, ...

    Args:
        model, classifier, windows: as of :class:`Anchor`. Windows, like a bias, need a model made with
            ``attn_layer=AnchorAttention``.
        rel_pos_bias: give every block a learned relative position bias.
    """

    def __init__(
        self,
        model: VisionTransformer,
        classifier: bool = False,
        windows: Sequence[int] | None = None,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__(model, classifier, windows)
        if rel_pos_bias or any(self.windows):
            if not all(isinstance(getattr(block, "attn", None), AnchorAttention) for block in model.blocks):
                raise ValueError("rel_pos_bias and window_size are for blocks with one attention of timm's plain kind")
            for block, window in zip(model.blocks, self.windows, strict=True):
                block.attn.set_window(window, self.num_prefix_tokens)
                if rel_pos_bias:
                    block.attn.add_position_bias(model.patch_embed.grid_size, self.num_prefix_tokens)

    def embed_positions(self, patches: Tensor) -> Tensor:
        return self.model._pos_embed(patches)

    def positions(self, grid: Grid) -> Positions:
        return (None,) * self.depth

    @staticmethod
    def call_block(block: nn.Module, tokens: Tensor, grid: Grid, positions: Tensor | None) -> Tensor:
        attention = getattr(block, "attn", None)  # which timm's parallel blocks have several of
        mask = attention.mask(grid) if isinstance(attention, AnchorAttention) else None
        return block(tokens) if mask is None else block(tokens, attn_mask=mask)

    def checkpoint_filter(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return vision_transformer.checkpoint_filter_fn(dict(state_dict), self.model, adapt_layer_scale=True)


class EvaAnchor(Anchor):
    """An anchor of timm's ``Eva``: EVA-02, DINOv3 and others, whose blocks take a rotary position embedding.

    The embedding depends on the grid alone. It is computed once for each grid, unless its frequencies are learned.

    Raises:
        ValueError: windows or a relative position bias are asked for, or positions that are drawn anew at each forward.
    """

    def __init__(
        self,
        model: Eva,
        classifier: bool = False,
        windows: Sequence[int] | None = None,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__(model, classifier, windows)
        if rel_pos_bias or any(self.windows):
            raise ValueError(
                "rel_pos_bias and window_size are for anchors of timm's VisionTransformer class, not of its Eva"
            )
        unvaried = dict(shift_coords=0.0, jitter_coords=1.0, rescale_coords=1.0)
        if any((getattr(model.rope, name, None) or none) != none for name, none in unvaried.items()):
            raise ValueError(
                "an anchor's rotary positions are those of its grid, the same in all anchors of a route: set "
                "rope_shift_coords=0.0, rope_jitter_coords=1.0 and rope_rescale_coords=1.0, which draw nothing"
            )
        self._rotations: dict[tuple[Grid, torch.device], Tensor] = {}

    def embed_positions(self, patches: Tensor) -> Tensor:
        return self.model._pos_embed(patches)[0]

    def positions(self, grid: Grid) -> Positions:
        rope = self.model.rope
        if rope is None:
            return (None,) * self.depth
        if self.model.rope_mixed:
            return tuple(rope.get_embed(shape=grid))
        key = grid, next(rope.buffers()).device
        if key not in self._rotations:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training too
                self._rotations = {key: rope.get_embed(shape=grid)}
        return (self._rotations[key],) * self.depth

    @staticmethod
    def call_block(block: nn.Module, tokens: Tensor, grid: Grid, positions: Tensor | None) -> Tensor:
        return block(tokens, rope=positions)

    def checkpoint_filter(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return eva.checkpoint_filter_fn(dict(state_dict), self.model)


def recorded_grid(record: Any) -> Grid | None:
    """The grid that a state dict has under ``GRID``; None where there is none, or something else."""
    if not isinstance(record, Tensor) or record.shape != (2,) or record.is_floating_point():
        return None
    height, width = record.tolist()
    return (height, width) if height > 0 and width > 0 else None


def _save_grid(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    assert isinstance(module, Anchor)
    if module.grids():
        state_dict[prefix + GRID] = torch.tensor(module.stored_grid, device="cpu")


ADAPTERS: Mapping[type[nn.Module], type[VisionTransformerAnchor] | type[EvaAnchor]] = {
    VisionTransformer: VisionTransformerAnchor,
    Eva: EvaAnchor,
}


def adapter_of(model: nn.Module) -> type[VisionTransformerAnchor] | type[EvaAnchor]:
    """The adapter for the class of a timm model.

    Raises:
        TypeError: there is none.
    """
    for model_class, adapter in ADAPTERS.items():
        if isinstance(model, model_class):
            return adapter
    raise TypeError(
        f"an anchor is a model of timm's {' or '.join(c.__name__ for c in ADAPTERS)} class, got "
        f"{type(model).__name__}: choose a plain ViT (deit3_*, vit_*, eva02_*, ...)"
    )
