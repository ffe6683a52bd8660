"""Data-parallel training of a stitched model: gradients are averaged of what the drawn stitches have used."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Variable

from mmsnnet.models.backbones import StitchedBackbone, find_stitched_backbone
from mmsnnet.registry import MODEL_WRAPPERS
from mmsnnet.stitching import Stitch


@MODEL_WRAPPERS.register_module()
class StitchedDataParallel(nn.Module):
    """Averages gradients over the ranks as ``DistributedDataParallel`` does, but only of what drawn stitches have used.

    All ranks draw the same stitch, so all know which parameters a forward has used without searching the graph or
    telling each other: those of ``trained_parameters`` of the backbone, and all outside the backbone. Their gradients
    are gathered in buckets during the backward pass, in the order in which they arrive, and each full bucket is reduced
    while the backward pass goes on. Afterwards each gradient is a view of its bucket. Of what no stitch has used
    nothing is allocated, copied or sent.

    A parameter outside the backbone, say of a detection head without positives, may have a gradient on some ranks only;
    the others count as zeros. Where no rank has one, ``grad`` stays None. So optimizers leave what was not used alone,
    with its state, on one rank as on many: a parameter without gradient is not decayed, not moved by its momentum, and
    the step is not among those that Adam's bias correction counts for it. This needs gradients set to None after a
    step, as mmengine and PyTorch do by default, rather than to zeros (``zero_grad(set_to_none=False)``).

    Under :meth:`no_sync` gradients add up on each rank, over the stitches drawn; the next backward pass outside of it
    averages what all of them have used.

    Construction gives every rank the parameters and buffers of rank 0. As for ``DistributedDataParallel``, it also
    settles which parameters are trained; every backward pass belongs to a forward in training mode through the wrapper;
    and checkpointing is with ``use_reentrant=False``.

    Args:
        module: a model of mmengine's with one ``StitchedBackbone`` in it, on its device.
        bucket_cap_mb: the size from which on a bucket is full, in MiB.

    Raises:
        TypeError: there is no stitched backbone in the model, or more than one.
        RuntimeError: from ``backward()``, on all ranks: a parameter has a gradient that no drawn stitch accounts for,
            has a second one, or has one with no forward to explain it; the message names it.
    """

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25) -> None:
        super().__init__()
        self.module = module
        self.bucket_cap_mb = bucket_cap_mb
        in_backbone = set(self.backbone.parameters())
        self._outside = dict.fromkeys(p for p in module.parameters() if p.requires_grad and p not in in_backbone)
        self._trained: dict[Stitch, tuple[nn.Parameter, ...]] = {}
        self._unused: set[nn.Parameter] = set()
        self._sync = True
        # The stitches of forwards since the last reduction: those whose gradients add up, and those whose backward pass
        # reduces.
        self._accumulated: dict[Stitch, None] = {}
        self._expected: dict[Stitch, None] = {}
        self._reduction: _Reduction | None = None
        _broadcast([*module.parameters(), *module.buffers()])
        self._watch()

    # A submodule under a second name would be in the state dict twice; a cached property is none.
    @cached_property
    def backbone(self) -> StitchedBackbone:
        """The stitched backbone inside the model."""
        return find_stitched_backbone(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns; the backward pass through it reduces gradients."""
        before = self.backbone.draws
        output = self.module(*args, **kwargs)
        if torch.is_grad_enabled() and self.backbone.draws > before:
            self._reduction = None  # of a backward pass that an error has ended
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
        """Lets the gradients of forwards inside add up on each rank instead of being reduced."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def train_step(self, data: dict | tuple | list, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step on a batch as of mmengine's models, with gradients reduced; returns the losses to log."""
        with optim_wrapper.optim_context(self):
            data = self.module.data_preprocessor(data, training=True)
            losses = self(**data, mode="loss") if isinstance(data, Mapping) else self(*data, mode="loss")
        loss, log_vars = self.module.parse_losses(losses)
        optim_wrapper.update_params(loss)
        return log_vars

    def val_step(self, data: dict | tuple | list) -> list:
        """The model's predictions; each rank has its own."""
        return self.module.val_step(data)

    def test_step(self, data: dict | tuple | list) -> list:
        """The model's predictions; each rank has its own."""
        return self.module.test_step(data)

    def _watch(self) -> None:
        """Has each gradient announced that a backward pass has added up."""
        # Parameters may outlive the wrapper and be wrapped again.
        wrapper = weakref.ref(self)

        def arrived(parameter: nn.Parameter) -> None:
            alive = wrapper()
            if alive is not None:
                alive._arrived(parameter)

        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(arrived)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._reduction is None and self._expected:
            self._begin()
        if self._reduction is not None:
            wrong = self._reduction.refuses(parameter)
            if wrong is None:
                self._reduction.add(parameter)
                # Heads have their gradients before the backbone has any. Until then nothing is launched: a head may
                # send messages of its own in the backward pass (SyncBN), and where a rank lacks a gradient, those and
                # buckets would not come in the same order on all ranks.
                if parameter not in self._outside:
                    self._reduction.launch()
                return
        elif self._accumulated:
            return
        else:
            wrong = (
                "a gradient, and no forward in training mode has gone through the wrapper since gradients were last "
                "reduced: call the wrapper, not its module, once for each backward pass, and checkpoint with "
                "use_reentrant=False"
            )
        name = next(name for name, p in self.module.named_parameters() if p is parameter)
        raise RuntimeError(f"StitchedDataParallel: {name} got {wrong}")

    def _begin(self) -> None:
        """Plans the reduction, at the first gradient of a backward pass."""
        expected = self._used_by(self._expected)
        earlier = [p for p in self._used_by(self._accumulated) if p not in expected]
        self._expected, self._accumulated = {}, {}
        order = [*reversed(earlier), *reversed(self._outside), *reversed(expected)]
        # What no rank had a gradient for the last time would keep all behind it from being reduced before the end.
        order.sort(key=self._unused.__contains__)
        self._reduction = reduction = _Reduction(order, self.bucket_cap_mb)
        Variable._execution_engine.queue_callback(partial(self._finish, reduction))
        for parameter in earlier:
            if parameter.grad is not None:
                reduction.add(parameter)

    def _finish(self, reduction: _Reduction) -> None:
        unused = reduction.finish()
        self._unused = (self._unused - reduction.bucket_of.keys()) | unused
        self._reduction = None

    def _used_by(self, stitches: Iterable[Stitch]) -> dict[nn.Parameter, None]:
        """What the stitches train, in the order of use."""
        for stitch in stitches:
            if stitch not in self._trained:
                self._trained[stitch] = self.backbone.trained_parameters(stitch)
        return dict.fromkeys(parameter for stitch in stitches for parameter in self._trained[stitch])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reduction": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()


