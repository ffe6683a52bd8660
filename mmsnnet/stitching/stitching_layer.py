"""The stitching layer of SN-Net (arXiv 2302.06586) with the low-rank update of SN-Netv2 (arXiv 2307.00154)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StitchingLayer(nn.Module):
    """``y = x W^T + b + (alpha / rank) * x A^T B^T``, a map between the token widths of two anchors.

    With ``rank > 0``, ``W`` (out, in) is frozen, and ``b``, ``A`` (rank, in) and ``B`` (out, rank) are trained. ``B``
    starts at zero, so that the update starts at zero. With ``rank=0``, ``W`` itself is trained and there is no update
    (SN-Net).

    :meth:`set_base` or a state dict must set ``W`` and ``b`` before the layer is used. ``initialized`` says whether
    that has happened.

    Raises:
        ValueError: the rank is negative.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float = 1.0) -> None:
        super().__init__()
        if rank < 0:
            raise ValueError(f"the rank of a stitching layer is 0 or more, got {rank}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = alpha
        self.initialized = False
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=rank == 0)
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if rank:
            self.lora_A = nn.Parameter(torch.empty(rank, in_features))
            self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @torch.no_grad()
    def set_base(self, weight: Tensor, bias: Tensor) -> None:
        """Set ``W`` (out, in) and ``b`` (out,), so that the layer can be trained.

        Raises:
            ValueError: one of them has another shape.
        """
        if weight.shape != self.weight.shape or bias.shape != self.bias.shape:
            raise ValueError(
                f"this layer takes a weight of {tuple(self.weight.shape)} and a bias of {tuple(self.bias.shape)}, got "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.initialized = True

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., in) to (..., out), of the same dtype."""
        # Under autocast, tokens stay in full precision from block to block, and so they do where a route crosses.
        y = F.linear(x, self.weight, self.bias).to(x.dtype)
        if not self.rank:
            return y
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B).to(x.dtype) * (self.alpha / self.rank)

    def merged_weight(self) -> Tensor:
        """``W + (alpha / rank) * B A``, shape (out, in), as a new tensor."""
        if not self.rank:
            return self.weight.clone()
        return self.weight + (self.alpha / self.rank) * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merged(self) -> StitchingLayer:
        """A copy of rank 0 that computes the same, for deployment.

        The update is merged in the copy only, so that training can continue with this layer, and its checkpoint is the
        same in training and in evaluation mode.
        """
        with torch.device("meta"):  # skip the random initialisation
            copy = StitchingLayer(self.in_features, self.out_features, rank=0)
        copy = copy.to(self.weight.dtype).to_empty(device=self.weight.device)
        copy.set_base(self.merged_weight(), self.bias)
        copy.initialized = self.initialized
        return copy

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        base = {"weight": self.weight, "bias": self.bias}
        if all(prefix + name in state_dict and state_dict[prefix + name].shape == p.shape for name, p in base.items()):
            self.initialized = True
