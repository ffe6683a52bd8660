"""Draws that narrow to what lies near the front."""

import itertools
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner

from mmsnnet.engine.hooks.narrow_draws_hook import near_front
from mmsnnet.errors import SettingError
from mmsnnet.models import find_stitched_backbone
from mmsnnet.registry import DATASETS, METRICS, MODELS
from tests.engine.test_train_loops import BatchNoise, Noisy, Recorder, assert_equal, build, make_config, state

LOOP = dict(type="mmsnnet.StitchIterBasedTrainLoop", max_iters=7, val_interval=3)
VALIDATION = dict(
    val_cfg=dict(type="mmsnnet.StitchValLoop", stitches="all"),
    val_evaluator=dict(type="Listed"),
)
HOOK = dict(type="mmsnnet.NarrowDrawsHook", within=0.5, metric="top1")
SAVED = dict(type="CheckpointHook", by_epoch=False, interval=1, save_last=False)


class Listed(BaseMetric):
    """Top-1 as a list says, one value for each evaluation."""

    values: Iterator[float]

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return dict(top1=next(Listed.values))


MADE = ((DATASETS, Noisy), (MODELS, BatchNoise), (METRICS, Listed))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    for registry, module in MADE:
        registry.register_module(module=module)
    yield
    for registry, module in MADE:
        del registry.module_dict[module.__name__]


@pytest.fixture
def train(backbone_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., tuple[Runner, Recorder]]:
    """``train(values)``: a run whose validations measure ``values``, in the order of evaluation."""
    numbers = itertools.count()

    def run(values: Sequence[float], hook: dict[str, Any] = HOOK, **changes: Any) -> tuple[Runner, Recorder]:
        Listed.values = iter(values)
        folder = changes.pop("work_dir", tmp_path / str(next(numbers)))
        config = make_config(backbone_config, folder, LOOP, custom_hooks=[hook, dict(type="mmsnnet.ConsistencyHook")])
        config["cfg"] = dict(custom_hooks=config["custom_hooks"])  # as from_cfg passes it
        loader = config["train_dataloader"] | dict(sampler=dict(type="DefaultSampler", shuffle=False), drop_last=False)
        recorder = Recorder()
        runner = build(config | dict(val_dataloader=loader) | VALIDATION | changes, recorder)
        runner.train()
        return runner, recorder

    return run


def _log(runner: Runner) -> str:
    return (Path(runner.log_dir) / f"{runner.timestamp}.log").read_text()


def of_one_pass(runner: Runner, quality: dict[str, float]) -> list[float]:
    """The values that a validation reads, for this quality by name; 0 for others."""
    backbone = find_stitched_backbone(runner.model)
    return [quality.get(stitch.name, 0.0) for stitch in backbone.prefix_order(backbone.space)]


def test_what_is_near_the_front() -> None:
    """The definition, against loops over all pairs; ties in cost count for each other."""
    numbers = random.Random(0)
    for _ in range(200):
        ids = range(numbers.randint(1, 8))
        flops = {id_: numbers.randint(1, 4) for id_ in ids}
        quality = {id_: numbers.choice([1.0, 1.5, 2.0, 3.0, float("nan")]) for id_ in ids}
        within = numbers.choice([0.0, 0.5, 1.0])
        expected = {
            id_
            for id_ in ids
            if quality[id_] == quality[id_]
            and all(quality[o] - within <= quality[id_] for o in ids if flops[o] <= flops[id_] and quality[o] > 0)
        }
        assert near_front(ids, flops, quality, within) == expected


@pytest.mark.slow
def test_each_validation_drops_what_lies_below_the_front(train: Callable[..., tuple[Runner, Recorder]]) -> None:
    """The anchors stay whatever they measure; stitches that are dropped do not come back."""
    backbone = find_stitched_backbone(train([0.0] * 1000)[0].model)
    costs = backbone.costs()
    cheap, costly = sorted(
        (stitch for stitch in backbone.space if stitch not in backbone.space.anchors), key=lambda s: costs[s.id].flops
    )
    assert costs[cheap.id].flops < costs[costly.id].flops
    order = backbone.prefix_order(backbone.space)
    passes = [
        {"S": 1.0, cheap.name: 5.0, costly.name: 4.4, "L": 0.0},  # the costlier one is 0.6 below
        {"S": 9.0, cheap.name: 3.0, costly.name: 99.0, "L": 0.0},  # 99 does not count any more
    ]
    runner, recorder = train([values[stitch.name] for values in [*passes, passes[0]] for stitch in order])
    drawn = [stitch for *_, stitch in (seen[:2] for seen in recorder.seen)]
    assert set(drawn[3:]) <= {backbone.space["S"].id, backbone.space["L"].id, cheap.id}
    left = find_stitched_backbone(runner.model).sampler().bins
    assert {backbone.space[id_].name for bin_ in left for id_ in bin_} == {"S", "L"}


