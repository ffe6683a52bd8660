"""SN-Netv2 as published: names of a released checkpoint, and its computation as matrix algebra in float64.

Written from the paper and from facts about the released files, without code of the package.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]
EPS = 1e-6

# For each of a block's weights: its name in a segmentation and in a classification file.
PARTS = {
    "norm1": ("ln1", "norm1"),
    "norm2": ("ln2", "norm2"),
    "qkv": ("attn.qkv", "attn.qkv"),
    "proj": ("attn.proj", "attn.proj"),
    "fc1": ("ffn.layers.0.0", "mlp.fc1"),
    "fc2": ("ffn.layers.1", "mlp.fc2"),
}


class Published(NamedTuple):
    """A pair of anchors, smallest first, and the input grid in patches; with ``classes`` a classification model."""

    depths: tuple[int, int] = (12, 24)
    widths: tuple[int, int] = (64, 128)
    heads: tuple[int, int] = (2, 4)
    grid: tuple[int, int] = (4, 4)
    rank: int = 16
    patch: int = 16
    classes: int | None = None

    def prefix(self, anchor: int) -> str:
        return f"anchors.{anchor}." if self.classes else f"backbone.anchors.{anchor}."

    def block(self, anchor: int, index: int) -> str:
        return f"{self.prefix(anchor)}{'blocks' if self.classes else 'layers'}.{index}."

    def layer(self, which: str, index: int) -> str:
        """``which`` is ``'SL'`` or ``'LS'``."""
        number = ("SL", "LS").index(which)
        return f"{'' if self.classes else 'backbone.'}stitch_layers.{number}.{index}.transform."

    def part(self, name: str) -> str:
        return PARTS[name][1 if self.classes else 0]


def released_weights(model: Published, seed: int = 0) -> Weights:
    """Random weights under the released names: every part has an effect, and activations stay bounded."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    def linear(name: str, rows: int, columns: int) -> Weights:
        return {f"{name}.weight": normal(rows, columns, std=columns**-0.5), f"{name}.bias": normal(rows, std=0.2)}

    def norm(name: str, width: int) -> Weights:
        return {f"{name}.weight": normal(width, std=0.2, mean=1.0), f"{name}.bias": normal(width, std=0.2)}

    weights: Weights = {}
    height, width = model.grid
    tokens, rows, index = height * width, (2 * height - 1) * (2 * width - 1) + 3, relative_positions(model.grid)
    for anchor, (depth, size, heads) in enumerate(zip(model.depths, model.widths, model.heads, strict=True)):
        at = model.prefix(anchor)
        pixels = 3 * model.patch**2
        embed = f"{at}patch_embed.{'proj' if model.classes else 'projection'}"
        weights[f"{at}cls_token"] = normal(1, 1, size)
        weights[f"{at}pos_embed"] = normal(1, tokens, size)
        weights[f"{embed}.weight"] = normal(size, 3, model.patch, model.patch, std=pixels**-0.5)
        weights[f"{embed}.bias"] = normal(size, std=0.2)
        for block in range(depth):
            at = model.block(anchor, block)
            for name in ("norm1", "norm2"):
                weights |= norm(at + model.part(name), size)
            weights |= linear(at + model.part("qkv"), 3 * size, size)
            weights |= linear(at + model.part("proj"), size, size)
            weights |= linear(at + model.part("fc1"), 4 * size, size)
            weights |= linear(at + model.part("fc2"), size, 4 * size)
            weights |= {f"{at}gamma_{branch}": normal(size, std=0.2, mean=0.5) for branch in (1, 2)}
            if not model.classes:
                weights[f"{at}attn.relative_position_bias_table"] = normal(rows, heads)
                weights[f"{at}attn.relative_position_index"] = index.clone()
        if model.classes:
            weights |= norm(f"{model.prefix(anchor)}norm", size)
            weights |= linear(f"{model.prefix(anchor)}head", model.classes, size)
    small, large = model.depths
    for which, count in (("SL", small), ("LS", sum(ends_a_group(model, block) for block in range(large - 1)))):
        source, target = model.widths if which == "SL" else model.widths[::-1]
        for number in range(count):
            at = model.layer(which, number)
            weights |= linear(at.removesuffix("."), target, source)
            weights[f"{at}lora_A"] = normal(model.rank, source, std=source**-0.5)
            weights[f"{at}lora_B"] = normal(target, model.rank)
    if not model.classes:
        weights |= linear("decode_head.conv_seg", 5, 8)
        weights["decode_head.up_convs.0.0.bn.num_batches_tracked"] = torch.tensor(7)
        weights |= linear("auxiliary_head.0.conv_seg", 5, 8)
    return weights


