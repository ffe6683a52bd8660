from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from mmsnnet.engine.mmengine_private import AnyRunner, accumulative_counts, randomness, training_loop
from mmsnnet.engine.resuming.difference import Difference, is_number, kept, refused, replaced
from mmsnnet.engine.resuming.optimizers import named_wrappers
from mmsnnet.engine.resuming.schedules import scheduler_types
from mmsnnet.engine.resuming.settings import describe_settings
from mmsnnet.models import StitchedBackbone
from mmsnnet.stitching import flops_bins

Record = dict[str, Any]

# The key in a checkpoint's meta for the record that describe_run makes.
RECORD = "training"
# A record in the message hub: the current epoch of an epoch-based loop, and the iteration in which it began.
EPOCH_BEGAN = "epoch_began"

EPOCHS, ITERATIONS = "epochs", "iterations"
# The most samples of a data set whose file names go into its digest.
MOST_NAMES = 64
# The facts that decide how many iterations an epoch has.
STEPS = ("train_cfg", "train_dataloader.dataset", "train_dataloader.batch_size")
OTHER_ORDER = ", so data has another order"
# The consequence of a difference in a recorded fact, by the setting's name.
CONSEQUENCES = {
    "train_dataloader.dataset": ", so the run sees other data",
    "train_dataloader.batch_size": OTHER_ORDER,
    "train_dataloader.sampler": OTHER_ORDER,
    "train_cfg.stitches_per_step": ", so other stitches are drawn",
    "model.backbone.seed": ", so other stitches are drawn",
    "model.backbone.flops_step": ", so other stitches are drawn",
    "model.backbone.draw_from": ", so other stitches are drawn",
}


def describe_run(runner: AnyRunner) -> Record:
    """The record of a run in its checkpoints: plain values by setting.

    ``optimizer`` and ``param_scheduler`` are the types; ``facts`` are properties of the loop, the data and the sampling
    of stitches; ``settings`` is the rest of the config that training reads.
    """
    wrappers = named_wrappers(runner.optim_wrapper)
    return dict(
        optimizer={setting: type(wrapper.optimizer).__name__ for setting, wrapper in wrappers.items()},
        param_scheduler=scheduler_types(runner.param_schedulers),
        facts=_facts(runner),
        settings=describe_settings(runner.cfg),
    )


def check_progress(runner: AnyRunner, checkpoint: Mapping[str, Any]) -> Iterator[Difference]:
    """Refuse an epoch, an iteration, a seed or a best score that no run records."""
    meta = checkpoint["meta"]
    named = checkpoint["message_hub"] | {"ema_state_dict": checkpoint.get("ema_state_dict") or {}}
    for key, value in named.items():
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            yield refused(f"{key}: the checkpoint has no dict of names there")
            return
    record = named["runtime_info"]
    recorded, configured = meta.get(RECORD, {}).get("facts", {}), _facts(runner)
    began = record.get(EPOCH_BEGAN, (0, 0))
    if not (isinstance(began, tuple) and [type(number) for number in began] == [int, int] and min(began) >= 0):
        yield refused(f"message_hub: the checkpoint's {EPOCH_BEGAN} is no epoch with an iteration")
        return
    has_epochs, bounds = _has_epochs(runner), {"epoch": math.inf, "iter": math.inf, "seed": 2**32 - 1}
    if not has_epochs:
        bounds["iter"] = runner.max_iters
    else:
        bounds["epoch"] = runner.max_epochs
        # Earlier epochs may have been longer. With drop_last, another rank may have one more batch.
        if EPOCH_BEGAN in record and all(recorded.get(fact) == configured.get(fact) for fact in STEPS):
            bounds["iter"] = began[1] + len(runner.train_dataloader) + 1
    for key, most in bounds.items():
        value = meta.get(key)
        if (type(value) is not int or not 0 <= value <= most) and (key, value) != ("seed", None):
            end = "" if most == math.inf else f" to {most}"
            yield refused(f"meta.{key}: the checkpoint has {value!r:.40}, which is no whole number from 0{end}")
    for key, value in record.items():
        if str(key).startswith("best_score") and not is_number(value):
            yield refused(f"message_hub: the checkpoint's {key} is no number")


