"""Data-parallel training that averages only the gradients that the drawn stitches use."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch import distributed as dist

from mmsnnet.models.backbones import StitchedBackbone, find_stitched_backbone
from mmsnnet.models.torch_private import foreach_copy_, queue_callback
from mmsnnet.registry import MODEL_WRAPPERS
from mmsnnet.stitching import Stitch


@MODEL_WRAPPERS.register_module()
class StitchedDataParallel(nn.Module):
    """Average gradients over the ranks, for the parameters that the drawn stitches use.

    ``DistributedDataParallel`` averages all gradients. Here all ranks draw the same stitch. So each knows, without a
    search of the graph or communication, which parameters a forward uses: those of the backbone's
    ``trained_parameters``, and all outside the backbone. Buckets collect their gradients during the backward pass, in
    the order in which they arrive, and each full bucket is reduced while the backward pass goes on. Afterwards each
    gradient is a view of its bucket. Parameters that no stitch uses cost no memory, copy or communication.

    A parameter outside the backbone may have a gradient on some ranks only, such as that of a detection head without
    positives. The other ranks count as zeros. If no rank has one, ``grad`` stays None, and the optimizer skips the
    parameter, as it does on a single rank: no weight decay, no momentum, no step counted for Adam's bias correction.
    This needs gradients set to None after a step, as mmengine and PyTorch do by default, not to zeros
    (``zero_grad(set_to_none=False)``).

    Under :meth:`no_sync`, gradients add up on each rank over the drawn stitches. The next backward pass outside
    averages the gradients of all of them.

    The constructor broadcasts the parameters and buffers of rank 0. As with ``DistributedDataParallel``, it also fixes
    which parameters are trained; every backward pass needs a forward in training mode through the wrapper; and
    activation checkpointing needs ``use_reentrant=False``.

    Args:
        module: an mmengine model with one ``StitchedBackbone`` in it, on its device.
        bucket_cap_mb: the size from which a bucket is full, in MiB.

    Raises:
        TypeError: the model has no stitched backbone, or more than one.
        RuntimeError: from ``backward()``, on all ranks: a parameter gets a gradient that no drawn stitch or no forward
            explains, or a second one; the message names the parameter.
    """

    def __init__(self, module: BaseModel, bucket_cap_mb: float = 25) -> None:
        super().__init__()
        self.module = module
        self.bucket_cap_mb = bucket_cap_mb
        in_backbone = set(self.backbone.parameters())
        self._outside = dict.fromkeys(p for p in module.parameters() if p.requires_grad and p not in in_backbone)
        self._trained: dict[Stitch, tuple[nn.Parameter, ...]] = {}
        self._unused: set[nn.Parameter] = set()
        self._sync = True
        # The stitches since the last reduction: of forwards under no_sync, and of those whose backward pass reduces.
        self._accumulated: dict[Stitch, None] = {}
        self._expected: dict[Stitch, None] = {}
        self._reduction: _Reduction | None = None
        _broadcast([*module.parameters(), *module.buffers()])
        self._register_hooks()

    # A submodule under a second name would be in the state dict twice; a cached property is none.
    @cached_property
    def backbone(self) -> StitchedBackbone:
        """The stitched backbone inside the model."""
        return find_stitched_backbone(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output. The backward pass through it reduces gradients."""
        before = self.backbone.draws
        output = self.module(*args, **kwargs)
        if torch.is_grad_enabled() and self.backbone.draws > before:
            self._reduction = None  # left over if an error has ended a backward pass
            sampler, space = self.backbone.sampler(), self.backbone.space
            drawn = dict.fromkeys(space[sampler.draw(n)] for n in range(before, self.backbone.draws))
            if self._sync:
                self._expected |= drawn
            else:
                self._accumulated |= self._expected | drawn
                self._expected = {}
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate the gradients of forwards inside on each rank instead of reducing them."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def train_step(self, data: dict | tuple | list, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Train on a batch, with reduced gradients; returns the losses to log."""
        with optim_wrapper.optim_context(self):
            data = self.module.data_preprocessor(data, training=True)
            losses = self(**data, mode="loss") if isinstance(data, Mapping) else self(*data, mode="loss")
        loss, log_vars = self.module.parse_losses(losses)
        optim_wrapper.update_params(loss)
        return log_vars

    def val_step(self, data: dict | tuple | list) -> list:
        """Predict a batch of this rank."""
        return self.module.val_step(data)

    def test_step(self, data: dict | tuple | list) -> list:
        """Predict a batch of this rank."""
        return self.module.test_step(data)

    def _register_hooks(self) -> None:
        """Register a post-accumulate hook on every trained parameter."""
        # Parameters may outlive the wrapper and be wrapped again.
        reference = weakref.ref(self)

        def on_gradient(parameter: nn.Parameter) -> None:
            if (wrapper := reference()) is not None:
                wrapper._on_gradient(parameter)

        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(on_gradient)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self._reduction is None and self._expected:
            self._begin()
        if self._reduction is None:
            if not self._accumulated:
                self._fail(
                    parameter,
                    "a gradient, but no forward in training mode has gone through the wrapper since the last "
                    "reduction: call the wrapper, not its module, once for each backward pass, and use "
                    "use_reentrant=False for activation checkpointing",
                )
            return
        if problem := self._reduction.problem(parameter):
            self._fail(parameter, problem)
        self._reduction.add(parameter)
        # Heads get their gradients before the backbone does. No bucket is launched until then: a head may communicate
        # in the backward pass too (SyncBN), and if a rank lacks a gradient, the ranks would send its messages and
        # buckets in different orders.
        if parameter not in self._outside:
            self._reduction.launch()

    def _fail(self, parameter: nn.Parameter, problem: str) -> NoReturn:
        name = next(name for name, p in self.module.named_parameters() if p is parameter)
        raise RuntimeError(f"StitchedDataParallel: {name} got {problem}")

    def _begin(self) -> None:
        """Plan the reduction, at the first gradient of a backward pass."""
        expected = self._used_by(self._expected)
        earlier = [p for p in self._used_by(self._accumulated) if p not in expected]
        self._expected, self._accumulated = {}, {}
        order = [*reversed(earlier), *reversed(self._outside), *reversed(expected)]
        # Last, what no rank had a gradient for the last time: it would delay all buckets behind it to the end.
        order.sort(key=self._unused.__contains__)
        self._reduction = reduction = _Reduction(order, self.bucket_cap_mb)
        queue_callback(partial(self._finish, reduction))
        for parameter in earlier:
            if parameter.grad is not None:
                reduction.add(parameter)

    def _finish(self, reduction: _Reduction) -> None:
        unused = reduction.finish()
        self._unused = (self._unused - reduction.bucket_of.keys()) | unused
        self._reduction = None

    def _used_by(self, stitches: Iterable[Stitch]) -> dict[nn.Parameter, None]:
        """The parameters that stitches train, in the order of use."""
        for stitch in stitches:
            if stitch not in self._trained:
                self._trained[stitch] = self.backbone.trained_parameters(stitch)
        return dict.fromkeys(parameter for stitch in stitches for parameter in self._trained[stitch])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reduction": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register_hooks()