def merged_weights(model: Published, weights: Weights) -> Weights:
    """The weights of a file saved in evaluation mode, with updates merged into the stitching layers."""
    merged = dict(weights)
    for name in weights:
        if name.endswith("lora_A"):
            at = name.removesuffix("lora_A")
            merged[f"{at}weight"] = weights[f"{at}weight"] + weights[f"{at}lora_B"] @ weights[name] / model.rank
    return merged


def relative_positions(grid: tuple[int, int]) -> Tensor:
    """The row of the table for each query and key: offsets row by row, then three rows for the class token."""
    height, width = grid
    places = [(y, x) for y in range(height) for x in range(width)]
    offsets = (2 * height - 1) * (2 * width - 1)
    rows = [[offsets + 2] + [offsets] * len(places)]
    for y, x in places:
        rows.append([offsets + 1] + [(y - v + height - 1) * (2 * width - 1) + x - u + width - 1 for v, u in places])
    return torch.tensor(rows)


class Step(NamedTuple):
    """Blocks ``[start, stop)`` of an anchor, or the stitching layer ``start`` of the kind that ``what`` names."""

    what: str
    start: int
    stop: int = 0


def ends_a_group(model: Published, block: int) -> bool:
    ratio = model.depths[1] // model.depths[0]
    return block % ratio == ratio - 1


