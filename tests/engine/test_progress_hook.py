import re
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.logging import MessageHub

from mmsnnet.engine import ProgressHook


def run(hook: ProgressHook, iterations: int, first: int = 0, metrics: dict[str, Any] | None = None) -> None:
    """Calls a hook as a training loop does whose loss in iteration ``i`` (from 0) is ``i``."""
    hub = MessageHub("progress")
    runner: Any = SimpleNamespace(iter=first, max_iters=iterations, message_hub=hub)
    hook.before_train(runner)
    for iteration in range(first, iterations):
        hub.update_scalar("train/loss", iteration)
        hook.after_train_iter(runner, iteration)
        runner.iter += 1
    if metrics:
        hook.after_val_epoch(runner, metrics)
    hook.after_train(runner)


@pytest.mark.parametrize("iterations", [4, 7, 800, 10_000])
def test_a_run_has_four_lines_in_a_pipe(iterations: int, capsys: pytest.CaptureFixture[str]) -> None:
    run(ProgressHook(), iterations)
    lines = capsys.readouterr().out.splitlines()
    done = [int(re.match(r" +(\d+)/", line)[1]) for line in lines]  # type: ignore[index]
    assert len(done) == 4 and done[-1] == iterations
    assert all(abs(at - iterations * quarter / 4) < 1 for at, quarter in zip(done, (1, 2, 3, 4), strict=True))
    assert ["left" in line for line in lines] == [True, True, True, False]


def test_a_line_has_the_mean_loss_and_the_last_validation(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"S/aAcc": 70.0, "S/mIoU": 31.25, "S/worst": "bar", "L/aAcc": 75.0, "L/mIoU": 38.5}
    run(ProgressHook(), 100, metrics=metrics)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "loss 74.500" in last  # the mean of 50 to 99
    assert "mIoU S 31.25, L 38.5" in last and "aAcc" not in last


@pytest.mark.parametrize("metrics", [{"S/unknown": 1.0}, {"S/mIoU": "not a number"}])
def test_metrics_that_cannot_be_shown_are_left_out(metrics: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(ProgressHook(), 4, metrics=metrics)
    assert "S" not in capsys.readouterr().out


def test_a_resumed_run_shows_what_is_left_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    run(ProgressHook(), 8, first=5)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["6/8", "8/8"]


def test_a_terminal_has_one_line_that_is_renewed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run(ProgressHook(), 100)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "100/100" in text and text.count("\n") <= 2