def compare_records(runner: AnyRunner, facts: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare recorded facts with a run's; the run uses its own."""
    for setting, configured in _facts(runner).items():
        if setting in facts and facts[setting] != configured:
            consequence = CONSEQUENCES.get(setting, "")
            if (setting, configured) == ("train_cfg", EPOCHS):
                consequence = ", so training begins with the first epoch"
            yield replaced(setting, facts[setting], configured, consequence)


def compare_classes(runner: AnyRunner, meta: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare the classes of a checkpoint's data set with the run's."""
    recorded = _classes(meta.get("dataset_meta"))
    configured = _classes(getattr(runner.train_dataloader.dataset, "metainfo", None))
    if recorded is None or configured is None or recorded == configured:
        return
    pairs = enumerate(zip_longest(map(repr, recorded), map(repr, configured), fillvalue="missing"))
    first = next(
        f"class {index} is {old} in the checkpoint and {new} by the config" for index, (old, new) in pairs if old != new
    )
    numbers = f"the checkpoint was trained on {len(recorded)} classes, the config's data set has {len(configured)}; "
    yield refused(f"train_dataloader.dataset: {numbers if len(recorded) != len(configured) else ''}{first}")


def compare_seed(runner: AnyRunner, meta: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare a checkpoint's seed, which mmengine uses, with the config's."""
    recorded, configured = meta.get("seed"), randomness(runner).get("seed")
    if recorded is not None and configured is not None and recorded != configured:
        yield kept("randomness.seed", recorded, configured)


def _classes(metainfo: Any) -> list[str] | None:
    classes = metainfo.get("classes") if isinstance(metainfo, Mapping) else None
    return [str(name) for name in classes] if isinstance(classes, list | tuple) else None


def _facts(runner: AnyRunner) -> Record:
    loop, loader = training_loop(runner), runner.train_dataloader
    by_epoch = _has_epochs(runner)
    facts: Record = {
        "train_dataloader.dataset": _describe_samples(loader.dataset),
        "train_dataloader.batch_size": _describe_batch(loader),
        "train_dataloader.sampler": _describe_sampler(loader),
        "train_cfg": EPOCHS if by_epoch else ITERATIONS,
        "train_cfg.max_epochs" if by_epoch else "train_cfg.max_iters": (
            runner.max_epochs if by_epoch else runner.max_iters
        ),
        "train_cfg.stitches_per_step": getattr(loop, "stitches_per_step", None),
    }
    for setting, wrapper in named_wrappers(runner.optim_wrapper).items():
        clip = wrapper.clip_grad_kwargs
        facts[f"{setting}.accumulative_counts"] = accumulative_counts(wrapper)
        facts[f"{setting}.clip_grad"] = str(dict(clip)) if clip else "none"
    for module in runner.model.modules():
        if isinstance(module, StitchedBackbone) and len(module.space) > 1:
            facts["model.backbone.seed"] = module.seed
            facts["model.backbone.flops_step"] = _describe_bins(module)
            facts["model.backbone.draw_from"] = _describe_draws(module)
    return {setting: value for setting, value in facts.items() if value is not None}


def _has_epochs(runner: AnyRunner) -> bool:
    return isinstance(training_loop(runner), EpochBasedTrainLoop)


def _describe_samples(dataset: Any) -> str | None:
    """The number of samples and a digest of some file names.

    Folders are left out, because users move data sets.
    """
    if not hasattr(dataset, "__len__"):
        return None
    described = f"{len(dataset)} samples"
    if not hasattr(dataset, "get_data_info"):
        return described
    infos = [dataset.get_data_info(index) for index in range(0, len(dataset), len(dataset) // MOST_NAMES + 1)]
    paths = [value for info in infos for key, value in info.items() if key.endswith("path") and isinstance(value, str)]
    return f"{described} ({_digest(Path(path).name for path in paths)})"


def _describe_batch(loader: DataLoader) -> str | None:
    """The number of samples in an iteration over all processes."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    return None if size is None else f"{size * get_world_size()} over all processes"


def _describe_sampler(loader: DataLoader) -> str | None:
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if sampler is None:
        return None
    shuffle = getattr(sampler, "shuffle", None)
    return type(sampler).__name__ + ("" if shuffle is None else f"(shuffle={bool(shuffle)})")


def _describe_bins(backbone: StitchedBackbone) -> str:
    """The number of bins of the whole space, with a digest of their contents."""
    flops = {id_: cost.flops for id_, cost in backbone.training_costs().items()}
    bins = flops_bins(flops, backbone.flops_step)
    return f"{len(bins)} bin{'s' * (len(bins) != 1)} of {len(backbone.space)} stitches ({_digest(map(repr, bins))})"


def _describe_draws(backbone: StitchedBackbone) -> str:
    """The number of stitches that the config lets training draw, with a digest of them, and of their weights if any."""
    sampler = backbone.sampler()
    drawn = sorted(id_ for bin_ in sampler.bins for id_ in bin_)
    weighted = zip(sampler.bins, sampler.weights, strict=True) if sampler.weights else ()
    described = f"{len(drawn)} of {len(backbone.space)} stitches ({_digest(map(str, (*drawn, *weighted)))})"
    return described + (" with equal_flops" if sampler.weights else "")


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()