class _Bucket:
    """Gradients of some parameters of one dtype and device, reduced together.

    Attributes:
        waiting: the parameters whose gradient has not arrived.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.waiting = set(parameters)

    @torch.no_grad()
    def launch(self) -> None:
        """Moves the gradients into one tensor, of which they are views from now on, and starts to reduce it. After them
        it has a flag for each parameter, in the end the part of the ranks that have its gradient; where there is none
        here, zeros stand for it."""
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = self.parameters[0].new_empty(sum(sizes) + len(sizes))
        *pieces, self._flags = flat.split([*sizes, len(sizes)])
        self._views = list(map(_laid_out, pieces, self.parameters))
        self._flags.fill_(1)
        self._lacking = [place for place, parameter in enumerate(self.parameters) if parameter.grad is None]
        if self._lacking:
            torch._foreach_zero_([tensor[place] for place in self._lacking for tensor in (self._views, self._flags)])
        held = [(p, view) for p, view in zip(self.parameters, self._views, strict=True) if p.grad is not None]
        if held:
            torch._foreach_copy_([view for _, view in held], [parameter.grad for parameter, _ in held])
        for parameter, view in held:
            parameter.grad = view
        # Before the sum, as DistributedDataParallel has it: to the bit the same, and out of the way of overflow.
        flat.mul_(1 / dist.get_world_size())
        self._work = dist.all_reduce(flat, async_op=True)

    def wait(self) -> list[nn.Parameter]:
        """Lets what is done from now on find the bucket reduced, and gives parameters their gradient that other ranks
        have one for; returns those that no rank has one for."""
        # With NCCL this makes the stream wait, not the process; reading flags does, where a gradient is lacking.
        self._work.wait()
        ranks = self._flags.tolist() if self._lacking else []
        for place in self._lacking:
            if ranks[place]:
                self.parameters[place].grad = self._views[place]
        return [self.parameters[place] for place in self._lacking if not ranks[place]]


class _Reduction:
    """The reduction of the gradients of one backward pass.

    Ranks reduce the same buckets in the same order, whenever each has them filled. What is left at the end of the
    backward pass is launched then.

    Args:
        order: the parameters, in the order in which their gradients are to be expected.
        cap: the size from which on a bucket is full, in MiB.

    Attributes:
        bucket_of: the bucket of each parameter.
    """

    def __init__(self, order: Iterable[nn.Parameter], cap: float) -> None:
        self._buckets = [_Bucket(parameters) for parameters in _divided(order, cap * 2**20)]
        self._launched = 0
        self.bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}

    def refuses(self, parameter: nn.Parameter) -> str | None:
        """What is wrong with a gradient that has arrived; None if nothing is."""
        bucket = self.bucket_of.get(parameter)
        if bucket is None:
            return (
                "a gradient, though no stitch drawn since the last reduction uses it: a model may use the parameters "
                "of its backbone by the backbone's forward only"
            )
        if parameter not in bucket.waiting:
            return (
                "a second gradient after the one that is being reduced: let one backward pass follow each forward, "
                "and checkpoint with use_reentrant=False"
            )
        return None

    def add(self, parameter: nn.Parameter) -> None:
        """Takes note of a gradient that has arrived."""
        self.bucket_of[parameter].waiting.remove(parameter)

    def launch(self) -> None:
        """Starts to reduce the buckets that are full, up to the first that is not."""
        while self._launched < len(self._buckets) and not self._buckets[self._launched].waiting:
            self._buckets[self._launched].launch()
            self._launched += 1

    def finish(self) -> set[nn.Parameter]:
        """Reduces what is left, and returns the parameters that no rank has a gradient for."""
        for bucket in self._buckets[self._launched :]:
            bucket.launch()
        return {parameter for bucket in self._buckets for parameter in bucket.wait()}


def _laid_out(piece: Tensor, parameter: nn.Parameter) -> Tensor:
    """A piece (N,) of a bucket in the shape of a parameter, and in its memory layout, which fused optimizers want."""
    if parameter.is_contiguous():
        return piece.view(parameter.shape)
    return piece.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())


def _divided(order: Iterable[nn.Parameter], cap: float) -> list[list[nn.Parameter]]:
    """Parameters in buckets of one dtype and device, each closed when it has reached ``cap`` bytes; in the order in
    which they are closed."""
    closed: list[list[nn.Parameter]] = []
    opened: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in order:
        kind = parameter.dtype, parameter.device
        opened.setdefault(kind, []).append(parameter)
        sizes[kind] = sizes.get(kind, 0) + parameter.numel() * parameter.element_size()
        if sizes[kind] >= cap:
            closed.append(opened.pop(kind))
            del sizes[kind]
    return [*closed, *opened.values()]


@torch.no_grad()
def _broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the values of rank 0."""
    for tensor in tensors:
        dense = tensor.contiguous()
        dist.broadcast(dense, 0)
        if dense is not tensor:
            tensor.copy_(dense)
