"""Check that validation gives the metrics that hooks and schedules monitor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import BaseLoop, ValLoop

from mmsnnet.engine.mmengine_private import AnyRunner
from mmsnnet.engine.runner.metric_warnings import MOST_NAMES
from mmsnnet.engine.runner.stitch_loops import StitchValLoop
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import better_rule, known_names, main_metric
from mmsnnet.files.reading import join_names
from mmsnnet.models.model_weights import unwrapped_model

# Models of these packages give no losses in validation.
WITHOUT_LOSSES = ("mmseg", "mmdet", "mmsnnet")


@dataclass(frozen=True)
class Monitor:
    """A setting that names a metric, and its rule, if any."""

    setting: str
    metric: str
    rule: str | None = None


@dataclass(frozen=True)
class ExpectedMetrics:
    """The metrics that a validation loop will give.

    Args:
        known: names that are known, without a stitch.
        prefixes: the prefix of each metric class whose names are unknown; the empty string where it has none.
        stitches: the validated stitches; None for a loop that gives metrics without a stitch.
        losses: whether the model may give losses in validation.
    """

    known: tuple[str, ...]
    prefixes: dict[str, str]
    stitches: tuple[str, ...] | None
    losses: bool

    @classmethod
    def of(cls, loop: BaseLoop) -> ExpectedMetrics | None:
        """The metrics of a loop; None for one of the user's own."""
        stitches: tuple[str, ...] | None = None
        if isinstance(loop, StitchValLoop) and type(loop).run is StitchValLoop.run:
            stitches = tuple(stitch.name for stitch in loop.stitches)
        elif not isinstance(loop, ValLoop) or type(loop).run is not ValLoop.run:
            return None
        if isinstance(loop.evaluator, Evaluator) and type(loop.evaluator).evaluate is not Evaluator.evaluate:
            return None
        known: list[str] = []
        prefixes: dict[str, str] = {}
        for metric in loop.evaluator.metrics:
            names = known_names(metric)
            if names is not None:
                known += names
            else:  # a metric that overrides evaluate may add no prefix
                is_stock = type(metric).evaluate is BaseMetric.evaluate
                prefixes[type(metric).__name__] = (is_stock and metric.prefix) or ""
        package = type(unwrapped_model(loop.runner.model)).__module__.partition(".")[0]
        return cls(tuple(known), prefixes, stitches, package not in WITHOUT_LOSSES)

    @property
    def names(self) -> list[str]:
        """The known names, as hooks see them."""
        if self.stitches is None:
            return list(self.known)
        return [f"{stitch}/{name}" for stitch in self.stitches for name in self.known]

    def may_have(self, name: str) -> bool:
        """Whether there will be, or may be, a metric of this name."""
        if self.stitches is not None:
            stitch, _, name = name.partition("/")
            if stitch not in self.stitches or not name:
                return False
        return (
            name in self.known
            or any(not prefix or name.startswith(f"{prefix}/") for prefix in self.prefixes.values())
            or (self.losses and "loss" in name)
        )

    def describe(self, metric: str) -> str:
        """List the names, those most like ``metric`` first."""
        parts = []
        if self.names:
            parts.append(join_names(get_close_matches(metric, self.names, len(self.names), cutoff=0), MOST_NAMES))
        if self.prefixes:
            stitches = (
                "" if self.stitches is None else f", each after <stitch>/ ({join_names(self.stitches, MOST_NAMES)})"
            )
            parts.append(f"what {join_names(list(self.prefixes), MOST_NAMES)} gives{stitches}")
        return " and ".join(parts) or "none"


def check_monitors(runner: AnyRunner) -> None:
    """Check the metrics of ``save_best``, early stopping and plateau schedules.

    Raises:
        SettingError: no metric has the name, its rule is the wrong way about, or there is no validation.
    """
    monitors = list(_monitors(runner))
    if not monitors:
        return
    if runner.val_loop is None:
        raise SettingError(
            f"{monitors[0].setting}={monitors[0].metric!r} needs validation, and the config has none: set "
            f"val_dataloader, val_evaluator and val_cfg, or leave out {monitors[0].setting}"
        )
    expected = ExpectedMetrics.of(runner.val_loop)
    for monitor in monitors:
        if expected is not None and monitor.metric != "auto" and not expected.may_have(monitor.metric):
            raise SettingError(
                f"{monitor.setting}: no metric is called {monitor.metric}; those of this loop are "
                f"{expected.describe(monitor.metric)}{_stitch_hint(runner.val_loop, monitor.metric)}"
            )
        rule = better_rule(monitor.metric)
        if None not in (rule, monitor.rule) and rule != monitor.rule:
            better = "higher" if rule == "greater" else "lower"
            raise SettingError(
                f"{monitor.setting}: {better} values of {monitor.metric} are better, and rule={monitor.rule!r} keeps "
                f"the others: set rule={rule!r}"
            )


def default_monitor(loop: BaseLoop) -> str | None:
    """The metric of ``save_best='auto'``, None where no name is known before validation."""
    expected = ExpectedMetrics.of(loop)
    return None if expected is None else chosen_metric(loop, expected.names)


def chosen_metric(loop: BaseLoop, names: Iterable[str]) -> str | None:
    """The task's main metric, or the first one with a known direction.

    In a loop over stitches only names of the largest anchor count or, where that is not validated, of the costliest
    validated stitch.
    """
    if isinstance(loop, StitchValLoop):
        prefix = f"{_costliest(loop)}/"
        names = [name for name in names if name.startswith(prefix)]
    else:
        names = list(names)
    return main_metric(names) or next((name for name in names if better_rule(name) is not None), None)


def _costliest(loop: StitchValLoop) -> str:
    largest = loop.backbone.space.anchors[-1]
    if largest in loop.stitches:
        return largest.name
    costs = loop.backbone.costs()
    return max(loop.stitches, key=lambda stitch: costs[stitch.id].flops).name


def _monitors(runner: AnyRunner) -> Iterator[Monitor]:
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            for metric, rule in zip(hook.key_indicators, hook.rules, strict=True):
                yield Monitor("default_hooks.checkpoint.save_best", metric, rule)
        elif isinstance(hook, EarlyStoppingHook):
            yield Monitor(f"{type(hook).__name__}.monitor", hook.monitor, hook.rule)
    groups = runner.param_schedulers or []
    for schedulers in groups.values() if isinstance(groups, dict) else [groups]:
        for scheduler in schedulers:
            if getattr(scheduler, "need_val_args", False) and isinstance(getattr(scheduler, "monitor", None), str):
                yield Monitor(f"param_scheduler: {type(scheduler).__name__}.monitor", scheduler.monitor, scheduler.rule)


def _stitch_hint(loop: BaseLoop, metric: str) -> str:
    """Name the setting that adds a stitch of the model to validation."""
    stitch = metric.partition("/")[0]
    if not isinstance(loop, StitchValLoop) or stitch in [validated.name for validated in loop.stitches]:
        return ""
    if stitch not in [known.name for known in loop.backbone.space]:
        return ""
    return f". Stitch {stitch} is not validated: name it in val_cfg.stitches"
