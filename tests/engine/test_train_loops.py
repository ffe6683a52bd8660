"""Training loops: a resumed run is the run that was not interrupted, and one stitch trains as in mmengine's loops."""

import copy
import itertools
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseDataPreprocessor
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmsnnet.errors import SettingError
from mmsnnet.models import find_stitched_backbone
from mmsnnet.registry import DATASETS, METRICS, MODELS
from mmsnnet.stitching import StitchSampler
from tests.models.test_staged_backbone import PAIRS

ITERATIONS = 10  # of batches of two images, of which an epoch has three
NUMBERS = itertools.count()
COSTS: dict[Any, Any] = {}  # of the one backbone, counted once


class Noisy(Dataset):
    """Images with labels, augmented by all three global generators."""

    def __init__(self, noise: float, length: int = 7) -> None:
        self.metainfo = dict(name="noisy")
        self.noise = noise
        self.images = torch.randn(length, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.randn(3, 32, 32) + float(np.random.rand()) + random.random()
        sample = BaseDataElement()
        sample.gt_label = index % 4
        return dict(inputs=self.images[index] + self.noise * noise, data_samples=sample)


class BatchNoise(BaseDataPreprocessor):
    """Augments a whole batch, in training."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        inputs = torch.stack(self.cast_data(data)["inputs"])
        draw = torch.rand(1) + float(np.random.rand()) + random.random() if training else 0
        return dict(inputs=inputs + self.noise * draw, data_samples=data["data_samples"])


class DrawsMuch(BaseMetric):
    """A validation that uses up random numbers of all kinds."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        random.random(), np.random.rand(), torch.rand(())
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return dict(accuracy=0.0)


class Score(BaseMetric):
    """A number that depends on the weights."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(sample["logits"][0]) for sample in data_samples]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return dict(score=sum(results))


MADE = ((DATASETS, Noisy), (MODELS, BatchNoise), (METRICS, DrawsMuch), (METRICS, Score))


def register() -> None:
    for registry, module in MADE:
        registry.register_module(module=module)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register()
    yield
    for registry, module in MADE:
        del registry.module_dict[module.__name__]


class Recorder(Hook):
    """What each iteration saw; at ``kill_after``, the end."""

    priority = "LOWEST"

    def __init__(self, kill_after: int | None = None) -> None:
        self.kill_after = kill_after
        self.seen: list[tuple[int, int, dict[str, Tensor], Tensor]] = []
        self.batches: list[Any] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.batches.append(copy.deepcopy(data_batch))
        inputs = torch.stack(data_batch["inputs"])
        drawn = find_stitched_backbone(runner.model).drawn
        self.seen.append((batch_idx, drawn.id, {name: loss.detach().clone() for name, loss in outputs.items()}, inputs))
        if runner.iter + 1 == self.kill_after:
            raise KeyboardInterrupt


Train = Callable[..., tuple[Runner, Recorder]]

LOOPS = dict(
    iterations=dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=ITERATIONS),
    epochs=dict(type="mmsnnet.StitchEpochBasedTrainLoop", max_epochs=3, val_interval=99),
)


def make_config(
    backbone_config: Callable[..., dict[str, Any]],
    work_dir: Path,
    loop: dict[str, Any],
    noise: float = 0.0,
    sample_noise: float | None = None,
    mixing: bool | None = None,
    sampler: str = "InfiniteSampler",
    batch_size: int = 2,
    workers: int = 0,
    accumulative_counts: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """The arguments of a runner of a tiny classifier. With ``noise`` all that may be random is so; ``changes`` replace
    other arguments."""
    anchors = dict(drop_path_rate=0.5 if noise else 0.0)
    mix = dict(cutmix_alpha=1.0, label_smoothing=0.1) if (noise if mixing is None else mixing) else None
    return (
        dict(
            default_scope="mmsnnet",
            model=dict(
                type="mmsnnet.StitchedClassifier",
                backbone=backbone_config(small=anchors, large=anchors),
                num_classes=4,
                mixing=mix,
                data_preprocessor=dict(type="BatchNoise", noise=noise),
            ),
            work_dir=str(work_dir),
            experiment_name=f"train_loops_{next(NUMBERS)}",
            randomness=dict(seed=11),
            train_dataloader=dict(
                batch_size=batch_size,
                num_workers=workers,
                persistent_workers=workers > 0,
                drop_last=True,
                sampler=dict(type=sampler, shuffle=True),
                dataset=dict(type="Noisy", noise=noise if sample_noise is None else sample_noise),
            ),
            train_cfg=loop,
            optim_wrapper=dict(
                type="OptimWrapper",
                optimizer=dict(type="AdamW", lr=1e-2),
                accumulative_counts=accumulative_counts,
                clip_grad=dict(max_norm=5.0),
            ),
            param_scheduler=[dict(type="LinearLR", start_factor=0.1, end=5, by_epoch=False)],
            default_hooks=dict(checkpoint=None),
        )
        | changes
    )


def build(config: dict[str, Any], recorder: Recorder | None = None, counted: bool = True) -> Runner:
    """A runner whose stitching layers are initialised, from the same weights each time."""
    torch.manual_seed(3)
    runner = Runner(**config)
    backbone = find_stitched_backbone(runner.model)
    if counted:
        backbone._cost_models = COSTS
    for layer in backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
    runner.register_hook(recorder or Recorder())
    return runner


@pytest.fixture
def make_runner(backbone_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Runner]:
    """``make_runner(...)``: a runner of ``make_config``, in a folder of its own unless told otherwise."""

    def make(loop: dict[str, Any], recorder: Recorder | None = None, counted: bool = True, **kwargs: Any) -> Runner:
        work_dir = kwargs.pop("work_dir", tmp_path / f"work_dir_{next(NUMBERS)}")
        return build(make_config(backbone_config, work_dir, loop, **kwargs), recorder, counted)

    return make


@pytest.fixture
def train(make_runner: Callable[..., Runner]) -> Train:
    """``train(...)``: a run of ``make_runner``, to its end or until it is killed."""

    def run(loop: dict[str, Any], kill_after: int | None = None, **kwargs: Any) -> tuple[Runner, Recorder]:
        recorder = Recorder(kill_after)
        runner = make_runner(loop, recorder=recorder, **kwargs)
        if kill_after is None:
            runner.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                runner.train()
        random.seed(), np.random.seed(), torch.seed()  # nothing of it is left for the next
        loader = runner.train_dataloader._iterator
        if loader is not None:  # left to the garbage collector it takes 5 s for each worker
            loader._shutdown_workers()
        return runner, recorder

    return run


def assert_equal(one: Any, other: Any) -> None:
    """To the bit, tensors within anything."""
    if isinstance(one, Tensor | np.ndarray):
        assert bool((one == other).all())
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


def state(runner: Runner) -> dict[str, Any]:
    ema = [hook.ema_model.state_dict() for hook in runner.hooks if hasattr(hook, "ema_model")]
    schedulers = [scheduler.state_dict() for scheduler in runner.param_schedulers]
    return dict(
        model=runner.model.state_dict(),
        draws=find_stitched_backbone(runner.model).draws,
        optimizer=runner.optim_wrapper.state_dict(),
        schedulers=schedulers,
        ema=ema,
        counts=(runner.iter, runner.epoch),
        losses=runner.message_hub.get_scalar("train/loss").data,
    )


EMA = dict(custom_hooks=[dict(type="EMAHook", momentum=0.1)])
BY_EPOCH = dict(default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=True, interval=1)))
FINITE = dict(sampler="DefaultSampler")
RESNETS = dict(
    counted=False,
    model=dict(
        type="mmsnnet.StitchedClassifier",
        backbone=dict(type="mmsnnet.StitchedViT", anchors=list(PAIRS["resnet"]), img_size=32, rank=2, flops_step=1e5),
        num_classes=4,
        data_preprocessor=dict(type="BatchNoise", noise=0.1),
    ),
)


def frozen_teacher(backbone: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The setting of a teacher with weights of its own: the large anchor alone."""
    model = dict(type="mmsnnet.StitchedClassifier", backbone=backbone, num_classes=4)
    model["backbone"] = backbone | dict(anchors=backbone["anchors"][-1:])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        torch.save(dict(state_dict=MODELS.build(model).state_dict()), folder / "teacher.pth")
    return dict(model=model, checkpoint=str(folder / "teacher.pth"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "at", "workers", "kwargs"),
    [
        ("iterations", 5, (0, 0), {}),
        ("iterations", 5, (2, 1), EMA),
        ("iterations", 5, (0, 2), FINITE),
        ("iterations", 5, (0, 0), dict(stitches_per_step=3)),
        ("iterations", 6, (0, 0), dict(stitches_per_step=3, accumulative_counts=2, **EMA)),
        ("iterations", 5, (0, 0), dict(stitches_per_step=3, distill=dict(outputs=1.0, warmup_iters=7))),
        ("iterations", 5, (0, 0), dict(stitches_per_step=3, distill=dict(outputs=1.0, teacher="frozen"))),
        ("iterations", 6, (0, 0), dict(accumulative_counts=3)),
        ("iterations", 5, (0, 0), dict(randomness=dict(seed=None))),
        ("iterations", 5, (0, 0), dict(stitches_per_step=3, **RESNETS)),  # with running statistics
        ("epochs", 5, (2, 0), FINITE),
        ("epochs", 5, (0, 2), dict(stitches_per_step=3, **FINITE, **EMA)),
        ("epochs", 5, (0, 0), dict(randomness=dict(seed=None), **FINITE)),
        ("epochs", 6, (0, 0), FINITE),  # the end of an epoch, before hooks have seen it
        ("epochs", 3, (0, 0), BY_EPOCH | FINITE),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, str | int | tuple) else "-".join(value),
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    loop: str,
    at: int,
    workers: tuple[int, int],
    kwargs: dict[str, Any],
    train: Train,
    backbone_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    config = LOOPS[loop] | {key: kwargs.pop(key) for key in list(kwargs) if key in ("stitches_per_step", "distill")}
    if "teacher" in config.get("distill", {}):
        config["distill"] = config["distill"] | dict(teacher=frozen_teacher(backbone_config(), tmp_path))
    hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=at, save_last=False))
    kwargs = dict(noise=0.1, default_hooks=hooks) | kwargs
    by_epoch = kwargs["default_hooks"]["checkpoint"]["by_epoch"]
    whole, seen = train(config, workers=workers[0], **kwargs)

    folder = tmp_path / "resumed"
    folder.mkdir()
    name = "epoch_1.pth" if by_epoch else f"iter_{at}.pth"
    shutil.copy(Path(whole.work_dir) / name, folder)
    (folder / "last_checkpoint").write_text(str(folder / name))
    resumed, rest = train(config, workers=workers[1], work_dir=str(folder), resume=True, **kwargs)
    assert_equal(rest.seen, seen.seen[at:])
    assert_equal(state(resumed), state(whole))
    assert resumed.seed == whole.seed


