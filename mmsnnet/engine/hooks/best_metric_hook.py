"""``save_best`` by metrics of a stitched model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import ValLoop

from mmsnnet.engine.hooks.monitored_metrics import check_monitors, chosen_metric, default_monitor
from mmsnnet.engine.mmengine_private import AnyRunner, uses_default_keys
from mmsnnet.engine.ranks import fail_together
from mmsnnet.engine.runner.labels import check_labels, check_sample
from mmsnnet.engine.runner.metric_values import split_values
from mmsnnet.engine.runner.metric_warnings import MOST_NAMES
from mmsnnet.engine.runner.stitch_files import make_folders
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import better_rule
from mmsnnet.files.reading import join_names


class BestMetricHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` whose ``save_best`` knows the metrics of our loops and tasks.

    ``save_best='auto'`` is the main metric of the largest anchor (or of the costliest validated stitch), such as
    ``L/mIoU``. Without ``rule`` the name of a metric decides whether higher or lower is better. The hook writes a new
    best checkpoint before it deletes the old one.

    Args:
        args, kwargs: as of mmengine's ``CheckpointHook``.

    Raises:
        SettingError: ``rule`` is neither ``'greater'`` nor ``'less'``.
    """

    # Set while a metric has no rule. The name may be wrong, and check_validation says that first.
    _rule_error: SettingError | None = None

    def check_validation(self, runner: AnyRunner) -> None:
        """Choose the metric of ``save_best='auto'``; check monitored metrics and labels.

        Raises:
            SettingError: no metric has the name of a monitored one, or its rule is missing and the name does not
                decide; or the validation set has no labels.
        """
        loop = runner.val_loop
        if loop is not None and self.save_best and "auto" in self.key_indicators:
            name = default_monitor(loop)
            if name is not None:
                self._init_rule(self.rules, [name])
                runner.logger.info(f"save_best='auto' keeps the checkpoint of the best {name}")
        check_monitors(runner)
        self._check_rule()
        if isinstance(loop, ValLoop):
            check_labels(loop.dataloader.dataset, loop.evaluator.metrics, "val")
            check_sample(loop.dataloader.dataset, loop.evaluator.metrics, "val")
            for metric in loop.evaluator.metrics:
                make_folders(metric)

    def _init_rule(self, rules: list[str | None], key_indicators: list[str]) -> None:
        if unknown := [rule for rule in rules if rule not in (None, *self.rule_map)]:
            raise SettingError(f"default_hooks.checkpoint.rule should be 'greater' or 'less', got {unknown[0]!r}")
        rules = rules * len(key_indicators) if len(rules) == 1 else rules
        if uses_default_keys(self):
            rules = [rule or better_rule(key) for rule, key in zip(rules, key_indicators, strict=True)]
        self._rule_error = None
        try:
            super()._init_rule(rules, key_indicators)
        except ValueError:  # mmengine cannot infer a rule either
            self._rule_error = SettingError(
                f"default_hooks.checkpoint.save_best={', '.join(key_indicators)}: the name does not say whether higher "
                "or lower is better: correct it, or set default_hooks.checkpoint.rule to 'greater' or 'less'"
            )
            super()._init_rule(["greater"] * len(key_indicators), key_indicators)

    def _check_rule(self) -> None:
        if self._rule_error is not None:
            raise self._rule_error

    def write_checkpoint(self, runner: AnyRunner, name: str, meta: dict[str, Any], **settings: Any) -> None:
        """Write a checkpoint into the folder of this hook."""
        runner.save_checkpoint(
            self.out_dir,
            name,
            file_client_args=self.file_client_args,
            meta=meta,
            backend_args=self.backend_args,
            **settings,
        )

    def remove_checkpoint(self, path: str) -> None:
        """Delete the file or folder of a checkpoint, if it exists."""
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif is_main_process() and self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def best_checkpoint(self, metric: str) -> str | None:
        """The path of the best checkpoint by a metric of ``save_best``."""
        return self.best_ckpt_path if len(self.key_indicators) == 1 else self.best_ckpt_path_dict[metric]

    def set_best_checkpoint(self, runner: AnyRunner, metric: str, path: str | None) -> None:
        """Set that path, here and in the message hub."""
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = path
        else:
            self.best_ckpt_path_dict[metric] = path
        runner.message_hub.update_info(f"best_ckpt{self.suffix(metric)}", path)

    def suffix(self, metric: str) -> str:
        """mmengine's suffix to keys of the message hub for several metrics."""
        return "" if len(self.key_indicators) == 1 else f"_{metric}"

    def _save_best_checkpoint(self, runner: AnyRunner, metrics: Mapping[str, Any]) -> None:
        numbers = self._numbers(runner, metrics) if self.save_best else {}
        if not numbers:
            return
        step, meta = runner.epoch if self.by_epoch else runner.iter, dict(epoch=runner.epoch, iter=runner.iter)
        replaced: list[str | None] = []
        for metric, rule in zip(self.key_indicators, self.rules, strict=True):
            score_key, score = f"best_score{self.suffix(metric)}", numbers[metric]
            best = runner.message_hub.runtime_info.get(score_key, self.init_value_map[rule])
            if score is None or not self.is_better_than[metric](score, best):
                continue
            name = f"best_{metric}_{self.filename_tmpl.format(step)}".replace("/", "_")
            replaced.append(self.best_checkpoint(metric))
            runner.message_hub.update_info(score_key, score)
            self.set_best_checkpoint(runner, metric, self.file_backend.join_path(self.out_dir, name))
            self.write_checkpoint(
                runner, name, dict(meta), save_optimizer=False, save_param_scheduler=False, by_epoch=False
            )
            runner.logger.info(f"The best checkpoint with {score:0.4f} {metric} is saved to {name}")
        # The last checkpoint was written before these scores were known: a run that resumes from it needs them.
        if replaced and self.last_ckpt is not None:
            self._save_checkpoint_with_step(runner, step, meta)
        kept = [self.best_checkpoint(metric) for metric in self.key_indicators]
        with fail_together():
            for path in replaced:
                if path is not None and path not in kept:
                    self.remove_checkpoint(path)

    def _numbers(self, runner: AnyRunner, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        """The numbers among metrics, and None for other monitored metrics."""
        numbers, _ = split_values(metrics)
        if "auto" in self.key_indicators:  # before training, no name was known
            name = chosen_metric(runner.val_loop, numbers) or next(iter(numbers), None)
            if name is None:
                return {}
            try:
                self._init_rule(self.rules, [name])
                self._check_rule()
            except SettingError as error:
                self._init_rule([None], ["auto"])
                runner.logger.warning(f"save_best='auto' keeps no checkpoint: {error}")
                return {}
        lacking = {key: None for key in self.key_indicators if key not in numbers}
        if lacking:
            runner.logger.warning(
                f"save_best keeps no checkpoint by {', '.join(lacking)}: validation gave no such number, but "
                f"{join_names(list(numbers), MOST_NAMES) or 'none'}"
            )
        return numbers | lacking
