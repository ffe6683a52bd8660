"""What is monitored is a metric that validation gives, before anything is trained."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.optim import ReduceOnPlateauLR, ReduceOnPlateauMomentum, StepLR
from mmengine.runner import ValLoop
from mmseg.evaluation import DepthMetric, IoUMetric
from torch import nn

from mmsnnet.engine import StitchValLoop
from mmsnnet.engine.hooks.monitored_metrics import check_monitors, chosen_metric, default_monitor
from mmsnnet.errors import SettingError
from mmsnnet.stitching import StitchSpace

SPACE = StitchSpace.two_way((2, 4))


class Mine(BaseMetric):
    """Of a user's own, whose names are not known."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        raise NotImplementedError

    def compute_metrics(self, results: Any) -> dict[str, float]:
        raise NotImplementedError


def stock(*metrics: BaseMetric, model: Any = None) -> ValLoop:
    return _loop(ValLoop, metrics, model)


def ours(*metrics: BaseMetric, stitches: str = "anchors", model: Any = None) -> StitchValLoop:
    loop = _loop(StitchValLoop, metrics, model)
    costs = {stitch.id: SimpleNamespace(flops=index) for index, stitch in enumerate(SPACE)}
    vars(loop).update(backbone=SimpleNamespace(space=SPACE, costs=lambda: costs), stitches=SPACE.select(stitches))
    return loop


def _loop(kind: type, metrics: tuple[BaseMetric, ...], model: Any) -> Any:
    loop = object.__new__(kind)
    for metric in metrics:
        metric.dataset_meta = dict(classes=("road", "sky"))
    vars(loop).update(evaluator=SimpleNamespace(metrics=metrics), _runner=SimpleNamespace(model=model or _of_mmseg()))
    return loop


def _of_mmseg() -> nn.Module:
    return type("EncoderDecoder", (nn.Module,), dict(__module__="mmseg.models"))()


def runner_of(loop: Any, *hooks: Any, schedulers: Any = None) -> Any:
    return SimpleNamespace(val_loop=loop, hooks=list(hooks), param_schedulers=schedulers)


def best(name: Any, **settings: Any) -> CheckpointHook:
    return CheckpointHook(save_best=name, **settings)


def plateau(monitor: str, kind: type = ReduceOnPlateauLR, **settings: Any) -> Any:
    return kind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5), monitor=monitor, **settings)


def monitoring(kind: str, loop: Any, name: str, rule: str | None = "greater") -> Any:
    """A runner in which a hook or a schedule monitors a metric."""
    rule = {} if rule is None else dict(rule=rule)
    if kind == "save_best":
        return runner_of(loop, best(name, **rule))
    if kind == "list":
        return runner_of(loop, best(["S/mIoU", name], **rule))
    if kind == "early stopping":
        return runner_of(loop, EarlyStoppingHook(name, **rule))
    if kind == "plateau":
        return runner_of(loop, schedulers=[StepLR(plateau(name).optimizer, 1), plateau(name, **rule)])
    return runner_of(loop, schedulers=dict(a=[], b=[plateau(name, ReduceOnPlateauMomentum, **rule)]))


KINDS = ("save_best", "list", "early stopping", "plateau", "plateaus")


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_no_metric_has(kind: str) -> None:
    loop = ours(IoUMetric())
    check_monitors(monitoring(kind, loop, "L/mIoU"))
    setting = dict(
        zip(
            KINDS,
            ("save_best", "save_best", "EarlyStoppingHook", "ReduceOnPlateauLR", "ReduceOnPlateauMom"),
            strict=True,
        )
    )
    for name in ("mIoU", "L/mIuO", "L", "X/mIoU", "L/aacc", "loss", "L/val_loss", "/mIoU", "L/mIoU/"):
        with pytest.raises(
            SettingError, match=f"{setting[kind]}.*no metric is called {name}; those of this loop are"
        ) as e:
            check_monitors(monitoring(kind, loop, name))
        assert "\n" not in str(e.value) and "and 2 more" in str(e.value)  # of six


def test_the_names_that_are_most_like_it_come_first() -> None:
    with pytest.raises(SettingError, match="those of this loop are S/mIoU, L/mIoU, "):
        check_monitors(runner_of(ours(IoUMetric()), best("mIoU")))
    with pytest.raises(SettingError, match=r"are L/mIoU, .* and \d+ more$"):
        check_monitors(runner_of(ours(IoUMetric(), stitches="all"), best("L/mIuO", rule="greater")))