@pytest.mark.slow
def test_a_killed_run_goes_on(train: Train, tmp_path: Path) -> None:
    """The same in one folder, where a run is killed some time after its checkpoint; the FLOPs that draws depend on are
    counted in each run's first iteration."""
    whole, seen = train(LOOPS["iterations"], noise=0.1, counted=False)
    checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=5, save_last=False)
    kwargs = dict(noise=0.1, counted=False, work_dir=str(tmp_path / "work_dir"))
    kwargs["default_hooks"] = dict(checkpoint=checkpoint)
    _, first = train(LOOPS["iterations"], kill_after=7, **kwargs)
    resumed, second = train(LOOPS["iterations"], resume=True, **kwargs)
    assert_equal(first.seen, seen.seen[:7])
    assert_equal(second.seen, seen.seen[5:])
    assert_equal(state(resumed), state(whole))


def run_rank(rank: int, folder: str, configs: dict[str, dict[str, Any]]) -> None:
    """One of two ranks: trains by each config, one after the other."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    register()
    for name, config in configs.items():
        recorder = Recorder()
        runner = build(config, recorder)
        runner.train()
        found = dict(
            losses=[step[2]["loss"] for step in recorder.seen],
            drawn=[step[1] for step in recorder.seen],
            inputs=[step[3] for step in recorder.seen],
            state=state(runner),
        )
        torch.save(found, f"{folder}/{name}_{rank}.pth")
    torch.distributed.destroy_process_group()


DOUBLED = dict(
    loop=LOOPS["iterations"] | dict(stitches_per_step=3, distill=dict(outputs=1.0)),
    sample_noise=0.1,
    optim_wrapper=dict(
        type="OptimWrapper",
        optimizer=dict(type="SGD", lr=0.03, momentum=0.9),  # Adam would scale up what rounding makes of zero
        accumulative_counts=2,
        clip_grad=dict(max_norm=5.0),
    ),
)


def taught_loop(backbone: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The loop of ``DOUBLED`` with a frozen teacher."""
    return DOUBLED["loop"] | dict(distill=dict(outputs=1.0, teacher=frozen_teacher(backbone, folder)))


