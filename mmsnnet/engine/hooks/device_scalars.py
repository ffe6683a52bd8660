"""Numbers that training steps leave on a device, fetched many steps later in one transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DeviceScalars:
    """Keeps the scalars of step after step where they are, so that no step waits for the device; :meth:`fetch` waits
    once for all of them.

    What is kept are copies, one small kernel for each step, device and dtype: a loss may be a view of something big,
    hold the graph of its step, or lie in memory that the next step writes over, as with CUDA graphs.
    """

    def __init__(self) -> None:
        self._steps: list[dict[str, Any]] = []
        self._copies: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def __len__(self) -> int:
        """How many steps are kept."""
        return len(self._steps)

    def put(self, scalars: Mapping[str, Any]) -> None:
        """Adds one step: tensors and arrays of one element, and numbers, by name.

        Raises:
            TypeError: a value is none of these.
        """
        step: dict[str, Any] = {}
        tensors: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for name, value in scalars.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                kind = value.device, value.dtype
                step[name] = kind
                tensors.setdefault(kind, []).append(value.detach().reshape(()))
            elif isinstance(value, np.number) or (isinstance(value, np.ndarray) and value.size == 1):
                step[name] = value.item()
            elif isinstance(value, int | float):
                step[name] = value
            else:
                shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
                raise TypeError(f"{name} is one number, to be logged; got {type(value).__name__}{shape}")
        for kind, values in tensors.items():
            self._copies.setdefault(kind, []).append(torch.stack(values))
        self._steps.append(step)

    def fetch(self) -> list[dict[str, int | float]]:
        """Hands out the steps since the last call, in order, as Python's numbers: those that ``item()`` gives."""
        steps, copies = self._steps, self._copies
        self._steps, self._copies = [], {}
        values = {kind: iter(torch.cat(parts).tolist()) for kind, parts in copies.items()}
        return [
            {name: next(values[value]) if isinstance(value, tuple) else value for name, value in step.items()}
            for step in steps
        ]