def test_a_stitch_that_is_not_validated() -> None:
    with pytest.raises(SettingError, match=r"Stitch S0-L2 is not validated: name it in val_cfg\.stitches"):
        check_monitors(runner_of(ours(IoUMetric()), best("S0-L2/mIoU")))


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        (IoUMetric(iou_metrics=["mFscore"], prefix="city"), "city/mFscore", "mFscore"),
        (CocoMetric(), "coco/bbox_mAP", "bbox_mAP"),
        (CocoMetric(classwise=True), "coco/road_precision", "coco/car_precision"),
        (CocoMetric(metric=["bbox", "segm"]), "coco/segm_mAP_50", "coco/segm_mAP_60"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_names_of_each_task(metric: BaseMetric, good: str, bad: str) -> None:
    for loop, stitch in ((ours(metric), "L/"), (stock(metric), "")):
        check_monitors(runner_of(loop, best(stitch + good, rule="greater")))
        with pytest.raises(SettingError, match=f"no metric is called {stitch}{bad}"):
            check_monitors(runner_of(loop, best(stitch + bad, rule="greater")))


def test_mmengine_s_loop_knows_no_stitch() -> None:
    check_monitors(runner_of(stock(IoUMetric()), best("mIoU")))
    with pytest.raises(SettingError, match="no metric is called L/mIoU; those of this loop are mIoU, "):
        check_monitors(runner_of(stock(IoUMetric()), best("L/mIoU")))


def test_metrics_that_are_not_known() -> None:
    """Of their names the stitch alone can be checked, and a prefix."""
    loop = ours(IoUMetric(), Mine())
    for name in ("L/speed", "L/a/b"):
        check_monitors(runner_of(loop, best(name, rule="less")))
    for name in ("mIoU", "X/speed", "L", "L/"):
        with pytest.raises(SettingError, match=r"and what Mine gives, each after <stitch>/ \(S, L\)"):
            check_monitors(runner_of(loop, best(name, rule="greater")))
    check_monitors(runner_of(ours(Mine(prefix="my")), best("L/my/speed", rule="less")))
    with pytest.raises(SettingError, match="no metric is called L/speed; those of this loop are what Mine gives"):
        check_monitors(runner_of(ours(Mine(prefix="my")), best("L/speed", rule="less")))
    check_monitors(runner_of(stock(Mine()), best("speed", rule="less")))


class Renames(StitchValLoop):
    def run(self) -> Any:
        raise NotImplementedError


def test_a_loop_of_a_user_s_own_may_give_anything() -> None:
    loop = ours(IoUMetric())
    loop.__class__ = Renames
    check_monitors(runner_of(loop, best("anything_acc")))


def test_losses_of_a_model_of_a_user_s_own() -> None:
    own = type("Model", (nn.Module,), {})()
    check_monitors(runner_of(ours(IoUMetric(), model=own), best("L/val_loss")))
    with pytest.raises(SettingError, match="no metric is called L/val_loss"):
        check_monitors(runner_of(ours(IoUMetric()), best("L/val_loss")))


@pytest.mark.parametrize("kind", ["save_best", "early stopping", "plateau"])
def test_rules_the_wrong_way_about(kind: str) -> None:
    for metric, name, right, wrong in (
        (IoUMetric(), "S/mIoU", "greater", "less"),
        (DepthMetric(), "S/rmse", "less", "greater"),
    ):
        check_monitors(monitoring(kind, ours(metric), name, right))
        with pytest.raises(SettingError, match=f"values of {name} are better.*set rule='{right}'"):
            check_monitors(monitoring(kind, ours(metric), name, wrong))
    if kind == "plateau":  # whose rule is 'less' unless it is given
        with pytest.raises(SettingError, match="set rule='greater'"):
            check_monitors(monitoring(kind, ours(IoUMetric()), "S/mIoU", None))


@pytest.mark.parametrize("kind", KINDS)
def test_no_validation(kind: str) -> None:
    with pytest.raises(SettingError, match=r"needs validation, and the config has none.*val_evaluator"):
        check_monitors(monitoring(kind, None, "L/mIoU"))
    check_monitors(runner_of(None, CheckpointHook(), schedulers=None))


@pytest.mark.parametrize(
    ("loop", "name"),
    [
        (lambda: ours(IoUMetric(iou_metrics=["mDice", "mIoU"])), "L/mIoU"),
        (lambda: ours(DepthMetric()), "L/abs_rel"),
        (lambda: ours(CocoMetric(metric=["segm", "bbox"])), "L/coco/bbox_mAP"),
        (lambda: ours(IoUMetric(), stitches="S,S0-L2"), "S0-L2/mIoU"),
        (lambda: ours(IoUMetric(), stitches="S"), "S/mIoU"),
        (lambda: ours(IoUMetric(iou_metrics=["mDice"])), "L/aAcc"),  # no task's own: the first that can be better
        (lambda: ours(Mine(), IoUMetric()), "L/mIoU"),
        (lambda: stock(IoUMetric()), "mIoU"),
        (lambda: ours(Mine()), None),
        (lambda: stock(Mine()), None),
    ],
)
def test_the_default(loop: Callable[[], Any], name: str | None) -> None:
    assert default_monitor(loop()) == name


def test_the_default_once_names_are_known() -> None:
    assert chosen_metric(ours(Mine()), ["S/top1", "L/fps", "L/top5", "L/top1"]) == "L/top1"
    assert chosen_metric(ours(Mine()), ["S/top1", "L/fps"]) is None
