"""Anchors: pretrained timm ViTs seen as a stem, a flat sequence of blocks, and taps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmsnnet.stitching.attention import AnchorAttention, run_block
from mmsnnet.stitching.windows import Grid, from_windows, to_windows

CLASSIFIER_MODULES = ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")


class Anchor(nn.Module):
    """A timm ``VisionTransformer`` as the stitched network sees it.

    ``stem`` turns images (B, 3, H, W) into tokens (B, N, C), ``run_block`` runs one block on them, ``to_map`` turns
    them into a tap (B, C, h, w), and ``classify`` runs the model's own norm, pooling and head. The model takes any
    input size: its position embedding is resampled, and the image padded to whole patches.

    A block that attends within windows takes and gives tokens arranged in windows; :meth:`arrange` rearranges them
    where two blocks differ.

    Args:
        model: the ViT, made with ``dynamic_img_size=True, dynamic_img_pad=True``; see :func:`create_anchor`.
        classifier: keep the final norm, pooling and head, for :meth:`classify`. Without it they are dropped: a decode
            head reads the tokens as they leave the blocks.
        windows: for each block, the side in patches of the windows that it attends within, 0 for the whole image; None
            for a plain ViT. Windows, like a bias, need a model made with ``attn_layer=AnchorAttention``.
        rel_pos_bias: give every block a learned relative position bias.

    Raises:
        TypeError: the model is not a timm ``VisionTransformer``.
        ValueError: the model drops patches, so that its tokens form no map.
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: bool = False,
        windows: Sequence[int] | None = None,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, VisionTransformer):
            raise TypeError(
                f"an anchor is a model of timm's VisionTransformer class, got {type(model).__name__}: "
                "choose a plain ViT (deit3_*, vit_*, ...)"
            )
        if not isinstance(model.patch_drop, nn.Identity):
            raise ValueError("an anchor needs all its patches to form a map: leave out patch_drop_rate")
        if not (model.dynamic_img_size and model.patch_embed.dynamic_img_pad):
            raise ValueError("an anchor's model is made with dynamic_img_size=True and dynamic_img_pad=True")
        if not classifier:
            for name in CLASSIFIER_MODULES:
                if isinstance(getattr(model, name, None), nn.Module):
                    setattr(model, name, nn.Identity())
        self.model = model
        self.classifier = classifier
        self.windows = (0,) * self.depth if windows is None else tuple(windows)
        if rel_pos_bias or any(self.windows):
            for block, window in zip(model.blocks, self.windows, strict=True):
                block.attn.set_window(window, self.num_prefix_tokens)
                if rel_pos_bias:
                    block.attn.add_position_bias(model.patch_embed.grid_size, self.num_prefix_tokens)
        self._frozen: list[nn.Module] = []

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
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return self.model.cls_token is not None

    @property
    def img_size(self) -> tuple[int, int]:
        """The input size (height, width) that the position embedding is stored for."""
        return tuple(self.model.patch_embed.img_size)

    def stem(self, images: Tensor) -> Tensor:
        """Patch and position embedding: images (B, 3, H, W) to tokens (B, N, C), prefix tokens first."""
        model = self.model
        return model.norm_pre(model._pos_embed(model.patch_embed(images)))

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """The patches (height, width) of images of ``image_size`` (height, width)."""
        return self.model.patch_embed.dynamic_feat_size(image_size)

    def arrange(self, tokens: Tensor, grid: Grid, window: int, wanted: int) -> Tensor:
        """Tokens (B, N, C) of a ``grid``, from windows of side ``window`` to windows of side ``wanted``; 0 stands for
        the whole image, prefix tokens first."""
        if window == wanted:
            return tokens
        if window:
            tokens = from_windows(tokens, grid, window, self.num_prefix_tokens)
        return to_windows(tokens, grid, wanted, self.num_prefix_tokens) if wanted else tokens

    def run_block(self, index: int, tokens: Tensor, grid: Grid, recompute: bool = False) -> Tensor:
        """Runs block ``index`` on tokens (B, N, C) of a ``grid``, arranged in windows of ``windows[index]``; with
        ``recompute`` its activations are computed again in the backward pass instead of being kept."""
        if recompute:
            return checkpoint(run_block, self.block(index), tokens, grid, use_reentrant=False)
        return run_block(self.block(index), tokens, grid)

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
            frozen = [*self.stem_parameters(), *self.model.blocks[:blocks].parameters()]
        for parameter in frozen:
            parameter.requires_grad = False
        self.train(self.training)

    def train(self, mode: bool = True) -> Anchor:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def stem_parameters(self) -> list[nn.Parameter]:
        """What :meth:`stem` uses: all parameters outside the blocks and the classifier."""
        outside = ("blocks", *CLASSIFIER_MODULES)
        return [p for name, p in self.model.named_parameters() if name.split(".")[0] not in outside]

    def classifier_parameters(self) -> list[nn.Parameter]:
        """What :meth:`classify` uses."""
        return [p for name, p in self.model.named_parameters() if name.split(".")[0] in CLASSIFIER_MODULES]


