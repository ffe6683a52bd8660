"""Training loops that resume exactly, bit for bit on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from inspect import signature
from typing import Any, ClassVar

import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmsnnet.engine.agreement import check_loader, check_same_classes, sizes_explained
from mmsnnet.engine.distillation import Distillation
from mmsnnet.engine.hooks.narrow_draws_hook import DRAWN, NarrowDrawsHook
from mmsnnet.engine.hooks.resume_hook import ResumeHook
from mmsnnet.engine.hooks.validation_hook import ValidationHook
from mmsnnet.engine.mmengine_private import accumulative_counts, uses_rank_seeds
from mmsnnet.engine.randomness import hashed, seed_generators
from mmsnnet.engine.ranks import compare_loaders, fail_together
from mmsnnet.engine.resuming.records import EPOCH_BEGAN
from mmsnnet.engine.runner.seeded_loading import SeededBatchSampler, seeded_loader
from mmsnnet.engine.runner.train_step import several_stitches
from mmsnnet.engine.sharding import is_sharded, refuse_stock_sharding
from mmsnnet.errors import SettingError, check_keys, check_whole_number
from mmsnnet.models import StitchedBackbone
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.registry import LOOPS
from mmsnnet.stitching import StitchSampler


class _StitchTrainLoop(BaseLoop):
    """The part that both loops add to mmengine's.

    A checkpoint holds no random states, because none outlives an iteration:

    - each iteration starts from states seeded by the run's seed, the rank and the iteration's number, independent of
      the draws of validation, hooks and data loading;
    - each training sample starts from states seeded by the run's seed, the epoch and the sample's number over all ranks
      (:mod:`mmsnnet.engine.runner.seeded_loading`), independent of the number of workers and of the ranks' shares;
    - a resumed run draws the indices of past iterations again, without loading them, in the middle of an epoch too, and
      with the seed of the checkpoint if the config has none.

    The loops cannot restore the memory of transforms and preprocessors: RTMDet's cached mosaic keeps samples in each
    worker, mmdet's ``BatchSyncRandomResize`` a size for some iterations. A resumed run starts without it.
    """

    endless: ClassVar[bool]  # whether the run is one pass over the data loader
    dataloader: DataLoader
    batch_sampler: SeededBatchSampler  # the data loader's
    stitches_per_step: int
    distillation: Distillation | None
    _iter: int
    _epoch: int
    _max_iters: int

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        *args: Any,
        stitches_per_step: int = 1,
        distill: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_whole_number("train_cfg.stitches_per_step", stitches_per_step, 1)
        self.stitches_per_step = stitches_per_step
        self.distill, self.distillation = distill, None
        if distill is not None:
            if not isinstance(distill, Mapping):
                raise SettingError(f"train_cfg.distill is a dict of its settings, got {distill!r}")
            check_keys("train_cfg.distill", distill, tuple(signature(Distillation).parameters)[1:])
            if distill.get("teacher") is None and stitches_per_step == 1:
                raise SettingError(
                    "train_cfg.distill without a teacher lets the costliest stitch of a step teach the others: set "
                    "train_cfg.stitches_per_step to 3 or more, or train_cfg.distill.teacher"
                )
        refuse_stock_sharding(runner)
        for kind in (ResumeHook, ValidationHook):
            if not any(isinstance(hook, kind) for hook in runner.hooks):
                runner.register_hook(kind())
        # With diff_rank_seed, mmengine would give samplers a random seed, which nothing records.
        seed = _shared_seed(runner)
        loader: DataLoader = runner.build_dataloader(dataloader, seed) if isinstance(dataloader, dict) else dataloader
        loader, self.batch_sampler = seeded_loader(loader, dist.get_rank(), dist.get_world_size(), self.endless)
        # A sampler with a seed of its own in the config keeps it.
        self._sampler_follows = getattr(self.batch_sampler.sampler, "seed", None) == seed
        # mmengine's loop, which follows in the order of base classes.
        super().__init__(runner, loader, *args, **kwargs)

    def run(self) -> nn.Module:
        # The seed of a checkpoint is not known before.
        self.batch_sampler.seed = _shared_seed(self.runner)
        if self._sampler_follows:
            self.batch_sampler.sampler.seed = self.batch_sampler.seed
        self._check()
        self._warn_of_lost_gradients()
        for module in self.runner.model.modules():
            if isinstance(module, StitchedBackbone):
                module.stitches_per_step = self.stitches_per_step
                self._check_draws(module.sampler())  # reads draw_from, whose mistakes should show now
        narrows = any(isinstance(hook, NarrowDrawsHook) for hook in self.runner.hooks)
        if not narrows and self.runner.message_hub.get_info(DRAWN, None) is not None:
            self.runner.logger.warning(
                "The resumed run had narrowed its draws. Without NarrowDrawsHook in custom_hooks, this one draws all "
                "stitches that draw_from chooses."
            )
        if self.distill is not None:  # FlexibleRunner builds its loop before its model
            self.distillation = Distillation(unwrapped_model(self.runner.model), **self.distill)
            self.distillation.to(next(self.runner.model.parameters()).device)
        return super().run()

    def _check(self) -> None:
        """Check now what would fail later, in a validation hours from now too."""
        model, val_loop = self.runner.model, self.runner.val_loop
        with fail_together():
            check_loader(model, self.dataloader, "train_dataloader", training=True)
            if val_loop is not None:
                check_loader(model, val_loop.dataloader, "val_dataloader")
                check_same_classes(self.dataloader, val_loop.dataloader)
            if self._max_iters < 1:
                raise SettingError("train_cfg has no iteration to train: set max_iters, or max_epochs, to 1 or more")
        compare_loaders(self.dataloader, "train_dataloader", same_batches=not self.endless)
        if val_loop is not None:
            compare_loaders(val_loop.dataloader, "val_dataloader", same_batches=is_sharded(model))

    def _check_draws(self, sampler: StitchSampler) -> None:
        """Check that a step of several stitches trains several, and warn if it trains no others than two."""
        number = sum(map(len, sampler.bins))
        if self.stitches_per_step > 1 == number:
            raise SettingError(
                f"train_cfg.stitches_per_step={self.stitches_per_step} trains several stitches on a batch, and the "
                "model or its draw_from leaves one: set it to 1; a train_cfg.distill then needs a teacher"
            )
        if self.stitches_per_step == 2 < number:
            self.runner.logger.warning(
                f"train_cfg.stitches_per_step=2 trains the costliest and the cheapest of {number} stitches alone: set "
                "it to 3 or more to train the others too"
            )

    def _warn_of_lost_gradients(self) -> None:
        """Warn that a checkpoint does not hold accumulated gradients."""
        counts = accumulative_counts(self.runner.optim_wrapper)
        for hook in self.runner.hooks:
            if not isinstance(hook, CheckpointHook) or hook.interval < 1:
                continue
            if hook.by_epoch and self.endless:  # its only epoch is the whole run
                continue
            iterations = hook.interval * (len(self.dataloader) if hook.by_epoch else 1)
            if iterations % counts:
                self.runner.logger.warning(
                    f"Checkpoints are written every {iterations} iterations, weights updated every {counts}: a run "
                    "that resumes between two updates loses the gradients accumulated so far. Set the interval of "
                    f"{type(hook).__name__} to a multiple of optim_wrapper.accumulative_counts."
                )

    def _iterate(self, batch_idx: int, data_batch: Any) -> None:
        """Run one iteration; hooks get ``batch_idx``."""
        seed = hashed(self.runner.seed, dist.get_rank(), "iteration", self._iter)
        seed_generators(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
        self.runner.call_hook("before_train_iter", batch_idx=batch_idx, data_batch=data_batch)
        outputs = self._train_step(data_batch)
        self.runner.call_hook("after_train_iter", batch_idx=batch_idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    def _train_step(self, data_batch: Any) -> dict[str, Tensor]:
        """The losses of an iteration; with several stitches, each loss's mean over them."""
        model = self.runner.model
        single = self.stitches_per_step == 1 and self.distillation is None
        several = nullcontext() if single else several_stitches(model, self.distillation, self._iter)
        with sizes_explained(model, data_batch, True, "train_dataloader"), several:
            return model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)


