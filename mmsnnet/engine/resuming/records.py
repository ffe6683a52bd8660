from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop, FlexibleRunner, Runner
from torch.utils.data import DataLoader

from mmsnnet.engine.resuming.difference import Difference, kept, refused, replaced
from mmsnnet.engine.resuming.optimizers import named_wrappers
from mmsnnet.engine.resuming.schedules import scheduler_types
from mmsnnet.engine.resuming.settings import describe_settings
from mmsnnet.models import StitchedBackbone

AnyRunner = Runner | FlexibleRunner
Record = dict[str, Any]

EPOCHS, ITERATIONS = "epochs", "iterations"
# How many samples of a data set are known by name.
MOST_NAMES = 64
OTHER_ORDER = ", so data has another order"
# What a difference in a recorded fact leads to, by the setting's name.
CONSEQUENCES = {
    "train_dataloader.dataset": ", so the run sees other data",
    "train_dataloader.batch_size": OTHER_ORDER,
    "train_dataloader.sampler": OTHER_ORDER,
    "train_cfg.stitches_per_step": ", so other stitches are drawn",
    "model.backbone.seed": ", so other stitches are drawn",
    "model.backbone.flops_step": ", so other stitches are drawn",
}


def describe_run(runner: AnyRunner) -> Record:
    """What a checkpoint records of a run beside its state: plain values by the setting that a user would change.

    ``optimizer`` and ``param_scheduler`` are the types; ``facts`` is what training reads elsewhere, without what a run
    does not have; ``settings`` is the rest of the config that training reads.
    """
    wrappers = named_wrappers(runner.optim_wrapper)
    return dict(
        optimizer={setting: type(wrapper.optimizer).__name__ for setting, wrapper in wrappers.items()},
        param_scheduler=scheduler_types(runner.param_schedulers),
        facts=_facts(runner),
        settings=describe_settings(runner.cfg),
    )


def compare_records(runner: AnyRunner, facts: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare the facts that a checkpoint records with a run, which goes on with the config's."""
    for setting, own in _facts(runner).items():
        if setting in facts and facts[setting] != own:
            consequence = CONSEQUENCES.get(setting, "")
            if (setting, own) == ("train_cfg", EPOCHS):
                consequence = ", none of which is an epoch: training begins with the first"
            yield replaced(setting, facts[setting], own, consequence)


def compare_classes(runner: AnyRunner, meta: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare the classes of the data set that a checkpoint was trained on with those of the run's."""
    given = _classes(meta.get("dataset_meta"))
    own = _classes(getattr(runner.train_dataloader.dataset, "metainfo", None))
    if given is None or own is None or given == own:
        return
    index = next((i for i, pair in enumerate(zip(given, own, strict=False)) if pair[0] != pair[1]), None)
    if index is None:
        index = min(len(given), len(own))
        longer, whose = (given, "the checkpoint's") if len(given) > len(own) else (own, "the config's")
        first = f"only {whose} data set has class {index}, {longer[index]!r}"
    else:
        first = f"class {index} is {given[index]!r} in the checkpoint and {own[index]!r} by the config"
    numbers = f"the checkpoint was trained on {len(given)} classes, the config's data set has {len(own)}; "
    yield refused(f"train_dataloader.dataset: {numbers if len(given) != len(own) else ''}{first}")


def compare_seed(runner: AnyRunner, meta: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare the seed in a checkpoint with the config's; mmengine takes the checkpoint's."""
    randomness = getattr(runner, "_randomness_cfg", {})
    given, own = meta.get("seed"), randomness.get("seed")
    if given is not None and own is not None and given != own:
        yield kept("randomness.seed", given, own)


def _classes(metainfo: Any) -> list[str] | None:
    classes = metainfo.get("classes") if isinstance(metainfo, Mapping) else None
    return [str(name) for name in classes] if isinstance(classes, list | tuple) else None


def _facts(runner: AnyRunner) -> Record:
    loop, loader = runner._train_loop, runner.train_dataloader
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    facts: Record = {
        "train_dataloader.dataset": _described_samples(loader.dataset),
        "train_dataloader.batch_size": _described_batch(loader),
        "train_dataloader.sampler": _described_sampler(loader),
        "train_cfg": EPOCHS if by_epoch else ITERATIONS,
        "train_cfg.max_epochs" if by_epoch else "train_cfg.max_iters": (
            runner.max_epochs if by_epoch else runner.max_iters
        ),
        "train_cfg.stitches_per_step": getattr(loop, "stitches_per_step", None),
    }
    for setting, wrapper in named_wrappers(runner.optim_wrapper).items():
        clip = wrapper.clip_grad_kwargs
        facts[f"{setting}.accumulative_counts"] = wrapper._accumulative_counts
        facts[f"{setting}.clip_grad"] = str(dict(clip)) if clip else "none"
    for module in runner.model.modules():
        if isinstance(module, StitchedBackbone) and len(module.space) > 1:
            facts["model.backbone.seed"] = module.seed
            facts["model.backbone.flops_step"] = _described_bins(module)
    return {setting: value for setting, value in facts.items() if value is not None}


def _described_samples(dataset: Any) -> str | None:
    """The number of samples; where a data set of mmengine lists files, also a digest of the names of some of them.

    Folders do not count, because data sets are moved.
    """
    if not hasattr(dataset, "__len__"):
        return None
    described = f"{len(dataset)} samples"
    if not hasattr(dataset, "get_data_info"):
        return described
    infos = [dataset.get_data_info(index) for index in range(0, len(dataset), len(dataset) // MOST_NAMES + 1)]
    paths = [value for info in infos for key, value in info.items() if key.endswith("path") and isinstance(value, str)]
    return f"{described} ({_digest(Path(path).name for path in paths)})"


def _described_batch(loader: DataLoader) -> str | None:
    """The samples of an iteration over all processes, which may share them out otherwise."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    return None if size is None else f"{size * get_world_size()} over all processes"


def _described_sampler(loader: DataLoader) -> str | None:
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if sampler is None:
        return None
    shuffle = getattr(sampler, "shuffle", None)
    return type(sampler).__name__ + ("" if shuffle is None else f"(shuffle={bool(shuffle)})")


def _described_bins(backbone: StitchedBackbone) -> str:
    """The bins that stitches are drawn from, with a digest that tells which stitch is in which."""
    bins = backbone.sampler().bins
    return f"{len(bins)} bin{'s' * (len(bins) != 1)} of {len(backbone.space)} stitches ({_digest(map(repr, bins))})"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()
