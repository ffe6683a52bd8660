"""``torch.compile`` for training a stitched network: block by block, in place.

A whole forward would be compiled anew for every stitch. Blocks are what all stitches are made of, and those of one
anchor differ in nothing but their weights, which compiled code takes as inputs: one variant serves all of them.
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
    """timm's ``DropPath`` with its rate as a tensor: compiled code takes a tensor as an input and a number as a
    constant, which would make a variant for every block. The draws are not timm's, their distribution is."""

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        # A value even where the model is outlined on the meta device: no state dict brings it.
        self.register_buffer("keep", torch.tensor(1.0 - rate, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes each sample of x (B, ...) with the probability of the rate, and scales up what is kept."""
        if not self.training:
            return x
        drawn = torch.rand((len(x),) + (1,) * (x.ndim - 1), device=x.device)
        return x * torch.where(drawn < self.keep, self.keep.reciprocal(), 0.0).to(x.dtype)


def compile_blocks(anchors: Sequence[Anchor], **options: Any) -> None:
    """Compiles the blocks of anchors in place for training mode; see :meth:`StitchedNetwork.compile_blocks`."""
    backend = options.get("backend", "inductor")
    known = torch.compiler.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        raise ValueError(f"torch.compile has no backend {backend!r}; it has {', '.join(known)}")
    for anchor in anchors:
        blocks = [anchor.block(index) for index in anchor.blocks]
        _share_stochastic_depth(blocks)
        alike: dict[object, Callable[..., Tensor]] = {}
        for index, block in zip(anchor.blocks, blocks, strict=True):
            kind = anchor.kind(index)
            if kind not in alike:
                alike[kind] = _own_code(type(block).forward)
            block.forward = types.MethodType(alike[kind], block)
            # Whatever cannot be compiled as a whole is an error: left to itself, dynamo would run it as it is.
            block.compile(**dict(fullgraph=True) | options)
        anchor.compiled = True


def _own_code(function: Any) -> Callable[..., Tensor]:
    """The same function with a code object of its own. Dynamo keeps what it compiles with the code object: it limits
    the number of variants of each, looks through them at each call, and takes sizes that differ between two for sizes
    that vary. So each kind of block has its own."""
    code = function.__code__.replace(co_name=f"{function.__name__}_of_kind_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _share_stochastic_depth(blocks: Sequence[nn.Module]) -> None:
    """Replaces what drops the paths of blocks, so that their rates, zero included, do not tell them apart."""
    # Where the rate of one block is zero, timm leaves an identity.
    places = {name for block in blocks for name, module in block.named_modules() if isinstance(module, DropPath)}
    for block in blocks:
        for name in places:
            dropped = block.get_submodule(name)
            shared = StochasticDepth(getattr(dropped, "drop_prob", 0.0)).train(dropped.training)
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, shared)
