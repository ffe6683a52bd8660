"""Anchors: pretrained timm ViTs seen as a stem, a flat sequence of blocks, and taps."""

from __future__ import annotations

import difflib
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmsnnet.stitching.attention import BIAS_TABLE, AnchorAttention, resize_table, run_block
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


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did: where the weights came from, which keys were resized to the anchor's patch and
    input size, which of the file's keys an anchor has no use for (its classifier, or one for another number of
    classes), and which parts of the anchor the file has nothing for and which stay as they were (the tables of a
    relative position bias; a head for another number of classes)."""

    source: str
    loaded: int
    resized: tuple[str, ...]
    left_out: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.source}: {self.loaded} tensors loaded"
        if self.resized:
            text += f", resized: {', '.join(self.resized)}"
        if self.left_out:
            text += f", left out: {', '.join(self.left_out)}"
        if self.kept:
            text += f", not in the file and kept as initialised: {_listed(list(self.kept))}"
        return text


def load_pretrained(anchor: Anchor, source: str | os.PathLike[str] | bool) -> LoadReport:
    """Loads pretrained weights into an anchor, its position embedding resampled to the anchor's input size.

    Args:
        anchor: the anchor to fill.
        source: a path (``.safetensors`` or what ``torch.save`` wrote), a URL, ``hf-hub:owner/name``, or True for the
            weights that timm publishes for the model. A checkpoint of a :class:`StitchedNetwork` with one anchor works
            too. Files are read with ``weights_only=True``.

    A position embedding, like the tables of a relative position bias, is taken for one of a square grid, unless it is
    of a one-anchor checkpoint and has the anchor's number of tokens. Where the file has no such tables, the anchor's
    stay at zero. A head for another number of classes than the anchor's is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds another architecture (missing, unexpected and mismatching keys
            are listed). The anchor is then left as it was.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    state_dict, same_grid = _unwrap(_read(anchor, source), source)
    filtered = _in_timm_names(anchor, state_dict, same_grid, source)
    wanted = anchor.model.state_dict()
    kept = _kept(filtered, wanted)
    left_out = [
        key for key in filtered if key.split(".")[0] in CLASSIFIER_MODULES and (key not in wanted or key in kept)
    ]
    wanted = {key: value for key, value in wanted.items() if key not in kept}
    missing = [key for key in wanted if key not in filtered]
    unexpected = [key for key in filtered if key not in wanted and key not in left_out]
    mismatched = [
        f"{key} ({_shape(filtered[key])} in the file, {_shape(wanted[key])} in the anchor)"
        for key in wanted
        if key in filtered and _shape(filtered[key]) != _shape(wanted[key])
    ]
    problems = dict(missing=missing, unexpected=unexpected, mismatched=mismatched)
    if any(problems.values()):
        listing = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"pretrained={source!r} does not fit this anchor ({anchor.depth} blocks, width {anchor.width}). {listing}"
        )
    resized = [key for key in wanted if key in state_dict and not torch.equal(state_dict[key], filtered[key])]
    anchor.model.load_state_dict({key: filtered[key] for key in wanted}, strict=False)
    return LoadReport(str(source), len(wanted), tuple(resized), tuple(left_out), tuple(kept))


def _kept(filtered: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What of an anchor stays as it is initialised: bias tables, where the file has none at all, and a head whose
    number of classes is not the file's."""
    tables = [key for key in wanted if key.endswith(BIAS_TABLE)]
    kept = [] if any(key in filtered for key in tables) else tables
    for head in ("head", "head_dist"):
        weight = f"{head}.weight"
        if weight in wanted and weight in filtered and len(wanted[weight]) != len(filtered[weight]):
            kept += [key for key in wanted if key.startswith(f"{head}.")]
    return kept


def _read(anchor: Anchor, source: str | bool) -> Mapping[str, Any]:
    if source is True:
        cfg = anchor.model.pretrained_cfg
        source = f"hf-hub:{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else cfg.get("url") or ""
        if not source:
            raise ValueError("timm publishes no weights for this anchor: give pretrained a path or a URL")
    if not isinstance(source, str):
        raise TypeError(f"pretrained is a path, a URL, 'hf-hub:owner/name' or True, got {source!r}")
    path = Path(source).expanduser()
    remote = re.match(r"hf-hub:|https?://", source)
    if not remote and not path.is_file():
        raise FileNotFoundError(f"pretrained={source!r}: there is no such file (working folder {Path.cwd()})")
    try:
        if remote and remote[0] == "hf-hub:":
            return load_state_dict_from_hf(source.removeprefix("hf-hub:"), weights_only=True)
        if remote:
            return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"pretrained={source!r} is refused: it is cut short, or holds Python objects beside weights, and those "
            f"could run code ({_first_line(error)})"
        ) from error
    except Exception as error:  # a damaged file, like a failed download, makes the readers raise almost anything
        cause = "it cannot be fetched, is cut short" if remote else "it is cut short"
        raise ValueError(
            f"pretrained={source!r} cannot be read: {cause} or no checkpoint ({_first_line(error)})"
        ) from error


