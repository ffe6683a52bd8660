"""``save_best`` by metrics of a stitched model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import FlexibleRunner, Runner, ValLoop

from mmsnnet.engine.hooks.monitored_metrics import check_monitors, chosen_metric, default_monitor
from mmsnnet.engine.runner.labels import check_labels, check_sample
from mmsnnet.engine.runner.metric_values import split_values
from mmsnnet.engine.runner.metric_warnings import MOST_NAMES
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import better_rule
from mmsnnet.files.reading import listed


class BestMetricHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` whose ``save_best`` knows the metrics of our loops and tasks.

    ``save_best='auto'`` is the main metric of the largest anchor (or of the costliest stitch that is validated), such
    as ``L/mIoU``. Without ``rule`` the way in which a metric is better follows from its name.

    Args:
        args, kwargs: as of mmengine's ``CheckpointHook``.

    Raises:
        SettingError: ``rule`` is neither ``'greater'`` nor ``'less'``.
    """

    # Metrics without a rule that do not tell by their names which way is better.
    _undirected: Sequence[str] = ()

    def check_validation(self, runner: Runner | FlexibleRunner) -> None:
        """Choose the metric of ``save_best='auto'``; check what is monitored, and that the validation set has labels.

        Raises:
            SettingError: no metric has the name that is monitored, its rule is missing and does not follow from the
                name, or the validation set has no labels.
        """
        loop = runner.val_loop
        if loop is not None and self.save_best and "auto" in self.key_indicators:
            name = default_monitor(loop)
            if name is not None:
                self._init_rule(self.rules, [name])
                runner.logger.info(f"save_best='auto' keeps the checkpoint of the best {name}")
        check_monitors(runner)
        self._check_rules()
        if isinstance(loop, ValLoop):
            check_labels(loop.dataloader.dataset, loop.evaluator.metrics, "val")
            check_sample(loop.dataloader.dataset, loop.evaluator.metrics, "val")

    def _init_rule(self, rules: list[str | None], key_indicators: list[str]) -> None:
        if wrong := [rule for rule in rules if rule not in (None, *self.rule_map)]:
            raise SettingError(f"default_hooks.checkpoint.rule is 'greater' or 'less', got {wrong[0]!r}")
        is_stock = self.greater_keys is self._default_greater_keys and self.less_keys is self._default_less_keys
        resolved: list[str | None] = []
        undirected: list[str] = []
        each = rules * len(key_indicators) if len(rules) == 1 else rules
        for rule, key in zip(each, key_indicators, strict=True):
            rule = rule or (better_rule(key) if is_stock else None)
            if rule is None and key != "auto":
                try:
                    super()._init_rule([None], [key])
                    rule = self.rules[0]
                except ValueError:  # mmengine cannot infer it: whether there is such a metric is said first
                    undirected.append(key)
                    rule = "greater"
            resolved.append(rule)
        self._undirected = undirected
        super()._init_rule(resolved, key_indicators)

    def _check_rules(self) -> None:
        if self._undirected:
            raise SettingError(
                f"default_hooks.checkpoint.save_best={', '.join(self._undirected)}: whether more or less is better "
                "does not follow from the name: set default_hooks.checkpoint.rule to 'greater' or 'less'"
            )

    def _save_best_checkpoint(self, runner: Runner | FlexibleRunner, metrics: Mapping[str, Any]) -> None:
        if self.save_best and (numbers := self._numbers(runner, metrics)):
            super()._save_best_checkpoint(runner, numbers)

    def _numbers(self, runner: Runner | FlexibleRunner, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        """The metrics to choose by. For a monitored one that is no number it is None, which mmengine passes over."""
        numbers, _ = split_values(metrics)
        if "auto" in self.key_indicators:  # before training, no name was known
            name = chosen_metric(runner.val_loop, numbers) or next(iter(numbers), None)
            if name is None:
                return {}
            rules = self.rules
            try:
                self._init_rule(rules, [name])
                self._check_rules()
            except SettingError as error:
                self._init_rule(rules, ["auto"])
                runner.logger.warning(f"save_best='auto' keeps no checkpoint: {error}")
                return {}
        lacking = {key: None for key in self.key_indicators if key not in numbers}
        if lacking:
            runner.logger.warning(
                f"save_best keeps no checkpoint by {', '.join(lacking)}: validation gave no such number, but "
                f"{listed(list(numbers), MOST_NAMES) or 'none'}"
            )
        return numbers | lacking
