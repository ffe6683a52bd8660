"""``torch.compile`` for training a stitched network: block by block, in place.

The graph of a whole forward changes with the stitch, so torch would compile it for every stitch. All stitches are made
of the same blocks. The blocks of one anchor differ only in their weights, which compiled code takes as inputs, so they
share one compiled variant.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mmsnnet.stitching.anchors.base import Anchor

_numbers = count()


class StochasticDepth(nn.Module):
    """timm's ``DropPath`` with its rate as a tensor.

    Compiled code takes a tensor as an input, but a number as a constant, which would need one variant for every block.
    The random draws differ from timm's; their distribution is the same.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        # On the CPU even under the meta device: no state dict restores this value.
        self.register_buffer("keep", torch.tensor(1.0 - rate, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Set each sample of ``x`` (B, ...) to zero with probability ``rate``; scale up the other samples."""
        if not self.training:
            return x
        drawn = torch.rand((len(x),) + (1,) * (x.ndim - 1), device=x.device)
        return x * torch.where(drawn < self.keep, self.keep.reciprocal(), 0.0).to(x.dtype)


def compile_blocks(anchors: Sequence[Anchor], **options: Any) -> None:
    """Compile the blocks of anchors in place; see :meth:`StitchedNetwork.compile_blocks`."""
    backend = options.get("backend", "inductor")
    known = torch.compiler.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        raise ValueError(f"torch.compile has no backend {backend!r}; it has {', '.join(known)}")
    for anchor in anchors:
        blocks = [anchor.block(index) for index in anchor.blocks]
        _share_stochastic_depth(blocks)
        forwards: dict[object, Callable[..., Tensor]] = {}
        for index, block in zip(anchor.blocks, blocks, strict=True):
            kind = anchor.kind(index)
            if kind not in forwards:
                forwards[kind] = _with_new_code(type(block).forward)
            block.forward = types.MethodType(forwards[kind], block)
            # A block that cannot be compiled as a whole is an error: dynamo would silently run it uncompiled.
            block.compile(**dict(fullgraph=True) | options)
        anchor.compiled = True


def _with_new_code(function: Any) -> Callable[..., Tensor]:
    """Copy a function with a new code object.

    Dynamo caches compiled variants by code object. It limits their number, searches them at each call, and treats sizes
    that differ between two variants as dynamic. So each kind of block needs its own code object.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_of_kind_{next(_numbers)}")
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _share_stochastic_depth(blocks: Sequence[nn.Module]) -> None:
    """Replace stochastic depth in all blocks, so that blocks of all rates share compiled code."""
    # In a block whose rate is zero, timm has an identity under the same name.
    names = {name for block in blocks for name, module in block.named_modules() if isinstance(module, DropPath)}
    for block in blocks:
        for name in names:
            old = block.get_submodule(name)
            new = StochasticDepth(getattr(old, "drop_prob", 0.0)).train(old.training)
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, new)
