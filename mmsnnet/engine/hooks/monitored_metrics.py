"""Metrics that hooks and schedules monitor, checked against those that validation will give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import BaseLoop, FlexibleRunner, Runner, ValLoop

from mmsnnet.engine.runner.metric_warnings import MOST_NAMES
from mmsnnet.engine.runner.stitch_loops import StitchValLoop
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import better_rule, known_names, main_metric
from mmsnnet.files.reading import listed
from mmsnnet.models.checkpoint import unwrapped_model

# Models of these packages give no losses in validation.
WITHOUT_LOSSES = ("mmseg", "mmdet", "mmsnnet")


@dataclass(frozen=True)
class Monitor:
    """A setting that names a metric, and its rule: ``'greater'``, ``'less'``, or None where it has none."""

    setting: str
    metric: str
    rule: str | None = None


@dataclass(frozen=True)
class ExpectedMetrics:
    """The metrics that a validation loop will give.

    Args:
        own: names that are known, without a stitch.
        prefixes: of metrics whose names are not known, by their class; empty for one that has none.
        stitches: the validated ones; None for a loop that gives metrics without a stitch.
        losses: whether the model may give losses in validation.
    """

    own: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...]
    stitches: tuple[str, ...] | None
    losses: bool

    @classmethod
    def of(cls, loop: BaseLoop) -> ExpectedMetrics | None:
        """What a loop of ours or of mmengine's gives; None for other loops."""
        stitches: tuple[str, ...] | None = None
        if isinstance(loop, StitchValLoop) and type(loop).run is StitchValLoop.run:
            stitches = tuple(stitch.name for stitch in loop.stitches)
        elif not isinstance(loop, ValLoop) or type(loop).run is not ValLoop.run:
            return None
        evaluator = loop.evaluator
        if isinstance(evaluator, Evaluator) and type(evaluator).evaluate is not Evaluator.evaluate:
            return None  # it may name metrics otherwise
        own: list[str] = []
        prefixes: list[tuple[str, str]] = []
        for metric in loop.evaluator.metrics:
            names = known_names(metric)
            if names is None:
                own_naming = type(metric).evaluate is not BaseMetric.evaluate
                prefixes.append((type(metric).__name__, "" if own_naming else metric.prefix or ""))
            else:
                own += names
        package = type(unwrapped_model(loop.runner.model)).__module__.partition(".")[0]
        return cls(tuple(own), tuple(prefixes), stitches, package not in WITHOUT_LOSSES)

    @property
    def names(self) -> list[str]:
        """The names that are known, as hooks see them."""
        return list(self.own) if self.stitches is None else [f"{s}/{name}" for s in self.stitches for name in self.own]

    def may_have(self, name: str) -> bool:
        """Whether there will be, or may be, a metric of this name."""
        if self.stitches is not None:
            stitch, _, name = name.partition("/")
            if stitch not in self.stitches or not name:
                return False
        return (
            name in self.own
            or any(not prefix or name.startswith(f"{prefix}/") for _, prefix in self.prefixes)
            or (self.losses and "loss" in name)
        )

    def described(self, asked: str) -> str:
        """The names, those that are most like ``asked`` first."""

        def unlike(name: str) -> float:
            return -SequenceMatcher(None, asked.lower(), name.lower()).ratio()

        known = listed(sorted(self.names, key=unlike), MOST_NAMES)
        unknown = listed([kind for kind, _ in self.prefixes], MOST_NAMES)
        stitches = "" if self.stitches is None else f", each after <stitch>/ ({listed(self.stitches, MOST_NAMES)})"
        more = f"what {unknown} gives{stitches}" if unknown else ""
        return " and ".join(filter(None, (known, more))) or "none"


def check_monitors(runner: Runner | FlexibleRunner) -> None:
    """Check every metric that ``save_best``, early stopping or a plateau schedule names, and their rules.

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
                f"{expected.described(monitor.metric)}{_hint(runner.val_loop, monitor.metric)}"
            )
        rule = better_rule(monitor.metric)
        if None not in (rule, monitor.rule) and rule != monitor.rule:
            better = "higher" if rule == "greater" else "lower"
            raise SettingError(
                f"{monitor.setting}: {better} values of {monitor.metric} are better, and rule={monitor.rule!r} keeps "
                f"the others: set rule={rule!r}"
            )


def default_monitor(loop: BaseLoop) -> str | None:
    """The metric that ``save_best='auto'`` stands for: the main one of the largest anchor or, where that is not
    validated, of the costliest stitch that is. None where no name is known."""
    expected = ExpectedMetrics.of(loop)
    if expected is None:
        return None
    return chosen_metric(loop, expected.names)


def chosen_metric(loop: BaseLoop, names: Iterable[str]) -> str | None:
    """The task's main metric for the stitch of :func:`default_monitor`, or the first metric with a known direction.

    None if there is neither.
    """
    own = [name for name in names if not isinstance(loop, StitchValLoop) or name.startswith(f"{_costliest(loop)}/")]
    return main_metric(own) or next((name for name in own if better_rule(name) is not None), None)


def _costliest(loop: StitchValLoop) -> str:
    largest = loop.backbone.space.anchors[-1]
    if largest in loop.stitches:
        return largest.name
    costs = loop.backbone.costs()
    return max(loop.stitches, key=lambda stitch: costs[stitch.id].flops).name


def _monitors(runner: Runner | FlexibleRunner) -> Iterator[Monitor]:
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


def _hint(loop: BaseLoop, metric: str) -> str:
    """What to do about a stitch that the model has and validation leaves out."""
    stitch = metric.partition("/")[0]
    if not isinstance(loop, StitchValLoop) or stitch in [validated.name for validated in loop.stitches]:
        return ""
    if stitch not in [known.name for known in loop.backbone.space]:
        return ""
    return f". Stitch {stitch} is not validated: name it in val_cfg.stitches"
