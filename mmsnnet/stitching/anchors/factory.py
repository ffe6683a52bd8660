"""Create an anchor from the name of a timm model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import timm
from timm.layers import to_2tuple

from mmsnnet.stitching.anchors.attention import AnchorAttention
from mmsnnet.stitching.anchors.base import Anchor
from mmsnnet.stitching.anchors.plain import adapter_of
from mmsnnet.stitching.anchors.staged import staged_adapter


def create_anchor(
    model: str,
    img_size: int | tuple[int, int],
    classifier: bool = False,
    rel_pos_bias: bool = False,
    window_size: int | None = None,
    global_blocks: Sequence[int] | None = None,
    **kwargs: Any,
) -> Anchor:
    """Create an anchor from the name of a timm model, without pretrained weights.

    Args:
        model: name of a plain ViT or a hierarchical model in timm (docs/anchors.md), with or without a tag.
        img_size: image size (height, width) for which the model is built, or the side of a square.
        classifier: keep the classifier, see :class:`Anchor`.
        rel_pos_bias: give every block a learned relative position bias, as in SN-Netv2's segmentation models. It starts
            at zero, is stored for ``img_size`` and interpolated for other sizes.
        window_size: side in patches of the attention windows, as in ViTDet (arXiv 2203.16527). None lets every block
            attend over the whole image. For Swin, the side of its windows.
        global_blocks: with ``window_size``, the blocks that attend over the whole image. The default is the last block
            of each quarter.
        kwargs: arguments of ``timm.create_model`` (``drop_path_rate``, ``embed_dim``, ``depth``, ``num_heads``, ...).

    Raises:
        ValueError: timm knows no such model (the message lists similar names) or no such argument, or windows are out
            of range.
        TypeError: the model is of another class.
    """
    if reading := {"pretrained", "checkpoint_path"} & set(kwargs):
        raise ValueError(
            f"anchor {model!r}: create_anchor reads no weights; leave out {', '.join(sorted(reading))}. Set pretrained "
            "in the anchors of a backbone, or call load_pretrained"
        )
    if not timm.is_model(model.split(".")[0]):
        near = difflib.get_close_matches(model.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(
            f"timm knows no model {model!r}; "
            + (f"similar names are {', '.join(near)}" if near else "timm.list_models() lists all models")
        )
    size = to_2tuple(img_size)
    head = {} if classifier else dict(num_classes=0)
    if (staged := staged_adapter(model)) is not None:
        if rel_pos_bias or global_blocks is not None:
            raise ValueError(f"anchor {model!r}: rel_pos_bias and global_blocks are for plain ViTs")
        window = {} if window_size is None else dict(window_size=window_size)  # of timm's Swin
        net = _create_model(model, staged.size_arguments(size) | head | window | kwargs)
        return staged(net, size, classifier)
    dynamic = dict(img_size=img_size, dynamic_img_size=True, dynamic_img_pad=True)
    attention = dict(attn_layer=AnchorAttention) if rel_pos_bias or window_size is not None else {}
    if attention and "attn_layer" in kwargs:
        raise ValueError(
            f"anchor {model!r}: rel_pos_bias and window_size set the attention layer; leave out attn_layer"
        )
    net = _create_model(model, dynamic | head | attention | kwargs)
    try:
        adapter = adapter_of(net)
        # Images are padded to whole patches. Positions stored for the padded size need no resampling in each forward.
        patch_size = tuple(net.patch_embed.patch_size)
        whole = tuple(-(-side // patch) * patch for side, patch in zip(to_2tuple(img_size), patch_size, strict=True))
        if whole != tuple(net.patch_embed.img_size):
            net.set_input_size(img_size=whole)
        windows = _windows(len(net.blocks), window_size, global_blocks)
        return adapter(net, classifier=classifier, windows=windows, rel_pos_bias=rel_pos_bias)
    except (TypeError, ValueError) as error:
        raise type(error)(f"anchor {model!r}: {error}") from error


def _create_model(model: str, settings: dict[str, Any]) -> Any:
    """``timm.create_model``, with errors that name the anchor and its setting."""
    try:
        return timm.create_model(model, **settings)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'", str(error))
        if unknown is None:
            raise
        if unknown[1] == "attn_layer":
            raise ValueError(
                f"anchor {model!r}: rel_pos_bias and window_size need a model of timm's VisionTransformer class"
            ) from error
        if unknown[1] in ("img_size", "dynamic_img_size", "dynamic_img_pad"):
            raise TypeError(
                f"timm's {model!r} has no {unknown[1]}: an anchor is a plain ViT (deit3_*, vit_*, eva02_*, ...) or a "
                "hierarchical model (swin_*, convnext_*, resnet*, ...; docs/anchors.md)"
            ) from error
        raise ValueError(
            f"anchor {model!r}: unknown key {unknown[1]!r}; an anchor takes 'model', 'pretrained', 'rel_pos_bias', "
            "'window_size', 'global_blocks' and the arguments of timm.create_model"
        ) from error
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        tags = timm.list_pretrained(f"{model.split('.')[0]}.*")
        raise ValueError(f"timm knows no weights {model!r}; there are {', '.join(tags)}") from error
    except AssertionError as error:
        raise ValueError(f"anchor {model!r} cannot be built: {error}") from error


def _windows(depth: int, window_size: int | None, global_blocks: Sequence[int] | None) -> tuple[int, ...]:
    """The side of each block's windows; 0 stands for the whole image."""
    if window_size is None:
        if global_blocks is not None:
            raise ValueError(f"global_blocks={tuple(global_blocks)} needs window_size, which is not set")
        return (0,) * depth
    if window_size < 1:
        raise ValueError(f"window_size is the side of a window in patches, at least 1; got {window_size}")
    if global_blocks is None:
        global_blocks = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4) if depth * quarter // 4 > 0]
    wrong = [block for block in global_blocks if not 0 <= block < depth]
    if wrong:
        raise ValueError(f"global_blocks are blocks of the anchor, 0 to {depth - 1}; got {wrong}")
    return tuple(0 if block in global_blocks else window_size for block in range(depth))