@pytest.mark.slow
@pytest.mark.parametrize(("higher", "left"), [(None, {"S0-L2"}), (False, {"L1-S1"})])
def test_nan_is_not_near_and_a_validation_without_values_drops_nothing(
    higher: bool | None, left: set[str], train: Callable[..., tuple[Runner, Recorder]]
) -> None:
    """The two crossing stitches measure 1 and 5, then nothing measures anything; the validation at the end is over."""
    nan = float("nan")
    some, _ = train([0.0] * 1000)
    backbone = find_stitched_backbone(some.model)
    first = of_one_pass(some, {"S": nan, "L": nan, "L1-S1": 1.0, "S0-L2": 5.0})
    runner, _ = train([*first, *([nan] * 8)], hook=HOOK | dict(higher=higher, within=0.0))
    backbone = find_stitched_backbone(runner.model)
    drawn = {backbone.space[id_].name for bin_ in backbone.sampler().bins for id_ in bin_}
    # Costs decide which one is compared with which: the cheaper is always on the front.
    assert drawn >= {"S", "L"} | left
    log = _log(runner)
    assert "no top1 for S, L: they are not near the front" in log and "all stitches stay" in log


@pytest.mark.slow
def test_a_resumed_run_draws_what_the_whole_one_draws(
    train: Callable[..., tuple[Runner, Recorder]], tmp_path: Path
) -> None:
    """From a checkpoint that is older than the validation of its iteration, and from a later one."""
    some, _ = train([9.0] * 1000)
    values = of_one_pass(some, {"S": 1.0, "L": 2.0})
    saved = dict(default_hooks=dict(checkpoint=SAVED))
    whole, seen = train(values * 3, **saved)
    backbone = find_stitched_backbone(whole.model)
    assert {backbone.space[id_].name for bin_ in backbone.sampler().bins for id_ in bin_} == {"S", "L"}
    for at in (3, 4):
        folder = tmp_path / f"resumed_{at}"
        folder.mkdir()
        shutil.copy(Path(whole.work_dir) / f"iter_{at}.pth", folder)
        (folder / "last_checkpoint").write_text(str(folder / f"iter_{at}.pth"))
        resumed, rest = train(values * 3, work_dir=str(folder), resume=True, **saved)
        assert_equal(rest.seen, seen.seen[at:])
        assert (at < 4) != ("the resumed run had narrowed its draws; training draws S, L" in _log(resumed))
        assert_equal(state(resumed), state(whole))
    resumed, _ = train(values, hook=dict(type="mmsnnet.StitchLogHook"), work_dir=str(folder), resume=True, **saved)
    assert "had narrowed its draws. Without NarrowDrawsHook" in _log(resumed)


@pytest.mark.slow
def test_anchors_come_back_if_a_resumed_run_may_draw_them(
    train: Callable[..., tuple[Runner, Recorder]], backbone_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """And a resumed run says what it draws and which setting of the hook differs."""
    saved = dict(default_hooks=dict(checkpoint=SAVED))
    model = make_config(backbone_config, tmp_path, LOOP)["model"]
    model["backbone"]["draw_from"] = dict(kinds=["LS"])
    folder = str(tmp_path / "narrowed")
    train([1.0] * 100, model=model, work_dir=folder, **saved)
    del model["backbone"]["draw_from"]
    resumed, _ = train([1.0] * 100, HOOK | dict(within=7.0), model=model, work_dir=folder, resume=True, **saved)
    log = _log(resumed)
    assert "the resumed run had narrowed its draws; training draws S, L, L1-S1" in log
    assert "custom_hooks.NarrowDrawsHook.within: goes on with the config's 7.0, the checkpoint's was 0.5" in log


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(val_cfg=dict(type="mmsnnet.StitchValLoop", stitches="anchors")),
            "2 of 4, S0-L2 for one, are not",
        ),
        (dict(val_dataloader=None, val_cfg=None, val_evaluator=None), "are not validated: set val_cfg"),
        (dict(train_cfg=LOOP | dict(val_interval=7)), "does not come before the end"),
    ],
)
def test_what_is_not_validated_is_refused(
    changes: dict[str, Any], message: str, train: Callable[..., tuple[Runner, Recorder]]
) -> None:
    with pytest.raises(SettingError, match=message):
        train([], **changes)


@pytest.mark.parametrize("within", [-1, "1", True, float("nan")])
def test_a_distance_is_a_number_of_0_or_more(within: Any, train: Callable[..., tuple[Runner, Recorder]]) -> None:
    with pytest.raises(SettingError, match="within must be a number"):
        train([], hook=HOOK | dict(within=within))