def create_anchor(
    model: str,
    img_size: int | tuple[int, int],
    classifier: bool = False,
    rel_pos_bias: bool = False,
    window_size: int | None = None,
    global_blocks: Sequence[int] | None = None,
    **kwargs: Any,
) -> Anchor:
    """Builds an anchor, without pretrained weights, from the name of a timm model.

    Args:
        model: name of a plain ViT in timm, with or without a tag.
        img_size: height and width (or the side) that the position embedding is stored for; need not be square.
        classifier: keep the classifier, see :class:`Anchor`.
        rel_pos_bias: give every block a learned relative position bias, zero at first, as the segmentation models of
            SN-Netv2 have. It is stored for ``img_size`` and interpolated for others.
        window_size: side in patches of the windows that blocks attend within, as in ViTDet (arXiv 2203.16527); None
            lets every block attend over the whole image.
        global_blocks: with ``window_size``, the blocks that attend over the whole image all the same; the last of each
            quarter of the blocks by default.
        kwargs: go to ``timm.create_model`` (``drop_path_rate``, ``embed_dim``, ``depth``, ``num_heads``, ...).

    Raises:
        ValueError: timm knows no such model (near names are listed) or no such keyword, or windows are out of range.
        TypeError: the model is not a plain ViT.
    """
    if not timm.is_model(model.split(".")[0]):
        near = difflib.get_close_matches(model.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(
            f"timm knows no model {model!r}; "
            + (f"near names are {', '.join(near)}" if near else "timm.list_models() lists them")
        )
    dynamic = dict(dynamic_img_size=True, dynamic_img_pad=True)
    head = {} if classifier else dict(num_classes=0)
    attention = dict(attn_layer=AnchorAttention) if rel_pos_bias or window_size is not None else {}
    if attention and "attn_layer" in kwargs:
        raise ValueError(
            f"anchor {model!r}: rel_pos_bias and window_size go with timm's plain attention, no attn_layer"
        )
    try:
        net = timm.create_model(model, img_size=img_size, **{**dynamic, **head, **attention, **kwargs})
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        if unknown[1] in ("img_size", *dynamic, *attention):
            raise TypeError(
                f"timm's {model!r} does not take images of any size: an anchor is a plain ViT (deit3_*, vit_*, ...)"
            ) from error
        raise ValueError(
            f"anchor {model!r}: unknown key {unknown[1]!r}; keys beside 'model', 'pretrained', 'rel_pos_bias', "
            "'window_size' and 'global_blocks' are those of timm.create_model"
        ) from error
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        tags = timm.list_pretrained(f"{model.split('.')[0]}.*")
        raise ValueError(f"timm knows no weights {model!r}; there are {', '.join(tags)}") from error
    except AssertionError as error:
        raise ValueError(f"anchor {model!r} cannot be built: {error}") from error
    if not isinstance(net, VisionTransformer):
        return Anchor(net)  # says why not
    # Images are padded to whole patches: the position embedding is stored for those, not resampled at each forward.
    patch_size = tuple(net.patch_embed.patch_size)
    whole = tuple(-(-side // patch) * patch for side, patch in zip(_pair(img_size), patch_size, strict=True))
    if whole != tuple(net.patch_embed.img_size):
        net.set_input_size(img_size=whole)
    windows = _windows(len(net.blocks), window_size, global_blocks)
    return Anchor(net, classifier=classifier, windows=windows, rel_pos_bias=rel_pos_bias)


def _windows(depth: int, window_size: int | None, global_blocks: Sequence[int] | None) -> tuple[int, ...]:
    """The window's side for each block, 0 for the whole image."""
    if window_size is None:
        if global_blocks is not None:
            raise ValueError(f"global_blocks={tuple(global_blocks)} goes with window_size, which is not set")
        return (0,) * depth
    if window_size < 1:
        raise ValueError(f"window_size is the side of a window in patches, at least 1; got {window_size}")
    if global_blocks is None:
        global_blocks = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4) if depth * quarter // 4 > 0]
    wrong = [block for block in global_blocks if not 0 <= block < depth]
    if wrong:
        raise ValueError(f"global_blocks are blocks of the anchor, 0 to {depth - 1}; got {wrong}")
    return tuple(0 if block in global_blocks else window_size for block in range(depth))


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
