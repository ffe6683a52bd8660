"""Loops that train so that a resumed run is the run that was not interrupted, bit for bit on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine import dist
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmsnnet.engine.agreement import check_loader, check_same_classes, sizes_explained
from mmsnnet.engine.hooks.resume_hook import ResumeHook
from mmsnnet.engine.randomness import hashed, seed_generators
from mmsnnet.engine.ranks import fail_together
from mmsnnet.engine.runner.seeded_loading import seeded_loader
from mmsnnet.engine.runner.stitch_passes import refuse_uneven_batches
from mmsnnet.engine.strategies import FSDPStrategy
from mmsnnet.errors import SettingError
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.registry import LOOPS

# What checkpoints record of a run, in the message hub.
EPOCH_BEGAN = "epoch_began"
RANKS = "ranks"


class _StitchTrainLoop:
    """What both loops add to mmengine's. A checkpoint holds no random states, since none outlives an iteration:

    - each iteration starts from states seeded by the run's seed, the rank and the iteration's number, whatever
      validation, hooks or the loading of data drew before it;
    - each training sample starts from states seeded by the run's seed, the epoch and the sample's number over all ranks
      (:mod:`mmsnnet.engine.runner.seeded_loading`), so that neither the number of workers nor how samples are shared
      out over ranks matters;
    - a resumed run draws the indices that were trained with again, without loading them, in the middle of an epoch too,
      and with the seed that the checkpoint recorded, where the config has none.

    What the loops cannot know is what transforms and preprocessors keep from one sample to the next: RTMDet's cached
    mosaic has a cache in each worker, ``BatchSyncRandomResize`` of mmdet a size for some iterations. A resumed run
    begins without.
    """

    runner: Runner
    dataloader: DataLoader
    stitches_per_step: int
    _iter: int
    _epoch: int
    _max_iters: int

    def _seeded(self, runner: Runner, dataloader: DataLoader | dict, endless: bool) -> DataLoader:
        _refuse_stock_sharding(runner)
        if not any(isinstance(hook, ResumeHook) for hook in runner.hooks):
            runner.register_hook(ResumeHook())
        if isinstance(dataloader, dict):
            # With diff_rank_seed mmengine would give samplers a random seed, which nothing records.
            dataloader = runner.build_dataloader(dataloader, seed=_shared_seed(runner))
        loader = seeded_loader(dataloader, *dist.get_dist_info(), endless=endless)
        # A sampler that a config gives a seed of its own keeps it.
        self._sampler_follows = getattr(loader.batch_sampler.sampler, "seed", None) == _shared_seed(runner)
        return loader

    def _set_stitches_per_step(self, number: int) -> None:
        if number < 1:
            raise ValueError(f"stitches_per_step is the number of stitches of an iteration, 1 or more; got {number}")
        self.stitches_per_step = number

    def run(self) -> nn.Module:
        # Only now is it known which seed a checkpoint has recorded.
        batches = self.dataloader.batch_sampler
        batches.seed = _shared_seed(self.runner)
        if self._sampler_follows:
            batches.sampler.seed = batches.seed
        with fail_together():
            check_loader(self.runner.model, self.dataloader, "train_dataloader", training=True)
            if self.runner.val_loop is not None:  # rather than after hours of training
                check_loader(self.runner.model, self.runner.val_loop.dataloader, "val_dataloader")
                check_same_classes(self.dataloader, self.runner.val_loop.dataloader)
            if self._max_iters < 1:
                raise SettingError("train_cfg has no iteration to train: set max_iters, or max_epochs, to 1 or more")
        self._warn_of_other_ranks()
        self._warn_of_lost_gradients()
        if self.runner.val_loop is not None:  # rather than after hours of training
            refuse_uneven_batches(self.runner.model, self.runner.val_loop.dataloader, "val")
        if self.stitches_per_step == 1:
            return super().run()

        wrapper = self.runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper) or isinstance(wrapper, OptimWrapperDict):
            raise TypeError(
                "stitches_per_step adds up gradients by mmengine's gradient accumulation, which "
                f"{type(wrapper).__name__} lacks: set train_cfg.stitches_per_step=1"
            )
        find_stitched_backbone(self.runner.model).stitches_per_step = self.stitches_per_step
        accumulative_counts = wrapper._accumulative_counts
        try:
            wrapper._accumulative_counts *= self.stitches_per_step
            counts = (self._iter * self.stitches_per_step, self._max_iters * self.stitches_per_step)
            wrapper.initialize_count_status(self.runner.model, *counts)
            return super().run()
        finally:
            wrapper._accumulative_counts = accumulative_counts

    def _warn_of_other_ranks(self) -> None:
        """A run of another number of ranks has other batches, in another order."""
        hub, now = self.runner.message_hub, dist.get_world_size()
        before = hub.get_info(RANKS, now)
        if before != now:
            self.runner.logger.warning(
                f"This run was trained by {before} processes and goes on with {now}: batches have {now}/{before} "
                f"of their size now, and data another order. To go on exactly, train with {before}; otherwise set "
                "train_dataloader.batch_size, or the learning rate, accordingly."
            )
        hub.update_info(RANKS, now)

    def _warn_of_lost_gradients(self) -> None:
        """A checkpoint does not hold gradients that wait for an update."""
        every = getattr(self.runner.optim_wrapper, "_accumulative_counts", 1)
        for hook in self.runner.hooks:
            if not isinstance(hook, CheckpointHook) or hook.interval < 1:
                continue
            if hook.by_epoch and self.dataloader.batch_sampler.endless:  # its only epoch is the whole run
                continue
            iterations = hook.interval * (len(self.dataloader) if hook.by_epoch else 1)
            if iterations % every:
                self.runner.logger.warning(
                    f"Checkpoints are written every {iterations} iterations, weights updated every {every}: a run that "
                    "is resumed in between loses the gradients added up so far. Set the interval of "
                    f"{type(hook).__name__} so that it is a multiple of optim_wrapper.accumulative_counts."
                )

    def _iterate(self, batch_idx: int, data_batch: Any) -> None:
        """One iteration; ``batch_idx`` is what hooks are told."""
        _seed_iteration(hashed(self.runner.seed, dist.get_rank(), "iteration", self._iter))
        self.runner.call_hook("before_train_iter", batch_idx=batch_idx, data_batch=data_batch)
        outputs = self._train_step(data_batch)
        self.runner.call_hook("after_train_iter", batch_idx=batch_idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    def _train_step(self, data_batch: Any) -> dict[str, Tensor]:
        """The losses of an iteration; of several stitches, each loss's mean over them."""
        model, wrapper = self.runner.model, self.runner.optim_wrapper
        explained = sizes_explained(model, data_batch, True, "train_dataloader")
        if self.stitches_per_step == 1:
            with explained:
                return model.train_step(data_batch, optim_wrapper=wrapper)
        summed = _Summed(wrapper, self.stitches_per_step)
        with explained, _preprocessed_once(unwrapped_model(model).data_preprocessor):
            passes = [model.train_step(data_batch, optim_wrapper=summed) for _ in range(self.stitches_per_step)]
        return _means(passes)