@pytest.fixture(scope="module")
def two_ranks(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks saw, rank by rank."""
    folder = tmp_path_factory.mktemp("two_ranks")
    anchors = [dict(model="vit_tiny_patch16_224", num_heads=2, embed_dim=32 + 16 * i, depth=2 + 2 * i) for i in (0, 1)]

    def backbone(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
        own = [anchors[0] | small, anchors[1] | large]
        return dict(type="mmsnnet.StitchedViT", anchors=own, img_size=32, rank=2, flops_step=2e4)

    hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5, save_last=False))
    shared = dict(launcher="pytorch", cfg=dict(model_wrapper_cfg=dict(type="mmsnnet.StitchedDataParallel")))
    randomness = dict(seed=None, diff_rank_seed=True)  # then it takes most to find the order of samples again
    noisy = dict(loop=LOOPS["iterations"], noise=0.1, default_hooks=hooks, randomness=randomness, **shared, **EMA)
    taught = dict(loop=taught_loop(backbone({}, {}), folder))
    configs = dict(
        doubled=make_config(backbone, folder / "doubled", **DOUBLED, **shared),
        taught=make_config(backbone, folder / "taught", **(DOUBLED | taught), **shared),
        whole=make_config(backbone, folder / "whole", **noisy),
        resumed=make_config(
            backbone, folder / "resumed", load_from=str(folder / "whole" / "iter_5.pth"), resume=True, **noisy
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pytestconfig.rootpath)  # where the processes find this file
        ranks = torch.multiprocessing.start_processes(
            run_rank, (str(folder), configs), nprocs=2, join=False, start_method="forkserver"
        )
    try:
        end = time.monotonic() + 600
        while not ranks.join(timeout=1):
            assert time.monotonic() < end
    finally:
        for process in ranks.processes:
            process.kill()
    return [
        {name: torch.load(folder / f"{name}_{rank}.pth", weights_only=False) for name in configs} for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["doubled", "taught"])
def test_two_ranks_train_as_one_process_with_the_doubled_batch(
    name: str,
    two_ranks: list[dict[str, Any]],
    make_runner: Callable[..., Runner],
    backbone_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Three stitches a step, gradients of two steps added up, samples augmented at random, with a teacher."""
    recorder = Recorder()
    settings = DOUBLED if name == "doubled" else DOUBLED | dict(loop=taught_loop(backbone_config(), tmp_path))
    one = make_runner(recorder=recorder, batch_size=4, **settings)
    one.train()
    first, second = (rank[name] for rank in two_ranks)
    assert first["drawn"] == second["drawn"] == [step[1] for step in recorder.seen]
    for both in zip(first["inputs"], second["inputs"], [step[3] for step in recorder.seen], strict=True):
        assert_equal(torch.stack(both[:2], 1).flatten(0, 1), both[2])
    assert_equal(first["state"]["model"], second["state"]["model"])
    means = [(left + right) / 2 for left, right in zip(first["losses"], second["losses"], strict=True)]
    torch.testing.assert_close(means, [step[2]["loss"] for step in recorder.seen], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        {name.removeprefix("module."): value for name, value in first["state"]["model"].items()},
        dict(one.model.state_dict()),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.distributed
def test_two_ranks_resume_together(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        for run in ("resumed", "whole"):
            del rank[run]["state"]["losses"]  # a checkpoint has the history of the first rank
        assert_equal(rank["resumed"]["state"], rank["whole"]["state"])
        for seen in ("losses", "drawn", "inputs"):
            assert_equal(rank["resumed"][seen], rank["whole"][seen][5:])
    assert not torch.equal(two_ranks[0]["whole"]["inputs"][0], two_ranks[1]["whole"]["inputs"][0])


@pytest.mark.slow
def test_all_that_is_random_counts(train: Train) -> None:
    """Else the tests above would not see a run that goes on from other states."""
    _, one = train(LOOPS["iterations"], noise=0.1)
    _, other = train(LOOPS["iterations"], noise=0.1, randomness=dict(seed=12))
    assert not any(torch.equal(a[3], b[3]) for a, b in zip(one.seen, other.seen, strict=True))
    _, plain = train(LOOPS["iterations"], noise=0.0)
    assert len({float(step[2]["loss"]) for step in one.seen + plain.seen}) == 2 * ITERATIONS
    assert [step[1] for step in one.seen] == [step[1] for step in other.seen]  # the backbone's seed draws stitches


@pytest.mark.slow
def test_a_sampler_with_a_seed_of_its_own_keeps_it(train: Train, make_runner: Callable[..., Runner]) -> None:
    orders = []
    for seed in (11, 12):
        loader = make_runner(LOOPS["iterations"])._train_dataloader
        loader["sampler"]["seed"] = 5
        _, recorder = train(LOOPS["iterations"], train_dataloader=loader, randomness=dict(seed=seed))
        orders.append([step[3] for step in recorder.seen])
    assert_equal(*orders)


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_validation_in_between_changes_nothing(loop: str, train: Train) -> None:
    kwargs = dict(noise=0.1, sampler="DefaultSampler", workers=1, **EMA)
    without, seen = train(LOOPS[loop], **kwargs)
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
        dataset=dict(type="Noisy", noise=0.1, length=4),
    )
    validated, also = train(
        LOOPS[loop] | dict(val_interval=1, val_begin=1),
        val_dataloader=loader,
        val_cfg=dict(type="ValLoop"),
        val_evaluator=dict(type="DrawsMuch"),
        **kwargs,
    )
    assert "val/accuracy" in validated.message_hub.log_scalars
    assert_equal(also.seen, seen.seen)
    assert_equal(state(validated), state(without))


class Validations(Hook):
    """The scores of all validations; at a point of the one after so many iterations, the end."""

    def __init__(self, point: str | None = None, iteration: int = 0) -> None:
        self.scores: dict[int, float] = {}
        self.point, self.iteration = point, iteration
        self.priority = "LOWEST" if point == "after_val" else "VERY_HIGH"
        for name in ("before_val_iter", "after_val", "after_train_iter"):
            setattr(self, name, partial(self._end, name))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        assert runner.iter not in self.scores, "validated twice"
        self.scores[runner.iter] = metrics["score"]

    def _end(self, name: str, runner: Runner, **kwargs: Any) -> None:
        if name == self.point and runner.iter == self.iteration:
            raise KeyboardInterrupt


def files(folder: str | Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=False)["state_dict"] for path in Path(folder).glob("*.pth")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "unit", "interval", "point", "at"),
    [
        ("iterations", "iter", 2, "before_val_iter", 4),
        ("iterations", "iter", 2, "before_val_iter", 10),  # the last one
        ("iterations", "iter", 3, "before_val_iter", 8),  # between two checkpoints
        ("iterations", "iter", 2, "after_val", 8),
        ("iterations", "iter", 2, "after_train_iter", 9),
        ("epochs", "epoch", 1, "before_val_iter", 3),
        ("epochs", "epoch", 1, "before_val_iter", 9),
        ("epochs", "epoch", 1, "after_train_iter", 4),
        ("epochs", "iter", 2, "before_val_iter", 6),
        ("epochs", "iter", 2, "after_train_iter", 4),  # within an epoch
    ],
)
def test_a_validation_that_was_cut_off_is_made_up_for(
    loop: str,
    unit: str,
    interval: int,
    point: str,
    at: int,
    make_runner: Callable[..., Runner],
    tmp_path: Path,
) -> None:
    checkpoints = dict(by_epoch=unit == "epoch", interval=interval, save_best="score", rule="greater")
    kwargs = dict(
        val_dataloader=dict(batch_size=2, num_workers=0, dataset=dict(type="Noisy", noise=0.0, length=4)),
        val_cfg=dict(type="ValLoop"),
        val_evaluator=dict(type="Score"),
        sampler="DefaultSampler",
        default_hooks=dict(checkpoint=dict(type="AtomicCheckpointHook", **checkpoints)),
        # A schedule that validations drive.
        param_scheduler=[dict(type="ReduceOnPlateauLR", monitor="score", rule="less", patience=0, by_epoch=True)],
        **EMA,
    )
    kwargs["val_dataloader"]["sampler"] = dict(type="DefaultSampler", shuffle=False)
    config = LOOPS[loop] | dict(val_begin=1, val_interval=4 if loop == "iterations" else 1)
    expected, hook = make_runner(config, **kwargs), Validations()
    expected.register_hook(hook)
    expected.train()
    assert len(hook.scores) == 3 and len(set(hook.scores.values())) == 3

    work_dir, killed, rest = str(tmp_path / "killed"), Validations(point, at), Validations()
    first = make_runner(config, work_dir=work_dir, **kwargs)
    first.register_hook(killed)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_runner(config, work_dir=work_dir, resume=True, **kwargs)
    second.register_hook(rest)
    second.train()
    assert killed.scores | rest.scores == hook.scores
    assert at in rest.scores or point != "before_val_iter"
    assert_equal(state(second), state(expected))
    assert_equal(files(work_dir), files(expected.work_dir))


