"""Recompute the running statistics of batch norms for each stitch.

Routes share the running statistics of their anchors, as in SN-Net (arXiv 2302.06586): training averages what all routes
bring into a batch norm. Recalibration replaces this average by the statistics of one route.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmsnnet.errors import SettingError
from mmsnnet.models.backbones import find_stitched_backbone
from mmsnnet.stitching import Stitch
from mmsnnet.stitching.network import evaluation_mode
from mmsnnet.stitching.route_parts import part_parameters

# The running mean and variance, each (C,), of some batch norms.
NormStatistics = Mapping[_BatchNorm, tuple[Tensor, Tensor]]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms with running statistics in a model, synchronised ones included.

    Raises:
        SettingError: there are none.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    if not norms:
        raise SettingError("the model has no BatchNorm, so there is nothing to recalibrate: leave out recalibrate")
    return norms


@torch.no_grad()
def recalibrate(
    model: nn.Module, stitches: Sequence[Stitch], batches: Iterable[Mapping[str, Any]], prefix_reuse: bool = True
) -> dict[Stitch, NormStatistics]:
    """The running statistics that batch norms have on each stitch alone, in backbone, neck and head.

    The model is in evaluation mode, except that a batch norm normalises with the statistics of the batch, as in
    training. Its new statistics are those of all values that enter it, over all batches together: their mean and
    unbiased variance. So one batch gives what a training step with ``momentum=1`` gives. The variance of several
    batches includes the differences of their means, and thus hardly depends on the batch size.

    The model stays as it is.

    Args:
        model: without wrappers.
        stitches: those to recalibrate.
        batches: arguments of the model, as its data preprocessor returns them; each stitch sees all of them.
        prefix_reuse: whether stitches share prefixes; the results are the same either way.

    Raises:
        SettingError: the model has no batch norms, or one saw a single value of each channel.
    """
    backbone = find_stitched_backbone(model)
    order, active = backbone.prefix_order(stitches), backbone.stitch
    weights = {
        stitch: {weight for part in backbone.parts(stitch) for weight in part_parameters(backbone.network, part)}
        for stitch in order
    }
    sums: dict[Stitch, dict[_BatchNorm, _Moments]] = {stitch: {} for stitch in order}
    try:
        with evaluation_mode(model), _batch_statistics(batch_norms(model)) as (moments, called):
            for batch in batches:
                with backbone.reuse_prefixes(order) if prefix_reuse else nullcontext():
                    for stitch in order:
                        backbone.set_stitch(stitch)
                        called.clear()
                        model(**batch, mode="tensor")
                        # Norms of a shared prefix ran for an earlier stitch. Their moments are still those of this
                        # prefix: in this order, only stitches with the same prefix have run since.
                        for norm in (n for n in moments if n in called or n.weight in weights[stitch]):
                            add_to = sums[stitch].get(norm)
                            sums[stitch][norm] = moments[norm] if add_to is None else add_to.merged(moments[norm])
    finally:
        backbone.set_stitch(active)
    return {stitch: {norm: of_norm.statistics(norm) for norm, of_norm in sums[stitch].items()} for stitch in stitches}


@contextmanager
def norm_statistics(statistics: NormStatistics) -> Iterator[None]:
    """Let batch norms have these running statistics; afterwards they have their own again."""
    own = {norm: _running(norm) for norm in statistics}
    try:
        for norm, values in statistics.items():
            norm.running_mean, norm.running_var = values
        yield
    finally:
        for norm, (mean, variance) in own.items():
            norm.running_mean, norm.running_var = mean, variance


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


@dataclass(frozen=True)
class _Moments:
    """The number of values of each channel, their mean (C,), and their sum of squared deviations from it (C,)."""

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Moments:
        """The moments of values (B, C, ...)."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))  # not in an autocast's precision
        others = [dim for dim in range(values.dim()) if dim != 1]
        mean = values.mean(others, keepdim=True)
        count = values.numel() // values.shape[1]
        # Two passes are as exact as torch.var_mean, and on a CPU more than twice as fast.
        return cls(count, mean.flatten().double(), (values - mean).square_().mean(others).double() * count)

    def merged(self, other: _Moments) -> _Moments:
        """The moments of both sets of values together (Chan et al., 1979)."""
        count, difference = self.count + other.count, other.mean - self.mean
        return _Moments(
            count,
            self.mean + difference * (other.count / count),
            self.deviations + other.deviations + difference.square() * (self.count * other.count / count),
        )

    def statistics(self, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
        """The mean and the unbiased variance, as ``norm`` keeps them."""
        if self.count < 2:
            raise SettingError(
                "a BatchNorm sees one value of each channel, which has no variance: recalibrate over more images"
            )
        return self.mean.to(norm.running_mean), (self.deviations / (self.count - 1)).to(norm.running_var)


@contextmanager
def _batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[tuple[dict[_BatchNorm, _Moments], set[_BatchNorm]]]:
    """Let batch norms in evaluation mode normalise with the statistics of each batch.

    Training mode would do so too, but it synchronises ``SyncBatchNorm`` over the ranks, which run the same images here.

    Yields:
        The moments of what entered each norm last, and the norms that were called. If a norm in this set, which the
        caller clears, is called again, as by a head for each map of a pyramid, then moments are those of all calls.
    """
    moments: dict[_BatchNorm, _Moments] = {}
    called: set[_BatchNorm] = set()

    def normalise_with_batch(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        batch = _Moments.of(inputs[0])
        norm.running_mean = batch.mean.to(norm.running_mean)
        norm.running_var = (batch.deviations / batch.count).to(norm.running_var)
        moments[norm] = moments[norm].merged(batch) if norm in called else batch
        called.add(norm)

    hooks = [norm.register_forward_pre_hook(normalise_with_batch) for norm in norms]
    try:
        with norm_statistics({norm: _running(norm) for norm in norms}):
            yield moments, called
    finally:
        for hook in hooks:
            hook.remove()