@LOOPS.register_module()
class StitchIterBasedTrainLoop(_StitchTrainLoop, IterBasedTrainLoop):
    """mmengine's ``IterBasedTrainLoop`` for stitched models, which resumes exactly and trains several stitches in each
    iteration, if told to. Hooks see what they see of mmengine's loop.

    A finite sampler goes on with its next epoch without a pause, and workers stay as they are.

    Args:
        runner, dataloader, max_iters, val_begin, val_interval, dynamic_intervals: as of mmengine's loop.
        stitches_per_step: so many stitches are trained on each batch, one after the other, and their gradients summed:
            with two or more the cheapest, the costliest, and the others drawn (the sandwich rule, arXiv 1903.05134).
            Hooks see one iteration, with each loss's mean over the stitches. With gradient accumulation weights are
            still updated every ``accumulative_counts`` iterations.

    Raises:
        TypeError, ValueError: what :func:`mmsnnet.engine.runner.seeded_loading.seeded_loader` refuses;
            ``stitches_per_step`` is below 1, or an optimizer wrapper cannot add up gradients.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
        stitches_per_step: int = 1,
    ) -> None:
        self._set_stitches_per_step(stitches_per_step)
        loader = self._seeded(runner, dataloader, endless=True)
        super().__init__(runner, loader, max_iters, val_begin, val_interval, dynamic_intervals)
        self.dataloader_iterator = _Batches(loader)

    def run_iter(self, data_batch: Any) -> None:
        self._iterate(self._iter, data_batch)


@LOOPS.register_module()
class StitchEpochBasedTrainLoop(_StitchTrainLoop, EpochBasedTrainLoop):
    """mmengine's ``EpochBasedTrainLoop`` for stitched models: as :class:`StitchIterBasedTrainLoop`. A run that is
    resumed from a checkpoint of the middle of an epoch goes on with the rest of it.

    Args:
        runner, dataloader, max_epochs, val_begin, val_interval, dynamic_intervals: as of mmengine's loop.
        stitches_per_step: as of :class:`StitchIterBasedTrainLoop`.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        max_epochs: int,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: list[tuple[int, int]] | None = None,
        stitches_per_step: int = 1,
    ) -> None:
        self._set_stitches_per_step(stitches_per_step)
        loader = self._seeded(runner, dataloader, endless=False)
        super().__init__(runner, loader, max_epochs, val_begin, val_interval, dynamic_intervals)

    def run_epoch(self) -> None:
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._done()
        self.dataloader.batch_sampler.epoch = self._epoch
        self.dataloader.batch_sampler.skip = done
        for batch_idx, data_batch in enumerate(self.dataloader, start=done):
            self.run_iter(batch_idx, data_batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _done(self) -> int:
        """How many batches of this epoch have been trained with. Checkpoints take the message hub along; with one of
        another loop's the epoch begins anew, as it does with mmengine's."""
        hub = self.runner.message_hub
        epoch, began = hub.get_info(EPOCH_BEGAN, (None, 0))
        if epoch != self._epoch:
            epoch, began = self._epoch, self._iter
        hub.update_info(EPOCH_BEGAN, (epoch, began))
        return self._iter - began

    def run_iter(self, idx: int, data_batch: Any) -> None:
        self._iterate(idx, data_batch)


class _Batches:
    """The batches of an endless loader. Workers start with the first one, when it is known where to go on."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Passes over so many batches without loading them, counted from the beginning of training."""
        self._loader.batch_sampler.skip = num_iters


class _Summed:
    """An optimizer wrapper that makes a sum over the passes of an iteration of what it has as a mean."""

    def __init__(self, wrapper: OptimWrapper, passes: int) -> None:
        self._wrapper = wrapper
        self._passes = passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def update_params(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._wrapper.update_params(loss * self._passes, *args, **kwargs)


@contextmanager
def _preprocessed_once(preprocessor: nn.Module) -> Iterator[None]:
    """Inside, a preprocessor works once, and gives a copy of what came of it to each call: one batch, augmentations of
    the whole batch included. A copy, since heads work in place on data samples."""
    preprocess, made = preprocessor.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(preprocess(*args, **kwargs))
        return copy.deepcopy(made[0])

    preprocessor.forward = forward
    try:
        yield
    finally:
        del preprocessor.forward


def _means(passes: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each loss over the passes that have it."""
    names = dict.fromkeys(name for losses in passes for name in losses)
    return {name: torch.stack([losses[name].detach() for losses in passes if name in losses]).mean(0) for name in names}


def _refuse_stock_sharding(runner: Runner) -> None:
    """Looks at the strategy before there is a model, which stock sharding may not even get to wrap."""
    strategy = getattr(runner, "strategy", None)  # a FlexibleRunner's
    if isinstance(strategy, MMEngineFSDPStrategy) and not isinstance(strategy, FSDPStrategy):
        raise TypeError(
            "mmengine's FSDPStrategy moves what a stitch does not use, and cannot resume: set "
            "strategy=dict(type='mmsnnet.FSDPStrategy')"
        )


def _shared_seed(runner: Runner) -> int:
    """The run's seed on all ranks, where those of ``diff_rank_seed`` start."""
    return runner.seed - (dist.get_rank() if runner._randomness_cfg.get("diff_rank_seed", False) else 0)


def _seed_iteration(seed: int) -> None:
    seed_generators(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
