from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from textwrap import shorten
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from mmsnnet.engine.hooks.device_scalars import DeviceScalars
from mmsnnet.errors import UserError
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.registry import HOOKS
from mmsnnet.stitching import StitchSampler

CHUNK = 1 << 20  # 8 MiB of products, which a CPU's cache holds


@dataclass(frozen=True)
class Iteration:
    """What one training iteration ran.

    Attributes:
        number: as the log and checkpoints count.
        draws: of the backbone, this iteration's included.
        stitches: ids of those that the iteration drew, in order.
    """

    number: int
    draws: int
    stitches: tuple[int, ...]

    def said(self, names: Mapping[int, str]) -> str:
        """The stitches by their names, and which draws they were: ``S, L5-S3-L12 (draws 6, 7)``."""
        if not self.stitches:
            return "no stitch"
        draws = range(self.draws - len(self.stitches), self.draws)
        stitches = ", ".join(names[id_] for id_ in self.stitches)
        return f"{stitches} (draw{'s' * (len(draws) > 1)} {', '.join(map(str, draws))})"


@dataclass(frozen=True)
class Fault:
    """The first losses of one rank that are not finite, by name, and what that iteration ran there."""

    iteration: int
    stitches: str
    losses: Mapping[str, float]


class NotFiniteError(UserError, FloatingPointError):
    """A loss is infinite or not a number, on whichever rank: all ranks say the same."""


class RanksDifferError(UserError, RuntimeError):
    """The ranks have come apart: all of them say the same."""


@HOOKS.register_module()
class ConsistencyHook(Hook):
    """Stops training, on all ranks and with the cause, where the ranks have come apart or a loss is not finite.

    It checks before the first iteration, every ``interval`` iterations, before each checkpoint and at the end. A check
    compares between the ranks, in this order: the parameters' names, shapes, dtypes and which of them are trained; the
    sampler; what each iteration since the last check drew; and the bits of the parameters. The losses of all these
    iterations have to be finite, so that no checkpoint is written after one that was not. Buffers are not compared: the
    running statistics of plain batch norm are each rank's own.

    Between two checks nothing waits for the device and no message is sent. A check reads every parameter once and
    exchanges 16 bytes for each. In one process only the losses are looked at. The bits of parameters that are sharded
    over the ranks (FSDP) are not compared; the log says so, once.

    fp16 training whose scaled gradients overflow is in order: its loss is finite, and the optimizer skips the step.

    Args:
        interval: iterations from one check to the next.

    Raises:
        RanksDifferError: the ranks differ; the message names the first parameter, the sampler's field or the iteration
            in which they do.
        NotFiniteError: a loss is infinite or not a number; the message names it, its rank, iteration and stitch.
    """

    priority = "LOW"  # after StitchInitHook and the logger, before mmengine's CheckpointHook

    def __init__(self, interval: int = 100) -> None:
        if interval < 1:
            raise ValueError(f"interval is at least 1, got {interval}")
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        self._backbone = find_stitched_backbone(runner.model)
        self._names = {stitch.id: stitch.name for stitch in self._backbone.space}
        self._draws = self._backbone.draws
        self._iteration = runner.iter
        self._iterations: list[Iteration] = []
        self._losses = DeviceScalars()
        start = time.monotonic()
        self._check(runner)
        if (ranks := dist.get_world_size()) > 1:
            but = ", but for the weights, which are sharded and not compared" if _sharded(runner.model) else ""
            seconds = time.monotonic() - start
            runner.logger.info(f"ConsistencyHook: {ranks} ranks start alike{but} (checked in {seconds:.1f} s)")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        backbone = self._backbone
        # The backbone remembers its last draw alone; those before it in the same iteration are the sampler's.
        stitches = tuple(backbone.sampler().draw(n) for n in range(self._draws, backbone.draws - 1))
        if backbone.drawn is not None and backbone.draws != self._draws:
            stitches += (backbone.drawn.id,)
        self._draws = backbone.draws
        self._iteration = runner.iter + 1
        self._iterations.append(Iteration(self._iteration, backbone.draws, stitches))
        self._losses.put({name: value for name, value in (outputs or {}).items() if "loss" in name})
        if self.every_n_train_iters(runner, self.interval):
            self._check(runner)

    def before_checkpoint(self, runner: Runner) -> None:
        """Called on all ranks by :class:`AtomicCheckpointHook`, before anything is written."""
        self._check(runner)

    def after_train(self, runner: Runner) -> None:
        self._check(runner)

    def _check(self, runner: Runner) -> None:
        fault = self._first_fault()
        faults = [fault] if dist.get_world_size() == 1 else self._compare(runner.model, fault)
        if any(faults):
            raise NotFiniteError(_not_finite(faults))
        self._iterations.clear()

    def _first_fault(self) -> Fault | None:
        for iteration, losses in zip(self._iterations, self._losses.fetch(), strict=True):
            if wrong := {name: value for name, value in losses.items() if not math.isfinite(value)}:
                return Fault(iteration.number, iteration.said(self._names), wrong)
        return None

    def _compare(self, model: nn.Module, fault: Fault | None) -> list[Fault | None]:
        """Raises RanksDifferError where the ranks differ, and returns the faults of all. Where there is one, weights
        are not compared: what is not a number spreads, and would be named in place of its cause."""
        sharded = _sharded(model)
        parameters = list(unwrapped_model(model).named_parameters())
        layout = [_description(name, parameter, sharded) for name, parameter in parameters]
        sampler = self._backbone.sampler()
        # Digests first, all of one size: what may differ in length is exchanged once all know that it differs.
        digests = (_digest(layout), _digest([repr(sampler)]), _digest(map(repr, (self._draws, *self._iterations))))
        ranks = dist.all_gather(torch.tensor([*digests, int(fault is not None)]))
        layouts, samplers, draws, faulty = torch.stack(ranks).T.tolist()
        if len(set(layouts)) > 1:
            raise RanksDifferError(_other_layout(dist.all_gather_object(layout)))
        if len(set(samplers)) > 1:
            raise RanksDifferError(_other_sampler(dist.all_gather_object(sampler)))
        if len(set(draws)) > 1:
            drawn = dist.all_gather_object((self._draws, tuple(self._iterations)))
            raise RanksDifferError(_other_draws(drawn, self._names))
        if any(faulty):
            return dist.all_gather_object(fault)
        if not sharded:
            _compare_bits(parameters, self._iteration)
        return []