class _Bucket:
    """Gradients of some parameters of one dtype and device, reduced in one message.

    Attributes:
        waiting: the parameters whose gradient has not arrived.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.waiting = set(parameters)

    @torch.no_grad()
    def launch(self) -> None:
        """Copy the gradients into one tensor and start to reduce it.

        From now on the gradients are views of it. Behind them it has a flag for each parameter, which is nonzero in the
        end if any rank has its gradient. A gradient that this rank lacks counts as zeros.
        """
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = self.parameters[0].new_empty(sum(sizes) + len(sizes))
        *pieces, self._flags = flat.split([*sizes, len(sizes)])
        self._views = list(map(_with_layout, pieces, self.parameters))
        self._flags.fill_(1)
        self._missing = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        for index in self._missing:
            self._views[index].zero_()
            self._flags[index] = 0
        pairs = zip(self.parameters, self._views, strict=True)
        if present := [(p, view, p.grad) for p, view in pairs if p.grad is not None]:
            foreach_copy_([view for _, view, _ in present], [gradient for _, _, gradient in present])
        for parameter, view, _ in present:
            parameter.grad = view
        # Scaled before the sum, as in DistributedDataParallel: the same bits, and no overflow.
        flat.mul_(1 / dist.get_world_size())
        self._work = dist.all_reduce(flat, async_op=True)

    def wait(self) -> list[nn.Parameter]:
        """Wait for the reduction; returns the parameters without a gradient on any rank."""
        # With NCCL this makes the stream wait, not the process. Only reading flags waits for the device.
        self._work.wait()
        flags = self._flags.tolist() if self._missing else []
        for index in self._missing:
            if flags[index]:
                self.parameters[index].grad = self._views[index]
        return [self.parameters[index] for index in self._missing if not flags[index]]


class _Reduction:
    """The reduction of the gradients of one backward pass.

    All ranks reduce the same buckets in the same order, each as soon as it is full. Buckets that are not full at the
    end of the backward pass are launched then.

    Args:
        order: the parameters, in the expected order of their gradients.
        cap: the size from which a bucket is full, in MiB.

    Attributes:
        bucket_of: the bucket of each parameter.
    """

    def __init__(self, order: Iterable[nn.Parameter], cap: float) -> None:
        self._buckets = [_Bucket(parameters) for parameters in _divide(order, cap * 2**20)]
        self._launched = 0
        self.bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}

    def problem(self, parameter: nn.Parameter) -> str | None:
        """Why a gradient should not have arrived; None if it should."""
        bucket = self.bucket_of.get(parameter)
        if bucket is None:
            return (
                "a gradient, but no stitch drawn since the last reduction uses it: a model may use parameters of its "
                "backbone only through the backbone's forward"
            )
        if parameter not in bucket.waiting:
            return (
                "a second gradient while the first one is being reduced: run one backward pass after each forward, "
                "and use use_reentrant=False for activation checkpointing"
            )
        return None

    def add(self, parameter: nn.Parameter) -> None:
        """Record that a gradient has arrived."""
        self.bucket_of[parameter].waiting.remove(parameter)

    def launch(self) -> None:
        """Start to reduce the full buckets, up to the first that is not full."""
        while self._launched < len(self._buckets) and not self._buckets[self._launched].waiting:
            self._buckets[self._launched].launch()
            self._launched += 1

    def finish(self) -> set[nn.Parameter]:
        """Reduce the remaining buckets; returns the parameters for which no rank has a gradient."""
        for bucket in self._buckets[self._launched :]:
            bucket.launch()
        return {parameter for bucket in self._buckets for parameter in bucket.wait()}


def _with_layout(piece: Tensor, parameter: nn.Parameter) -> Tensor:
    """View a piece (N,) of a bucket in a parameter's shape and memory layout.

    Fused optimizers need the same layout.
    """
    if parameter.is_contiguous():
        return piece.view(parameter.shape)
    return piece.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())


def _divide(order: Iterable[nn.Parameter], cap: float) -> list[list[nn.Parameter]]:
    """Divide parameters into buckets of one dtype and device.

    A bucket is closed when it has reached ``cap`` bytes. The buckets come in the order in which they are closed.
    """
    closed: list[list[nn.Parameter]] = []
    opened: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in order:
        key = parameter.dtype, parameter.device
        opened.setdefault(key, []).append(parameter)
        sizes[key] = sizes.get(key, 0) + parameter.nbytes
        if sizes[key] >= cap:
            closed.append(opened.pop(key))
            del sizes[key]
    return [*closed, *opened.values()]


@torch.no_grad()
def _broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcast the values of rank 0 to every rank."""
    for tensor in tensors:
        dense = tensor.contiguous()
        dist.broadcast(dense, 0)
        if dense is not tensor:
            tensor.copy_(dense)