@LOOPS.register_module()
class StitchIterBasedTrainLoop(_StitchTrainLoop, IterBasedTrainLoop):
    """mmengine's ``IterBasedTrainLoop`` for stitched models: resumes exactly, may train several stitches an iteration.

    It calls hooks as mmengine's loop does. A finite sampler continues with its next epoch without a pause, and workers
    stay alive.

    Args:
        runner, dataloader, max_iters, val_begin, val_interval, dynamic_intervals: as of mmengine's loop.
        stitches_per_step: how many stitches to train on each batch. With two or more, these are the costliest, the
            cheapest, and drawn ones (the sandwich rule, arXiv 1903.05134). Their losses are summed, and blocks at
            which they start alike run once (:func:`mmsnnet.engine.runner.train_step.several_stitches`). Hooks see one
            iteration, with each loss's mean over the stitches.
        distill: the arguments of :class:`mmsnnet.engine.distillation.Distillation`; None for no distillation.

    Raises:
        TypeError, ValueError: :func:`mmsnnet.engine.runner.seeded_loading.seeded_loader` refuses the data loader;
            ``stitches_per_step`` is no whole number of at least 1.
    """

    endless = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dataloader_iterator = _Batches(self.dataloader, self.batch_sampler)

    def run_iter(self, data_batch: Any) -> None:
        self._iterate(self._iter, data_batch)