@torch.no_grad()
def bit_checksum(tensor: Tensor, chunk: int = CHUNK) -> Tensor:
    """A checksum of the bits of a tensor's elements in their order, an int64 scalar on its device: with ``b_i`` the
    words of at most 32 bits that the elements are made of, the sum of ``b_i w_i`` modulo 2^64, the ``w_i`` random and
    odd.

    Tensors that differ in one word always differ in it, be it by the sign of a zero or the payload of a NaN; others,
    the same words in another order for one, but with a probability of about 2^-32. Strides do not count. It works on
    ``chunk`` words at a time.
    """
    word = {1: torch.int8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    words = tensor.detach().reshape(-1).view(word)
    weights = _weights(words.device, chunk)
    total, *sums = (part.long().mul_(weights[: len(part)]).sum() for part in words.split(chunk))
    for part in sums:
        total = total * 0x5851F42D4C957F2D + part  # an odd factor tells the parts apart, and loses no bit
    return total


@cache
def _weights(device: torch.device, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (number,), generator=generator) | 1).to(device)


def _compare_bits(parameters: Sequence[tuple[str, Tensor]], iteration: int) -> None:
    """Raises RanksDifferError where a parameter has other bits on another rank."""
    device = parameters[0][1].device
    own = torch.stack([bit_checksum(parameter).to(device) for _, parameter in parameters])
    extremes = torch.cat([own, ~own])  # the greatest of what is inverted is the least, inverted
    dist.all_reduce(extremes, "max")
    if torch.equal(extremes[: len(own)], ~extremes[len(own) :]):
        return
    sums = torch.stack(dist.all_gather(own)).T.tolist()
    differing = [index for index, of_ranks in enumerate(sums) if len(set(of_ranks)) > 1]
    name, parameter = parameters[differing[0]]
    raise RanksDifferError(
        f"the ranks hold other weights at iteration {iteration}: {_parties(sums[differing[0]])} differ in {name} "
        f"{tuple(parameter.shape)}, the first of {len(differing)} parameters out of {len(parameters)} that differ. "
        "Something changes weights on some ranks alone, a hook for one, or gradients are not reduced "
        "(model_wrapper_cfg). --resume goes on from the last checkpoint"
    )


