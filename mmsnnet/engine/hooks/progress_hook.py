from __future__ import annotations

import atexit
import time
from collections.abc import Mapping
from datetime import timedelta
from numbers import Real
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmsnnet.evaluation.metric_names import main_metric
from mmsnnet.registry import HOOKS

# The line shows the mean loss of this many iterations, and changes as often.
WINDOW = 50
# Lines for a whole run in a file or pipe.
LINES = 4


@HOOKS.register_module()
class ProgressHook(Hook):
    """Show one line of progress in training: iterations, loss, remaining time, and the last validation.

    On a terminal the line changes in place. A file or pipe gets a line after each quarter of the run. The tools use
    the hook in place of the log (``--quiet``).
    """

    priority = "VERY_LOW"

    def before_train(self, runner: Runner) -> None:
        self._console = Console()
        self._first, self._start, self._validation = runner.iter, time.monotonic(), ""
        self._progress = Progress(
            TextColumn("    "),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not (is_main_process() and self._console.is_terminal),
        )
        self._task = self._progress.add_task("", total=runner.max_iters, completed=runner.iter)
        self._progress.start()
        atexit.register(self._progress.stop)  # shows the cursor again if the run ends with an error

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.iter + 1
        self._progress.update(self._task, completed=done)
        if done % WINDOW == 0 or done == runner.max_iters:
            self._progress.update(self._task, description=self._figures(runner))
        if done * LINES // runner.max_iters > runner.iter * LINES // runner.max_iters and done < runner.max_iters:
            seconds = (time.monotonic() - self._start) / (done - self._first) * (runner.max_iters - done)
            self._print(f"{done}/{runner.max_iters}  {self._figures(runner)}  {_clock(seconds)} left")

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        self._validation = _main_metrics(metrics or {})

    def after_train(self, runner: Runner) -> None:
        self._progress.update(self._task, description=self._figures(runner))
        self._progress.stop()
        atexit.unregister(self._progress.stop)
        duration = _clock(time.monotonic() - self._start)
        self._print(f"{runner.iter}/{runner.max_iters}  {self._figures(runner)}  in {duration}")

    def _figures(self, runner: Runner) -> str:
        hub = runner.message_hub
        loss = f"loss {hub.get_scalar('train/loss').mean(WINDOW):.3f}" if "train/loss" in hub.log_scalars else ""
        return "  ".join(filter(None, (loss, self._validation)))

    def _print(self, line: str) -> None:
        if is_main_process() and not self._console.is_terminal:
            print(f"     {line}", flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _main_metrics(metrics: Mapping[str, Any]) -> str:
    """The task's main metric for each validated stitch."""
    main = main_metric(metrics)
    if main is None:
        return ""
    main = main.rpartition("/")[2]
    figures = [
        f"{name.partition('/')[0]} {value:.4g}"
        for name, value in metrics.items()
        if name.rpartition("/")[2] == main and isinstance(value, Real)
    ]
    return f"{main} {', '.join(figures)}"
