from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsnnet.engine.hooks.monitored_metrics import ExpectedMetrics
from mmsnnet.engine.runner.stitch_loops import StitchValLoop
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import better_rule, main_metric
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
    example on some training images that are not augmented. Checkpoints record the stitches that are left.

    Args:
        within: in units of the metric: 1.0 is one point of mIoU, 0.01 one of COCO's mAP.
        metric: its name without the stitch; the task's main metric by default.

    Raises:
        SettingError: before training: ``within`` is no number of 0 or more, a drawn stitch is not validated, or the
            metric does not exist.
    """

    def __init__(self, within: float, metric: str | None = None) -> None:
        if isinstance(within, bool) or not isinstance(within, int | float) or not within >= 0:
            raise SettingError(f"NarrowDrawsHook: within must be a number of 0 or more, got {within!r}")
        self.within = within
        self.metric = metric

    def before_train(self, runner: Runner) -> None:
        backbone = find_stitched_backbone(runner.model)
        if (drawn := runner.message_hub.get_info(DRAWN, None)) is not None:
            backbone.draw_only(drawn)
        loop = runner.val_loop
        if not isinstance(loop, StitchValLoop):
            raise SettingError("NarrowDrawsHook needs validation: set val_cfg to dict(type='mmsnnet.StitchValLoop')")
        drawn = _drawn(backbone)
        if missing := [id_ for id_ in drawn if backbone.space[id_] not in loop.stitches]:
            raise SettingError(
                f"NarrowDrawsHook compares all stitches that training draws, and {len(missing)} of {len(drawn)}, "
                f"{backbone.space[missing[0]].name} for one, are not validated: set val_cfg.stitches='all'"
            )
        expected = ExpectedMetrics.of(loop)
        if expected is None:
            return
        metric = self.metric or main_metric(expected.known)
        if metric is None or better_rule(metric) is None or not expected.may_have(f"{loop.stitches[0].name}/{metric}"):
            raise SettingError(
                f"NarrowDrawsHook: set metric to one that is validated and known to be better when higher or lower, "
                f"got {self.metric!r}; there are {', '.join(expected.known) or 'none'}"
            )

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        if runner.train_loop is None or metrics is None:
            return
        backbone = find_stitched_backbone(runner.model)
        drawn = _drawn(backbone)
        names = [name.partition("/")[2] for name in metrics if name.startswith(f"{backbone.space[drawn[0]].name}/")]
        metric = self.metric or main_metric(names)
        sign = 1 if better_rule(metric or "") == "greater" else -1
        quality = {id_: sign * float(metrics[f"{backbone.space[id_].name}/{metric}"]) for id_ in drawn}
        costs = backbone.costs()
        near = near_front(drawn, {id_: costs[id_].flops for id_ in drawn}, quality, self.within)
        anchors = [anchor.id for anchor in backbone.space.anchors]
        kept = [id_ for id_ in drawn if id_ in near or id_ in anchors]
        backbone.draw_only(kept)
        runner.message_hub.update_info(DRAWN, kept)
        runner.logger.info(
            f"NarrowDrawsHook: {len(kept)} of {len(drawn)} stitches lie within {self.within} of the front of {metric}, "
            f"or are anchors; training draws {', '.join(backbone.space[id_].name for id_ in kept)}"
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