@LOOPS.register_module()
class StitchEpochBasedTrainLoop(_StitchTrainLoop, EpochBasedTrainLoop):
    """mmengine's ``EpochBasedTrainLoop`` for stitched models, see :class:`StitchIterBasedTrainLoop`.

    A run that resumes from a checkpoint in the middle of an epoch continues with the rest of it.

    Args:
        runner, dataloader, max_epochs, val_begin, val_interval, dynamic_intervals: as of mmengine's loop.
        stitches_per_step, distill: as of :class:`StitchIterBasedTrainLoop`.
    """

    endless = False

    def run_epoch(self) -> None:
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        trained = self._trained_batches()
        self.batch_sampler.epoch, self.batch_sampler.skip = self._epoch, trained
        for batch_idx, data_batch in enumerate(self.dataloader, start=trained):
            self.run_iter(batch_idx, data_batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _trained_batches(self) -> int:
        """How many batches of this epoch the run has trained already.

        The message hub records it. A checkpoint of another loop has no such record. Then the epoch starts anew, as with
        mmengine's loop.
        """
        hub = self.runner.message_hub
        epoch, began = hub.get_info(EPOCH_BEGAN, (None, 0))
        if epoch != self._epoch:
            epoch, began = self._epoch, self._iter
        hub.update_info(EPOCH_BEGAN, (epoch, began))
        return self._iter - began

    def run_iter(self, idx: int, data_batch: Any) -> None:
        self._iterate(idx, data_batch)


class _Batches:
    """The batches of an endless loader.

    Workers start at the first batch, when a resumed run knows where to start.
    """

    def __init__(self, loader: DataLoader, batch_sampler: SeededBatchSampler) -> None:
        self._loader = loader
        self._batch_sampler = batch_sampler
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Skip this many batches from the start of training; mmengine calls this."""
        self._batch_sampler.skip = num_iters


def _shared_seed(runner: Runner) -> int:
    """The run's seed on all ranks. With ``diff_rank_seed`` it is the first rank's."""
    return runner.seed - (dist.get_rank() if uses_rank_seeds(runner) else 0)