def _sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def _description(name: str, parameter: Tensor, sharded: bool) -> str:
    """What all ranks have alike of a parameter; of a sharded one, each may hold a piece of another shape."""
    shape = "" if sharded else f"{tuple(parameter.shape)} "
    return f"{name} {shape}{parameter.dtype} {'trained' if parameter.requires_grad else 'frozen'}"


def _digest(lines: Iterable[str]) -> int:
    """An int64 that tells lists of lines apart."""
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _parties(values: Sequence[Any]) -> str:
    """Which ranks hold the same, for one value of each rank: ``ranks 0, 2 and rank 1``."""
    parties: dict[Any, list[str]] = {}
    for rank, value in enumerate(values):
        parties.setdefault(value, []).append(str(rank))
    return " and ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for ranks in parties.values())


def _first_other(values: Sequence[Any]) -> int:
    """The first rank that differs from rank 0."""
    return next(rank for rank, value in enumerate(values) if value != values[0])


def _other_layout(layouts: Sequence[Sequence[str]]) -> str:
    rank = _first_other(layouts)
    pairs = zip_longest(layouts[0], layouts[rank], fillvalue="none more")
    left, right = next(pair for pair in pairs if pair[0] != pair[1])
    return (
        f"the ranks have other parameters: rank 0 has {left}; rank {rank} has {right}. All ranks need the same config, "
        "code and versions"
    )


def _other_sampler(samplers: Sequence[StitchSampler]) -> str:
    rank = _first_other(samplers)
    left, right = vars(samplers[0]), vars(samplers[rank])
    name = next(name for name in left if left[name] != right[name])
    values = [shorten(str(fields[name]), 300) for fields in (left, right)]
    return (
        f"the ranks would draw other stitches: {name} of the sampler is {values[0]} on rank 0, {values[1]} on rank "
        f"{rank}. All ranks need the same config (flops_step, seed, out_indices and img_size of StitchedViT), code and "
        "versions"
    )


def _other_draws(drawn: Sequence[tuple[int, Sequence[Iteration]]], names: Mapping[int, str]) -> str:
    rank = _first_other(drawn)
    for left, right in zip(drawn[0][1], drawn[rank][1], strict=False):
        if left != right:
            where = f"in iteration {left.number} rank 0 ran {left.said(names)}, rank {rank} {right.said(names)}"
            break
    else:
        where = f"the draws so far are {drawn[0][0]} on rank 0, {drawn[rank][0]} on rank {rank}"
    return (
        f"the ranks drew other stitches: {where}. In training mode every rank has to run the backbone as often as the "
        "others, and all have to go on from the same checkpoint"
    )


def _not_finite(faults: Sequence[Fault | None]) -> str:
    found = [(fault.iteration, rank, fault) for rank, fault in enumerate(faults) if fault is not None]
    iteration, rank, fault = min(found, key=lambda entry: entry[:2])
    # The sum of all losses, which comes first, says the least.
    name = next((name for name in fault.losses if name != "loss"), "loss")
    return (
        f"{name} is {fault.losses[name]} at iteration {iteration} on rank {rank}, which ran {fault.stitches}. What may "
        "help: a lower learning rate, a longer warm-up, clip_grad of optim_wrapper, bfloat16 in place of float16, a "
        "look at the images and labels of this iteration. --resume goes on from the last checkpoint"
    )