def stitches(model: Published) -> Iterator[tuple[int, tuple[Step, ...]]]:
    """The ids and routes of the two-way space, in the published order."""
    small, large = model.depths
    ratio = large // small

    def m(block: int) -> int:
        return math.floor(block * small / large)

    sl_blocks = range(small)
    ls_blocks = [block for block in range(large - 1) if ends_a_group(model, block)]
    yield 0, (Step("S", 0, small),)
    yield 1, (Step("L", 0, large),)
    for f in sl_blocks[:-1]:
        yield 2 + f, (Step("S", 0, f + 1), Step("SL", f), Step("L", (f + 1) * ratio, large))
    id_ = 2 + small
    for i in ls_blocks:
        yield id_, (Step("L", 0, i + 1), Step("LS", i // ratio), Step("S", m(i) + 1, small))
        id_ += 1
    for i in ls_blocks:
        for f in sl_blocks[:-1]:
            if f >= m(i) + 1:
                route = (Step("L", 0, i + 1), Step("LS", i // ratio), Step("S", m(i) + 1, f + 1))
                yield id_, (*route, Step("SL", f), Step("L", (f + 1) * ratio, large))
                id_ += 1
    for f in sl_blocks[:-1]:
        for i in ls_blocks:
            if i >= (f + 1) * ratio:
                route = (Step("S", 0, f + 1), Step("SL", f), Step("L", (f + 1) * ratio, i + 1))
                yield id_, (*route, Step("LS", i // ratio), Step("S", m(i) + 1, small))
                id_ += 1


class Reference:
    """The published model, for one image (3, H, W)."""

    def __init__(self, model: Published, weights: Mapping[str, Tensor]) -> None:
        self.model = model
        self.weights = {key: value.double() if value.is_floating_point() else value for key, value in weights.items()}

    def taps(self, image: Tensor, route: tuple[Step, ...], out_indices: tuple[int, ...]) -> list[Tensor]:
        """One map (C, h, w) for each of ``out_indices``, in the large anchor's width."""
        seen = dict(self.leaving(image, route))
        maps = []
        for index in out_indices:
            block = index * self.model.depths[0] // self.model.depths[1]
            choices = [("L", index)] * (("L", index) in seen) + [("S", block)] * (("S", block) in seen)
            (choice,) = choices
            tokens = seen[choice] if choice[0] == "L" else self.cross("SL", block, seen[choice])
            maps.append(tokens[1:].T.reshape(-1, *self.model.grid))
        return maps

    def logits(self, image: Tensor, route: tuple[Step, ...]) -> Tensor:
        """Logits (classes,), from norm and head of the anchor in which the route ends."""
        *_, ((anchor, _), tokens) = self.leaving(image, route)
        at = self.model.prefix("SL".index(anchor))
        return self.linear(f"{at}head", self.norm(f"{at}norm", tokens)[0])

    def leaving(self, image: Tensor, route: tuple[Step, ...]) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """The tokens (N, C) leaving each block, class token first."""
        tokens = self.embed("SL".index(route[0].what), image.double())
        for step in route:
            if step.what in ("SL", "LS"):
                tokens = self.cross(step.what, step.start, tokens)
                continue
            for index in range(step.start, step.stop):
                tokens = self.block("SL".index(step.what), index, tokens)
                yield (step.what, index), tokens

    def embed(self, anchor: int, image: Tensor) -> Tensor:
        at, patch = self.model.prefix(anchor), self.model.patch
        name = f"{at}patch_embed.{'proj' if self.model.classes else 'projection'}"
        height, width = self.model.grid
        patches = image.reshape(3, height, patch, width, patch).permute(1, 3, 0, 2, 4).reshape(height * width, -1)
        tokens = patches @ self.weights[f"{name}.weight"].flatten(1).T + self.weights[f"{name}.bias"]
        return torch.cat([self.weights[f"{at}cls_token"][0], tokens + self.weights[f"{at}pos_embed"][0]])

    def block(self, anchor: int, index: int, tokens: Tensor) -> Tensor:
        at, part = self.model.block(anchor, index), self.model.part
        attended = self.attention(anchor, at, self.norm(at + part("norm1"), tokens))
        tokens = tokens + self.weights[f"{at}gamma_1"] * attended
        hidden = self.linear(at + part("fc1"), self.norm(at + part("norm2"), tokens))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return tokens + self.weights[f"{at}gamma_2"] * self.linear(at + part("fc2"), hidden)

    def attention(self, anchor: int, at: str, tokens: Tensor) -> Tensor:
        heads, size = self.model.heads[anchor], self.model.widths[anchor] // self.model.heads[anchor]
        qkv = self.linear(at + self.model.part("qkv"), tokens)
        queries, keys, values = qkv.reshape(len(tokens), 3, heads, size).permute(1, 2, 0, 3)
        scores = queries @ keys.transpose(1, 2) / math.sqrt(size)
        if not self.model.classes:
            table = self.weights[f"{at}attn.relative_position_bias_table"]
            scores = scores + table[relative_positions(self.model.grid)].permute(2, 0, 1)
        shares = torch.exp(scores - scores.amax(dim=2, keepdim=True))
        mixed = shares / shares.sum(dim=2, keepdim=True) @ values
        return self.linear(at + self.model.part("proj"), mixed.transpose(0, 1).reshape(len(tokens), -1))

    def cross(self, which: str, index: int, tokens: Tensor) -> Tensor:
        at = self.model.layer(which, index)
        a, b = self.weights[f"{at}lora_A"], self.weights[f"{at}lora_B"]
        return self.linear(at.removesuffix("."), tokens) + tokens @ a.T @ b.T / self.model.rank

    def norm(self, name: str, tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(dim=1, keepdim=True)
        scale = torch.sqrt(centred.square().mean(dim=1, keepdim=True) + EPS)
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, name: str, tokens: Tensor) -> Tensor:
        return tokens @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]


def changed(weights: Weights, ending: str, change: Callable[[Tensor], Tensor]) -> Weights:
    """The weights, with each changed whose name has this ending."""
    return {key: change(value) if key.endswith(ending) else value for key, value in weights.items()}