def _unwrap(file: Any, source: str | bool) -> tuple[dict[str, Tensor], bool]:
    """The weights out of their wrapper, and out of a stitched network with one anchor. Also whether they come from such
    a network: then the position embedding is for the grid that the anchor has, if the numbers agree."""
    for wrapper in ("state_dict", "model"):
        if isinstance(file, Mapping) and isinstance(file.get(wrapper), Mapping):
            file = file[wrapper]
    if not isinstance(file, Mapping) or not file or not all(isinstance(key, str) for key in file):
        raise ValueError(f"pretrained={source!r} holds no state dict")
    inside = {key: match for key in file if (match := re.match(r"(?:.*\.)?anchors\.(\d+)\.model\.", key))}
    indices = {match[1] for match in inside.values()}
    if len(indices) > 1:
        raise ValueError(
            f"pretrained={source!r} holds {len(indices)} anchors: an anchor's weights come from a checkpoint of one"
        )
    if inside:
        return {key[match.end() :]: file[key] for key, match in inside.items()}, True
    return dict(file), False


def _in_timm_names(
    anchor: Anchor, state_dict: dict[str, Tensor], same_grid: bool, source: str | bool
) -> dict[str, Tensor]:
    """The weights under timm's names, those that depend on patch or input size resampled to the anchor's.

    timm's filter does it but for a position embedding of as many tokens on another grid, which it cannot tell apart.
    """
    model = anchor.model
    # Files of DINOv2, known by their mask token, are renamed by the filter as a whole.
    position = None if "mask_token" in state_dict else state_dict.get("pos_embed")
    apart = {key: value for key, value in state_dict.items() if key.endswith(BIAS_TABLE)}
    others = {
        key: value for key, value in state_dict.items() if key not in apart and (position is None or key != "pos_embed")
    }
    try:
        filtered = checkpoint_filter_fn(others, model, adapt_layer_scale=True)
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"pretrained={source!r} is of another architecture ({_first_line(error)})") from error
    if isinstance(position, Tensor) and model.pos_embed is not None and position.ndim == 3:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        side = math.isqrt(max(position.shape[1] - prefix, 0))
        known = same_grid and position.shape == model.pos_embed.shape
        if not known and side and side**2 == position.shape[1] - prefix:
            grid = list(model.patch_embed.grid_size)
            position = resample_abs_pos_embed(position, new_size=grid, old_size=[side, side], num_prefix_tokens=prefix)
    if position is not None:
        filtered["pos_embed"] = position
    return filtered | {key: _in_anchors_grid(model, key, table, same_grid) for key, table in apart.items()}


def _in_anchors_grid(model: VisionTransformer, key: str, table: Tensor, same_grid: bool) -> Tensor:
    """A table of a relative position bias, resized from a square grid to that of the anchor's own table."""
    own = model.state_dict().get(key)
    if own is None or table.ndim != 2 or (same_grid and table.shape == own.shape):
        return table
    extra = 3 if model.num_prefix_tokens else 0
    odd = math.isqrt(max(len(table) - extra, 0))
    if odd % 2 == 0 or odd**2 != len(table) - extra:
        return table
    side = (odd + 1) // 2
    return resize_table(table, (side, side), model.get_submodule(key.removesuffix(f".{BIAS_TABLE}")).bias_grid)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _listed(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