STOCK = dict(
    iterations=dict(type="IterBasedTrainLoop", max_iters=ITERATIONS),
    epochs=dict(type="EpochBasedTrainLoop", max_epochs=3, val_interval=99),
)


@pytest.mark.slow
@pytest.mark.parametrize("accumulative_counts", [1, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_one_stitch_trains_as_in_mmengines_loop(loop: str, accumulative_counts: int, train: Train) -> None:
    kwargs = dict(sampler="InfiniteSampler" if loop == "iterations" else "DefaultSampler")
    ours, seen = train(LOOPS[loop], accumulative_counts=accumulative_counts, **kwargs)
    stock, expected = train(STOCK[loop], accumulative_counts=accumulative_counts, **kwargs)
    assert_equal(seen.seen, expected.seen)
    assert_equal(state(ours), state(stock))


@pytest.mark.slow
def test_an_epoch_after_a_checkpoint_of_another_loop_is_a_whole_one(train: Train, tmp_path: Path) -> None:
    """The epochs before may have had more iterations, or fewer."""
    for batch_size in (1, 3):
        work_dir = str(tmp_path / str(batch_size))
        kwargs = dict(BY_EPOCH, **FINITE, work_dir=work_dir)
        train(STOCK["epochs"] | dict(max_epochs=1), batch_size=batch_size, **kwargs)
        _, seen = train(LOOPS["epochs"], resume=True, **kwargs)
        assert [step[0] for step in seen.seen] == [0, 1, 2] * 2


class Calls(Hook):
    """What is called, with which arguments."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        for stage in ("train", "val"):
            points = [f"{when}_{stage}{what}" for when in ("before", "after") for what in ("", "_epoch", "_iter")]
            for point in points:
                setattr(self, point, self._recording(point))
        for point in ("before_run", "after_run", "before_save_checkpoint", "after_load_checkpoint"):
            setattr(self, point, self._recording(point))

    def _recording(self, point: str) -> Callable[..., None]:
        def record(runner: Runner, *args: Any, **kwargs: Any) -> None:
            idx = kwargs.get("batch_idx")
            training = runner.model.training if "iter" in point else None
            self.calls.append((point, idx, sorted(kwargs), runner.iter, runner.epoch, training))

        return record


@pytest.mark.slow
@pytest.mark.parametrize("stitches_per_step", [1, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_hooks_are_called_as_by_mmengines_loop(
    loop: str, stitches_per_step: int, make_runner: Callable[..., Runner]
) -> None:
    changes = dict(
        sampler="DefaultSampler",
        val_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=dict(type="Noisy", noise=0.1, length=4),
        ),
        val_cfg=dict(type="ValLoop"),
        val_evaluator=dict(type="DrawsMuch"),
    )
    number = dict(max_iters=5) if loop == "iterations" else dict(max_epochs=2)
    recorded = []
    for config in (STOCK[loop], LOOPS[loop] | dict(stitches_per_step=stitches_per_step)):
        hook = Calls()
        runner = make_runner(config | number | dict(val_interval=2 if loop == "iterations" else 1), **changes)
        runner.register_hook(hook)
        runner.train()
        recorded.append(hook.calls)
    assert recorded[0] == recorded[1]
    assert len(recorded[0]) > 20


def gradients(model: nn.Module, batch: Any, first_draw: int, number: int) -> dict[str, Tensor]:
    """The sum over ``number`` draws, each of which alone is an iteration of mmengine's."""
    model = copy.deepcopy(model)
    backbone = find_stitched_backbone(model)
    total: dict[str, Tensor] = {}
    for draw in range(first_draw, first_draw + number):
        backbone.draws = draw
        model.zero_grad()
        loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad
    return total


@pytest.mark.parametrize("accumulative_counts", [1, 2])
@pytest.mark.parametrize("stitches_per_step", [2, 3])
def test_the_gradients_of_several_stitches_are_summed(
    stitches_per_step: int, accumulative_counts: int, make_runner: Callable[..., Runner]
) -> None:
    """Over the iterations of an accumulation mmengine takes the mean."""
    recorder = Recorder()
    loop = dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=accumulative_counts)
    runner = make_runner(
        loop | dict(stitches_per_step=stitches_per_step),
        accumulative_counts=accumulative_counts,
        recorder=recorder,
        param_scheduler=None,
        optim_wrapper=dict(
            type="OptimWrapper", optimizer=dict(type="SGD", lr=1.0), accumulative_counts=accumulative_counts
        ),
    )
    before = copy.deepcopy(runner.model)
    runner.train()
    backbone = find_stitched_backbone(runner.model)
    assert backbone.draws == stitches_per_step * accumulative_counts
    find_stitched_backbone(before).stitches_per_step = stitches_per_step
    expected: dict[str, Tensor] = {}
    for iteration, batch in enumerate(recorder.batches):
        summed = gradients(before, batch, iteration * stitches_per_step, stitches_per_step)
        for name, gradient in summed.items():
            expected[name] = expected.get(name, 0) + gradient / accumulative_counts
    start = dict(before.named_parameters())
    for name, parameter in runner.model.named_parameters():
        moved = start[name] - parameter
        torch.testing.assert_close(moved, expected.get(name, torch.zeros_like(moved)), rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


def test_the_stitches_of_a_step_see_one_preprocessed_batch(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(
        dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=2, stitches_per_step=3), noise=0.5, mixing=False
    )
    inputs, drawn, losses = [], [], []
    backbone = find_stitched_backbone(runner.model)

    def see(module: nn.Module, args: tuple[Tensor], result: Any) -> None:
        inputs.append(args[0].clone())
        drawn.append(backbone.drawn.id)

    def change_images(images: Tensor, samples: Any) -> Any:
        losses = loss(images.clone(), samples)
        images.zero_()  # as mixing changes images in place
        return losses

    loss, runner.model.loss = runner.model.loss, change_images
    backbone.register_forward_hook(see)
    runner.model.criterion.register_forward_hook(lambda module, args, loss: losses.append(loss.detach()))
    recorder = next(hook for hook in runner.hooks if isinstance(hook, Recorder))
    runner.train()
    for first in (0, 3):
        assert_equal(inputs[first], inputs[first + 1])
        assert_equal(inputs[first], inputs[first + 2])
        flops = {id_: cost.flops for id_, cost in backbone.training_costs().items()}
        assert flops[drawn[first]] == max(flops.values()) and flops[drawn[first + 1]] == min(flops.values())
    assert not torch.equal(inputs[0], inputs[3])
    for step, seen in enumerate(recorder.seen):
        torch.testing.assert_close(seen[2]["loss"], torch.stack(losses[3 * step : 3 * step + 3]).mean())


def test_each_micro_batch_draws_anew(train: Train) -> None:
    runner, seen = train(LOOPS["iterations"], accumulative_counts=5)
    backbone = find_stitched_backbone(runner.model)
    sampler = StitchSampler(backbone.sampler().bins, backbone.seed)
    assert [step[1] for step in seen.seen] == [sampler.draw(n) for n in range(ITERATIONS)]
    assert len({step[1] for step in seen.seen[:5]}) > 1 and backbone.draws == ITERATIONS


@pytest.mark.parametrize(
    ("loop", "accumulative_counts", "checkpoint", "warns"),
    [
        ("iterations", 2, dict(by_epoch=False, interval=5), True),
        ("iterations", 5, dict(by_epoch=False, interval=5), False),
        ("iterations", 2, dict(by_epoch=False, interval=-1), False),
        ("epochs", 2, dict(by_epoch=True, interval=1), True),
        ("epochs", 2, dict(by_epoch=True, interval=2), False),
    ],
)
def test_a_checkpoint_within_an_accumulation_is_warned_of(
    loop: str,
    accumulative_counts: int,
    checkpoint: dict[str, Any],
    warns: bool,
    make_runner: Callable[..., Runner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = make_runner(
        LOOPS[loop],
        sampler="DefaultSampler",
        accumulative_counts=accumulative_counts,
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", **checkpoint)),
    )
    said: list[str] = []
    monkeypatch.setattr(runner.logger, "handlers", [])
    monkeypatch.setattr(runner.logger, "callHandlers", lambda record: said.append(record.getMessage()))
    runner.logger.setLevel(logging.WARNING)
    runner.train()
    assert any("multiple of optim_wrapper.accumulative_counts" in text for text in said) is warns


def test_several_stitches_need_a_step_that_runs_the_model_once(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(LOOPS["iterations"] | dict(stitches_per_step=2), param_scheduler=None)
    runner.model.train_step = lambda data, optim_wrapper: {}
    with pytest.raises(TypeError, match="stitches_per_step=1"):
        runner.train()


def test_a_step_of_one_stitch_has_no_teacher(make_runner: Callable[..., Runner]) -> None:
    with pytest.raises(SettingError, match=r"train_cfg\.stitches_per_step to 3 or more"):
        make_runner(LOOPS["iterations"] | dict(distill=dict(outputs=1.0))).train()


def test_a_step_of_several_stitches_has_several(
    backbone_config: Callable[..., dict[str, Any]], make_runner: Callable[..., Runner], tmp_path: Path
) -> None:
    """One is refused; two of four are announced."""

    def warned(stitches: int, drawn: list[str] | None) -> list[str]:
        loop = LOOPS["iterations"] | dict(stitches_per_step=stitches, max_iters=1)
        model = make_config(backbone_config, tmp_path, loop)["model"]
        if drawn:
            model["backbone"]["draw_from"] = dict(stitches=drawn)
        runner = make_runner(loop, model=model, counted=False)
        found: list[str] = []
        runner.logger.warning = found.append
        runner.train()
        return found

    assert warned(3, None) == warned(2, ["S", "L"]) == []
    (text,) = warned(2, None)
    assert "stitches_per_step=2 trains the costliest and the cheapest of 4 stitches alone" in text
    with pytest.raises(SettingError, match=r"stitches_per_step=3 trains several stitches .* leaves one"):
        warned(3, ["S"])


@pytest.mark.parametrize("value", [0, -1, 2.5, "two", True, None])
def test_a_step_has_a_whole_number_of_stitches(value: Any, make_runner: Callable[..., Runner]) -> None:
    text = f"train_cfg.stitches_per_step must be a whole number of at least 1, got {value!r}"
    with pytest.raises(SettingError, match=re.escape(text)):
        make_runner(LOOPS["iterations"] | dict(stitches_per_step=value)).train()


class DeferredHistory(HistoryBuffer):
    """A loss history as the ``DeferredRuntimeInfoHook`` of 0.1.0 wrote it into checkpoints."""

    def __reduce__(self) -> tuple[Any, ...]:
        return HistoryBuffer, (*self.data, self.max_length)


def test_a_checkpoint_with_the_deferred_log_of_0_1_0_resumes(
    make_runner: Callable[..., Runner], train: Train, tmp_path: Path
) -> None:
    checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=5, save_last=False)
    kwargs = dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=checkpoint))
    train(LOOPS["iterations"], kill_after=5, **kwargs)
    path = tmp_path / "iter_5.pth"
    written = torch.load(path, weights_only=False)
    histories = written["message_hub"]["log_scalars"]
    losses, _ = histories["train/loss"].data
    for name, history in histories.items():
        histories[name] = DeferredHistory(*history.data, history.max_length)
    torch.save(written, path)
    runner = make_runner(LOOPS["iterations"], resume=True, **kwargs)
    runner.train()
    resumed, _ = runner.message_hub.get_scalar("train/loss").data
    assert len(losses) == 5 and len(resumed) == ITERATIONS
    assert_equal(resumed[:5], losses)


DRAWS = "model.backbone.draw_from: goes on with the config's"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "refused", "said"),
    [
        ({}, False, []),
        (dict(seed=5), False, ["model.backbone.seed: goes on with the config's 5, the checkpoint's was 0"]),
        (dict(flops_step=1e9), False, ["model.backbone.flops_step: goes on with the config's 1 bin of 4 stitches"]),
        (dict(draw_from=dict(kinds=["S", "L"])), False, [f"{DRAWS} 2 of 4 stitches ("]),
        (dict(draw_from=dict(equal_flops=True)), False, [f"{DRAWS} 4 of 4 stitches ("]),
        (dict(img_size=64), True, ["model.backbone.img_size: the checkpoint's position embeddings are for 2 x 2"]),
    ],
    ids=["nothing", "seed", "flops_step", "kinds", "equal_flops", "img_size"],
)
def test_a_resumed_run_says_what_differs(
    changes: dict[str, Any],
    refused: bool,
    said: list[str],
    backbone_config: Callable[..., dict[str, Any]],
    make_runner: Callable[..., Runner],
    train: Train,
    tmp_path: Path,
) -> None:
    """Nothing, where several stitches a step are counted as accumulated gradients."""
    loop = LOOPS["iterations"] | dict(stitches_per_step=3)
    checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=6, save_last=False)
    kwargs = dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=checkpoint), accumulative_counts=2)
    train(loop, kill_after=6, **kwargs)
    model = make_config(backbone_config, tmp_path, loop)["model"]
    model["backbone"] |= changes
    runner = make_runner(loop, resume=True, counted=False, model=model, **kwargs)
    warned: list[str] = []
    runner.logger.warning = warned.append
    if refused:
        with pytest.raises(SettingError) as caught:
            runner.train()
        warned = [str(caught.value).partition("with this config. ")[2]]
    else:
        runner.train()
    assert len(warned) == len(said)
    assert all(text.startswith(start) for text, start in zip(warned, said, strict=True)), warned
