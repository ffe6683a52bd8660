from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from textwrap import shorten
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmsnnet.engine.sharding import is_sharded
from mmsnnet.errors import UserError
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.registry import HOOKS
from mmsnnet.stitching import StitchSampler

CHUNK = 1 << 20  # 8 MiB of products, which fit into a CPU's cache


@dataclass(frozen=True)
class Iteration:
    """The stitches that one training iteration ran on this rank."""

    number: int  # from 1, as in the log
    draws: int  # of the backbone so far, with this iteration's
    stitches: tuple[str, ...]  # names, in order

    def __str__(self) -> str:
        """The stitches and the numbers of their draws: ``S, L5-S3-L12 (draws 6, 7)``."""
        if not self.stitches:
            return "no stitch"
        draws = range(self.draws - len(self.stitches), self.draws)
        return f"{', '.join(self.stitches)} (draw{'s' * (len(draws) > 1)} {', '.join(map(str, draws))})"


@dataclass(frozen=True)
class Fault:
    """The first losses of a rank that are not finite."""

    iteration: Iteration
    losses: Mapping[str, float]


@dataclass(frozen=True)
class RankRecord:
    """The state of a rank that a check compares, beside the bits of the weights."""

    parameters: tuple[str, ...]  # a line for each: name, shape, dtype, and whether it is trained
    sampler: StitchSampler
    draws: int
    iterations: tuple[Iteration, ...]  # since the last check
    fault: Fault | None  # the first one since the last check


class NotFiniteError(UserError, FloatingPointError):
    """A loss is infinite or not a number. All ranks raise this with one message."""


class RanksDifferError(UserError, RuntimeError):
    """The ranks are not equal. All ranks raise this with one message."""


@HOOKS.register_module()
class ConsistencyHook(Hook):
    """Stop training if the ranks differ or a loss is not finite.

    All ranks stop with the same error, which names the cause. The hook checks before the first iteration, every
    ``interval`` iterations, before each checkpoint and at the end. A check compares between the ranks, in this order:
    the parameters' names, shapes, dtypes and which of them are trained; the sampler; the stitches of each iteration
    since the last check; and the bits of the parameters. All losses since the last check have to be finite, so no
    checkpoint is written after one that was not. Buffers are not compared, because each rank has its own running
    statistics of plain batch norm.

    A check reads every parameter once, and exchanges a checksum and a line of text for each. Between two checks the
    hook neither waits for the device nor sends a message: it reads the losses that mmengine's ``RuntimeInfoHook`` has
    just logged. In one process it checks only the losses. The bits of sharded parameters are not compared; the log says
    so once.

    fp16 training whose scaled gradients overflow passes: its loss is finite, and the optimizer skips the step.

    Args:
        interval: iterations from one check to the next.

    Raises:
        RanksDifferError: the ranks differ; the message names the first parameter, field of the sampler or iteration
            that differs.
        NotFiniteError: a loss is infinite or not a number; the message names it, its rank, iteration and stitch.
    """

    priority = "LOW"  # after RuntimeInfoHook, which logs the losses, and StitchInitHook; before CheckpointHook

    def __init__(self, interval: int = 100) -> None:
        if interval < 1:
            raise ValueError(f"ConsistencyHook: interval must be at least 1, got {interval}")
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        self._backbone = find_stitched_backbone(runner.model)
        self._draws = self._backbone.draws
        # Without the hook, the log has at most the losses of a run that was resumed.
        self._is_logged = any(isinstance(hook, RuntimeInfoHook) for hook in runner.hooks)
        self._iteration = runner.iter
        self._iterations: list[Iteration] = []
        self._fault: Fault | None = None
        start = time.monotonic()
        self._check(runner)
        if (ranks := dist.get_world_size()) > 1:
            but = "; their weights are sharded and not compared" if is_sharded(runner.model) else ""
            seconds = time.monotonic() - start
            runner.logger.info(f"ConsistencyHook: {ranks} ranks start alike{but} (checked in {seconds:.1f} s)")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        backbone = self._backbone
        # The backbone records only its last draw. The sampler repeats earlier ones of the same iteration.
        stitches = [backbone.space[backbone.sampler().draw(n)] for n in range(self._draws, backbone.draws - 1)]
        if backbone.drawn is not None and backbone.draws != self._draws:
            stitches.append(backbone.drawn)
        self._draws = backbone.draws
        self._iteration = runner.iter + 1
        iteration = Iteration(self._iteration, backbone.draws, tuple(stitch.name for stitch in stitches))
        self._iterations.append(iteration)
        # From the log, which has the values on the host already: reading `outputs` would wait for the device again.
        log = runner.message_hub.log_scalars if self._is_logged else {}
        losses = {
            name: float(log[f"train/{name}"].current() if f"train/{name}" in log else value)
            for name, value in (outputs or {}).items()
            if "loss" in name
        }
        wrong = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if wrong and self._fault is None:
            self._fault = Fault(iteration, wrong)
        if self.every_n_train_iters(runner, self.interval):
            self._check(runner)

    def before_checkpoint(self, runner: Runner) -> None:
        """:class:`AtomicCheckpointHook` calls this on all ranks before it writes anything."""
        self._check(runner)

    def after_train(self, runner: Runner) -> None:
        self._check(runner)

    def _check(self, runner: Runner) -> None:
        sharded = is_sharded(runner.model)
        parameters = list(unwrapped_model(runner.model).named_parameters())
        lines = tuple(_description(name, parameter, sharded) for name, parameter in parameters)
        record = RankRecord(lines, self._backbone.sampler(), self._draws, tuple(self._iterations), self._fault)
        records = dist.all_gather_object(record)
        _compare_records(records)
        if faults := {rank: other.fault for rank, other in enumerate(records) if other.fault is not None}:
            # Before the weights, because what is not a number spreads to them.
            raise NotFiniteError(_not_finite(faults))
        if len(records) > 1 and not sharded:
            _compare_bits(parameters, self._iteration)
        self._iterations.clear()


