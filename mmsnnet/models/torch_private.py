"""The private names of torch that models need, each with the reason."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Variable

# The tensors in nested arguments and outputs, containers that other libraries have registered included.
from torch.utils._pytree import register_pytree_node, tree_leaves

__all__ = ["foreach_copy_", "queue_callback", "register_pytree_node", "tree_leaves"]

# One kernel for many small copies, which has no public name.
foreach_copy_ = torch._foreach_copy_


def queue_callback(function: Callable[[], None]) -> None:
    """Call a function at the end of the running backward pass, as DDP does."""
    Variable._execution_engine.queue_callback(function)
