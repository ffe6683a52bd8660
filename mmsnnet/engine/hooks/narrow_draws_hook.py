from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmsnnet.engine.hooks.monitored_metrics import ExpectedMetrics
from mmsnnet.engine.mmengine_private import training_loop
from mmsnnet.engine.runner.stitch_loops import StitchValLoop
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import better_rule, main_metric
from mmsnnet.files.reading import join_names
from mmsnnet.models import StitchedBackbone, find_stitched_backbone
from mmsnnet.registry import HOOKS

# A record in the message hub, which checkpoints save: the ids of the stitches that training draws.
DRAWN = "drawn_stitches"


@HOOKS.register_module()
class NarrowDrawsHook(Hook):
    """After each validation, let training draw only stitches near the front, and the anchors.

    Training starts with all stitches that ``draw_from`` chooses. Each validation drops those whose metric lies more
    than ``within`` below the best of the drawn stitches that cost as much or less. So ``train_cfg.val_interval`` is the
    schedule. Every drawn stitch has to be validated: ``val_cfg=dict(type='mmsnnet.StitchValLoop', stitches='all')``.

    The validation set takes part in the choice. Validate on other images than those of the final evaluation, for
    example on some training images that are not augmented. Checkpoints record the stitches that are left. With
    mmengine's own training loops, a run that resumes from the checkpoint of a validation's iteration lacks this one.

    Args:
        within: in units of the metric: 1.0 is one point of mIoU, 0.01 one of COCO's mAP.
        metric: its name without the stitch; the task's main metric by default.
        higher: whether higher values are better; needed only for a metric whose name is unknown.

    Raises:
        SettingError: before training: ``within`` is no number of 0 or more, a drawn stitch is not validated, no
            validation comes before the end, or the metric does not exist.
    """

    priority = "ABOVE_NORMAL"  # before StitchInitHook: a mistake should show before the initialisation

    def __init__(self, within: float, metric: str | None = None, higher: bool | None = None) -> None:
        if isinstance(within, bool) or not isinstance(within, int | float) or not within >= 0:
            raise SettingError(f"NarrowDrawsHook: within must be a number of 0 or more, got {within!r}")
        self.within = within
        self.metric = metric
        self.higher = higher

    def before_train(self, runner: Runner) -> None:
        backbone, loop = find_stitched_backbone(runner.model), runner.val_loop
        drawn = _drawn(backbone)
        missing = drawn
        if isinstance(loop, StitchValLoop):
            missing = [id_ for id_ in drawn if backbone.space[id_] not in loop.stitches]
        if not isinstance(loop, StitchValLoop) or missing:
            raise SettingError(
                f"NarrowDrawsHook compares all stitches that training draws, and {len(missing)} of {len(drawn)}, "
                f"{backbone.space[missing[0]].name} for one, are not validated: set "
                "val_cfg=dict(type='mmsnnet.StitchValLoop', stitches='all'), with val_dataloader and val_evaluator"
            )
        _check_schedule(runner.train_loop)
        self._metric, self._sign = self._choose_metric(loop)
        recorded = runner.message_hub.get_info(DRAWN, None)
        if recorded is not None:
            anchors = backbone.space.anchors
            left = [id_ for id_ in drawn if id_ in recorded or backbone.space[id_] in anchors]
            if not left:
                raise SettingError(
                    "NarrowDrawsHook: draw_from leaves none of the stitches to which the resumed run had narrowed: "
                    "set draw_from as it was, or leave out --resume"
                )
            backbone.draw_only(left)
            runner.logger.info(
                f"NarrowDrawsHook: the resumed run had narrowed its draws; training draws {_names(backbone, left)}"
            )

    def _choose_metric(self, loop: StitchValLoop) -> tuple[str, int]:
        """The metric, and 1 if higher values are better, else -1."""
        expected = ExpectedMetrics.of(loop)
        metric = self.metric or (None if expected is None else main_metric(expected.known))
        known = metric is not None and (expected is None or expected.may_have(f"{loop.stitches[0].name}/{metric}"))
        if metric is None or not known:
            names = ", ".join(expected.known) if expected is not None else ""
            raise SettingError(
                f"NarrowDrawsHook: set metric to one that the validation gives, without the stitch; got {self.metric!r}"
                f"; known are {names or 'none'}"
            )
        rule = better_rule(metric)
        if self.higher is None and rule is None:
            raise SettingError(f"NarrowDrawsHook: say with higher=True or False which values of {metric} are better")
        return metric, 1 if (rule == "greater" if self.higher is None else self.higher) else -1

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        loop = training_loop(runner)
        if loop is None or metrics is None or _has_ended(loop):
            return
        backbone = find_stitched_backbone(runner.model)
        drawn, anchors, costs = _drawn(backbone), backbone.space.anchors, backbone.costs()
        quality = {id_: self._sign * _number(metrics, f"{backbone.space[id_].name}/{self._metric}") for id_ in drawn}
        unmeasured = [backbone.space[id_].name for id_ in drawn if math.isnan(quality[id_])]
        if unmeasured:
            runner.logger.warning(
                f"NarrowDrawsHook: no {self._metric} for {join_names(unmeasured, 5)}: "
                + ("all stitches stay" if len(unmeasured) == len(drawn) else "they are not near the front")
            )
        near = near_front(drawn, {id_: costs[id_].flops for id_ in drawn}, quality, self.within)
        kept = [id_ for id_ in drawn if not near or id_ in near or backbone.space[id_] in anchors]
        shared = [kept]
        dist.broadcast_object_list(shared)  # a metric may give its values on rank 0 only
        (kept,) = shared
        backbone.draw_only(kept)
        runner.message_hub.update_info(DRAWN, kept)
        runner.logger.info(
            f"NarrowDrawsHook: {len(kept)} of {len(drawn)} stitches lie within {self.within} of the front of "
            f"{self._metric}, or are anchors; training draws {_names(backbone, kept)}"
        )


def near_front(
    stitches: Iterable[int], flops: Mapping[int, float], quality: Mapping[int, float], within: float
) -> frozenset[int]:
    """The stitches at most ``within`` below the best of those that cost as much or less.

    Args:
        stitches: ids.
        flops, quality: by id; higher quality is better, and NaN is never near.
    """
    measured = [id_ for id_ in stitches if not math.isnan(quality[id_])]
    best, near = -math.inf, set()
    for id_ in sorted(measured, key=lambda id_: (flops[id_], -quality[id_])):
        best = max(best, quality[id_])
        if quality[id_] >= best - within:
            near.add(id_)
    return frozenset(near)


def _drawn(backbone: StitchedBackbone) -> list[int]:
    return sorted(id_ for bin_ in backbone.sampler().bins for id_ in bin_)


def _names(backbone: StitchedBackbone, stitches: Iterable[int]) -> str:
    return ", ".join(backbone.space[id_].name for id_ in stitches)


def _number(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _end(loop: Any) -> int:
    return loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters


def _has_ended(loop: Any) -> bool:
    return (loop.epoch if isinstance(loop, EpochBasedTrainLoop) else loop.iter) >= _end(loop)


def _check_schedule(loop: Any) -> None:
    """Refuse a schedule whose only validation comes at the end."""
    interval = loop.val_interval
    first = max(-(-loop.val_begin // interval), 1) * interval
    if len(loop.dynamic_milestones) == 1 and first >= _end(loop):
        raise SettingError(
            f"NarrowDrawsHook narrows after a validation, and the first one, at {first}, does not come before the end "
            f"of training, at {_end(loop)}: lower train_cfg.val_interval or val_begin"
        )