@torch.no_grad()
def bit_checksum(tensor: Tensor, chunk: int = CHUNK) -> Tensor:
    """Checksum of the bits of a tensor's elements, in their order.

    It is an int64 scalar on the tensor's device. With ``b_i`` the words of at most 32 bits that the elements
    consist of, it is the sum of ``b_i w_i`` modulo 2^64. The ``w_i`` are random and odd. Tensors that differ in one
    word always differ in their checksums, even if only by the sign of a zero or the payload of a NaN. Other tensors,
    such as the same words in another order, have equal checksums with a probability of about 2^-32. Strides do not
    count. It works on ``chunk`` words at a time.
    """
    word = {1: torch.int8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    words = tensor.detach().reshape(-1).view(word)
    weights = _weights(words.device, chunk)
    total, *sums = (part.long().mul_(weights[: len(part)]).sum() for part in words.split(chunk))
    for part in sums:
        total = total * 0x5851F42D4C957F2D + part  # an odd factor keeps all bits, and makes the order of chunks count
    return total


@cache
def _weights(device: torch.device, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (number,), generator=generator) | 1).to(device)


def _compare_bits(parameters: Sequence[tuple[str, nn.Parameter]], iteration: int) -> None:
    """Raise RanksDifferError if a parameter has other bits on another rank."""
    device = parameters[0][1].device
    checksums = torch.stack([bit_checksum(parameter).to(device) for _, parameter in parameters])
    of_parameters = torch.stack(dist.all_gather(checksums)).T.tolist()
    differing = [index for index, of_ranks in enumerate(of_parameters) if len(set(of_ranks)) > 1]
    if not differing:
        return
    name, parameter = parameters[differing[0]]
    raise RanksDifferError(
        f"the ranks have different weights at iteration {iteration}: {_parties(of_parameters[differing[0]])} differ in "
        f"{name} {tuple(parameter.shape)}, the first of {len(differing)} parameters out of {len(parameters)} that "
        "differ. Either something changes weights on some ranks only, such as a hook, or gradients are not reduced "
        "(see model_wrapper_cfg). --resume continues from the last checkpoint"
    )


def _description(name: str, parameter: Tensor, sharded: bool) -> str:
    """A parameter's properties that are equal on all ranks, without a sharded part's shape."""
    shape = "" if sharded else f"{tuple(parameter.shape)} "
    return f"{name} {shape}{parameter.dtype} {'trained' if parameter.requires_grad else 'frozen'}"


def _parties(values: Sequence[Any]) -> str:
    """The ranks grouped by equal values: ``ranks 0, 2 and rank 1``."""
    parties: dict[Any, list[str]] = {}
    for rank, value in enumerate(values):
        parties.setdefault(value, []).append(str(rank))
    return " and ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for ranks in parties.values())


def _compare_records(records: Sequence[RankRecord]) -> None:
    """Raise RanksDifferError for the first field in which a rank differs from rank 0."""
    first = records[0]
    for field, describe in (
        ("parameters", _different_parameters),
        ("sampler", _different_samplers),
        ("draws", _different_draws),
        ("iterations", _different_draws),
    ):
        for rank, other in enumerate(records):
            if getattr(other, field) != getattr(first, field):
                raise RanksDifferError(describe(first, other, rank))


def _different_parameters(first: RankRecord, other: RankRecord, rank: int) -> str:
    pairs = zip_longest(first.parameters, other.parameters, fillvalue="none more")
    left, right = next(pair for pair in pairs if pair[0] != pair[1])
    return (
        f"the ranks have different parameters: rank 0 has {left}; rank {rank} has {right}. All ranks need the same "
        "config, code and versions"
    )


def _different_samplers(first: RankRecord, other: RankRecord, rank: int) -> str:
    left, right = vars(first.sampler), vars(other.sampler)
    name = next(name for name in left if left[name] != right[name])
    values = [shorten(str(fields[name]), 300) for fields in (left, right)]
    return (
        f"the ranks would draw different stitches: {name} of the sampler is {values[0]} on rank 0, {values[1]} on rank "
        f"{rank}. All ranks need the same config (flops_step, seed, out_indices and img_size of StitchedViT), code and "
        "versions"
    )


def _different_draws(first: RankRecord, other: RankRecord, rank: int) -> str:
    for left, right in zip(first.iterations, other.iterations, strict=False):
        if left != right:
            where = f"in iteration {left.number} rank 0 ran {left}, rank {rank} {right}"
            break
    else:
        where = f"the number of draws so far is {first.draws} on rank 0, {other.draws} on rank {rank}"
    return (
        f"the ranks drew different stitches: {where}. In training, every rank has to call the backbone as often as the "
        "others, and all ranks have to resume from the same checkpoint"
    )


def _not_finite(faults: Mapping[int, Fault]) -> str:
    """The message for the first fault, from the faults by rank."""
    rank, fault = min(faults.items(), key=lambda item: (item[1].iteration.number, item[0]))
    # `loss`, the sum of all, tells least about the cause.
    name = next((name for name in fault.losses if name != "loss"), "loss")
    return (
        f"{name} is {fault.losses[name]} at iteration {fault.iteration.number} on rank {rank}, which ran "
        f"{fault.iteration}. Try a lower learning rate, a longer warm-up, optim_wrapper.clip_grad, or bfloat16 instead "
        "of float16, and look at the images and labels of this iteration. --resume continues from the last checkpoint"
    )
